"""Where errors end: one clear sentence on standard error and an exit code, instead of a traceback."""

import functools
import traceback
from collections.abc import Callable
from typing import TYPE_CHECKING, ParamSpec

import typer

from linearsr.codec_source import CodecError
from linearsr.opencv import DegradationError
from linearsr_platform.errors import RecipeErrors, StageError, UserError

if TYPE_CHECKING:
    from linearsr_platform.recipe.schema import Recipe

_P = ParamSpec("_P")

FAILED = StageError.exit_code
INTERRUPTED = 130
"""What shells report for a command that Ctrl-C ended."""


def reports_errors(command: Callable[_P, None]) -> Callable[_P, None]:
    """Wrap a command so that its errors are told, not raised; its option `verbose` brings tracebacks.

    Exit codes: 2 for what the user can fix, 1 for failures, 130 for Ctrl-C. Anything unforeseen is a bug and keeps its traceback.
    """

    @functools.wraps(command)
    def reporting(*args: _P.args, **kwargs: _P.kwargs) -> None:
        try:
            command(*args, **kwargs)
        except KeyboardInterrupt as error:
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED) from error
        except (UserError, StageError, CodecError, DegradationError, OSError) as error:
            if kwargs.get("verbose"):
                traceback.print_exception(error)
            _tell(error)
            # Weights of a codec, or OpenCV, that are not there are for the user to bring.
            by_user = isinstance(error, (UserError, CodecError, DegradationError))
            raise typer.Exit(UserError.exit_code if by_user else FAILED) from error

    return reporting


def warn_of(recipe: "Recipe") -> None:
    """Tell what the recipe may say but hardly means, on standard error."""
    from linearsr_platform.recipe.notes import notes_on

    for note in notes_on(recipe):
        typer.echo(f"warning: {note}", err=True)


def _tell(error: Exception) -> None:
    if not isinstance(error, RecipeErrors):
        typer.echo(f"error: {error}", err=True)
        return
    for problem in error.errors:
        typer.echo(f"error: {problem}", err=True)
    count = len(error.errors)
    typer.echo(f"{count} error{'s' if count > 1 else ''}; nothing was run", err=True)
