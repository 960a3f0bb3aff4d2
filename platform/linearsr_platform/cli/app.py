"""The command `linearsr`: every verb is one file of this package, registered here."""

from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated

from linearsr_platform.cli.missing import exit_naming_extra

try:
    import typer

    from linearsr_platform.cli.boundaries import boundaries
    from linearsr_platform.cli.boundary import reports_errors
    from linearsr_platform.cli.check import check
    from linearsr_platform.cli.knee import knee
    from linearsr_platform.cli.models import models, promote
    from linearsr_platform.cli.run import run
    from linearsr_platform.cli.sana import export, import_sana
    from linearsr_platform.cli.search import search
    from linearsr_platform.cli.shards import SHARDS
    from linearsr_platform.cli.tag import tag
    from linearsr_platform.cli.upscale import upscale
except ModuleNotFoundError as error:
    exit_naming_extra(error)

app = typer.Typer(
    name="linearsr",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
COMMANDS: dict[str, Callable[..., None]] = {
    "check": check,
    "run": run,
    "search": search,
    "upscale": upscale,
    "tag": tag,
    "import-sana": import_sana,
    "export": export,
    "knee": knee,
    "boundaries": boundaries,
    "models": models,
    "promote": promote,
}
"""Every verb of one word; each has a `verbose` option that the error boundary reads."""

for _name, _command in COMMANDS.items():
    app.command(_name)(reports_errors(_command))


_shards = typer.Typer(no_args_is_help=True, help="Verify or show prepared data.")
for _name, _command in SHARDS.items():
    _shards.command(_name)(reports_errors(_command))
app.add_typer(_shards, name="shards")


def main() -> None:
    """Run the command line; the console script's entry point."""
    try:
        app(prog_name="linearsr")
    except ModuleNotFoundError as error:
        exit_naming_extra(error)


def _print_version(wanted: bool) -> None:
    if not wanted:
        return
    try:
        typer.echo(f"linearsr {version('linearsr')}")
    except PackageNotFoundError:
        typer.echo("linearsr, run from a source folder")
    raise typer.Exit


@app.callback()
def root(
    show_version: Annotated[bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")] = False,
) -> None:
    """Train, evaluate, release and use LinearSR super-resolution models."""
