"""Which code made a model."""

import subprocess
from importlib.metadata import version
from pathlib import Path


def code_version() -> str:
    """Return the package's version and, where it runs from a git checkout, the commit, with `-dirty` if it was changed since."""
    folder = Path(__file__).resolve().parent
    package = version("linearsr")
    try:
        # A wheel inside somebody else's repository is not of that repository's version: the file must be known to git.
        subprocess.run(["git", "-C", str(folder), "ls-files", "--error-unmatch", __file__], check=True, capture_output=True)  # noqa: S603, S607
        command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=12"]
        commit = subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()  # noqa: S603
    except (OSError, subprocess.CalledProcessError):
        return package
    return f"{package}+{commit}"
