"""The command `linearsr`: every verb is one file of this package, registered here."""

import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from io import TextIOWrapper
from typing import Annotated

from linearsr_platform.cli.missing import exit_naming_extra

try:
    import typer

    from linearsr_platform.cli.boundaries import boundaries
    from linearsr_platform.cli.boundary import reports_errors
    from linearsr_platform.cli.check import check
    from linearsr_platform.cli.doctor import DOCTOR
    from linearsr_platform.cli.evaluate import evaluate
    from linearsr_platform.cli.jobs import list_jobs, logs, status, stop, submit
    from linearsr_platform.cli.knee import knee
    from linearsr_platform.cli.models import compare, list_all, show
    from linearsr_platform.cli.offline import check_offline
    from linearsr_platform.cli.plan import plan
    from linearsr_platform.cli.prefetch import prefetch
    from linearsr_platform.cli.release import history, promote, replace_expert, rollback
    from linearsr_platform.cli.run import run
    from linearsr_platform.cli.sana import export, import_sana
    from linearsr_platform.cli.search import search
    from linearsr_platform.cli.shards import SHARDS
    from linearsr_platform.cli.tag import tag
    from linearsr_platform.cli.test_sets import TEST_SETS
    from linearsr_platform.cli.tracking import flush
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
    "plan": plan,
    "prefetch": prefetch,
    "run": run,
    "search": search,
    "submit": submit,
    "status": status,
    "logs": logs,
    "stop": stop,
    "list": list_jobs,
    "upscale": upscale,
    "evaluate": evaluate,
    "tag": tag,
    "import-sana": import_sana,
    "export": export,
    "knee": knee,
    "boundaries": boundaries,
}
"""Every verb of one word; each has a `verbose` option that the error boundary reads."""
MODELS: dict[str, Callable[..., None]] = {
    "list": list_all,
    "show": show,
    "compare": compare,
    "promote": promote,
    "rollback": rollback,
    "history": history,
    "replace-expert": replace_expert,
}
"""What can be done with registered models."""

GROUPS: dict[str, tuple[str, dict[str, Callable[..., None]]]] = {
    "models": ("Registered models: list, compare, promote through the gate, roll back.", MODELS),
    "doctor": ("Find out whether a recipe keeps its promises on these machines.", DOCTOR),
    "shards": ("Verify or show prepared data.", SHARDS),
    "test-sets": ("Test sets by name: where to get them, and whether they are still the same.", TEST_SETS),
    "tracking": ("Look after what MLflow is told.", {"flush": flush}),
}
"""Verbs that have verbs: what they are about, and those."""
WITHOUT_VERB: dict[str, Callable[..., None]] = {"doctor": check_offline}
"""What such a verb does by itself, with options of its own."""

for _name, _command in COMMANDS.items():
    app.command(_name)(reports_errors(_command))
for _name, (_about, _commands) in GROUPS.items():
    _group = typer.Typer(help=_about, no_args_is_help=True)
    if _name in WITHOUT_VERB:
        _group.callback(invoke_without_command=True, help=_about)(reports_errors(WITHOUT_VERB[_name]))
    for _verb, _command in _commands.items():
        _group.command(_verb)(reports_errors(_command))
    app.add_typer(_group, name=_name)


def main() -> None:
    """Run the command line; the console script's entry point."""
    if isinstance(sys.stdout, TextIOWrapper):
        # A file's name may be no text; saying it must not end a command.
        sys.stdout.reconfigure(errors="backslashreplace")
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
