"""Who runs a command, as runs, jobs and the history of champions name them."""

import getpass
import os


def account_name() -> str:
    """Return the user's name, or `uid N` where there is none: a container may run as a number that no account has."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        # KeyError up to Python 3.12, OSError from 3.13 on.
        return f"uid {os.getuid()}"
