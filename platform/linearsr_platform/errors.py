"""Errors that end a command with one clear sentence instead of a traceback. Imports nothing heavy.

Messages follow `where: got <value>; expected <rule>; fix: <flag or key>`.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from linearsr_platform.remote import without_logins


class ToldError(Exception):
    """An error whose message people read, on screens and in reports: passwords in its URLs are left out."""

    def __init__(self, message: str) -> None:
        """Keep the message."""
        super().__init__(without_logins(message))


class UserError(ToldError):
    """Something the user can fix: a setting, a path, a flag. The command exits with 2."""

    exit_code = 2


class StageError(ToldError):
    """Something that went wrong while running. The command exits with 1."""

    exit_code = 1


@dataclass(frozen=True, kw_only=True)
class RecipeProblem:
    """One thing that is wrong in a recipe, a profile or a `--set`."""

    file: str
    """Where the offending value was written: a path, `path:line`, or `--set a.b=c`."""
    key: str
    """Dotted key, empty if the whole file is meant."""
    value: str
    """The offending value as shown to the user, empty if there is none (a missing key, a syntax error)."""
    rule: str
    """What would be right, in plain words."""
    fix: str = ""
    """What to do, often the nearest valid key; empty if the rule says it all."""

    def __str__(self) -> str:
        """Write the problem as one line, without the passwords in its URLs: each is shown by itself."""
        where = f"{self.file}: {self.key}" if self.key else self.file
        got = f"got {self.value}; expected {self.rule}" if self.value else self.rule
        return without_logins(f"{where}: {got}" + (f"; fix: {self.fix}" if self.fix else ""))


class RecipeErrors(UserError):
    """Everything that is wrong with a recipe, all at once."""

    def __init__(self, errors: Sequence[RecipeProblem]) -> None:
        """Keep the problems and write them one a line."""
        self.errors = list(errors)
        super().__init__("\n".join(str(error) for error in self.errors))
