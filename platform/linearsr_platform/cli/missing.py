"""What the command line says where only the method is installed. Imports the standard library alone."""

import sys
from typing import NoReturn


def exit_naming_extra(error: ModuleNotFoundError) -> NoReturn:
    """End the process with 2, naming the package that is missing and what installs it; our own modules are a bug and raise."""
    name = str(error.name)
    if name.startswith("linearsr"):
        raise error
    sys.stderr.write(f'error: the package {name!r} is not installed; fix: pip install "linearsr[platform]"\n')
    sys.exit(2)
