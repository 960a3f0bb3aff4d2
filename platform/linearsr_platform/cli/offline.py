"""`linearsr doctor --offline RECIPE`: what is missing on a machine that reaches no publisher of weights."""

import json
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from linearsr_platform.cli.options import Overrides, Profile, Verbose
from linearsr_platform.errors import StageError, UserError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from linearsr_platform.stages.offline import Finding


def check_offline(
    context: typer.Context,
    offline: Annotated[
        str | None,
        typer.Option(
            "--offline", metavar="RECIPE", help="Say which weights and packages a recipe lacks; exit code 1 if any.", show_default=False
        ),
    ] = None,
    profile: Profile = None,
    overrides: Overrides = None,
    as_json: Annotated[bool, typer.Option("--json", help="With --offline: write the result as JSON.")] = False,
    verbose: Verbose = False,
) -> None:
    """List what a recipe needs that no network may be asked for when it runs; opens no connection."""
    if context.invoked_subcommand is not None:
        if offline is not None:
            raise UserError(f"--offline: got {offline!r} before {context.invoked_subcommand!r}; expected one or the other")
        return
    if offline is None:
        raise UserError("doctor: got no recipe; expected `linearsr doctor --offline RECIPE` or `linearsr doctor resume RECIPE`")
    from linearsr_platform.cli.prefetch import load_for_weights
    from linearsr_platform.stages.offline import find_offline

    loaded = load_for_weights(offline, profile, overrides or [])
    found = find_offline(loaded.recipe, _as_named(offline, profile, overrides or []))
    lacking = [one for one in found if not one.is_here]
    if as_json:
        typer.echo(json.dumps({"recipe": offline, "missing": len(lacking), "found": [asdict(one) for one in found]}, indent=2))
    else:
        _show(found, lacking, offline)
    if lacking:
        raise typer.Exit(StageError.exit_code)


def _as_named(recipe: str, profile: str | None, overrides: "Sequence[str]") -> str:
    """Return what names the same settings on another command line."""
    options = [*(["--profile", profile] if profile is not None else []), *(word for one in overrides for word in ("--set", one))]
    return shlex.join([recipe, *options])


def _show(found: "Sequence[Finding]", lacking: "Sequence[Finding]", recipe: str) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not found:
        typer.echo(f"{recipe}: needs nothing beside the platform's own packages")
        return
    console = Console(highlight=False)
    table = Table("what", "name", "", "", box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.columns[1].no_wrap = True
    colours = {"present": "green", "remote": "yellow", "missing": "bold red", "wrong hash": "bold red"}
    for one in found:
        detail = one.detail if one.is_here else ""
        table.add_row(one.kind, Text(one.name), Text(one.state, colours[one.state]), Text(detail, "dim"))
    console.print(table)
    fixes: dict[str, dict[str, list[Finding]]] = {}
    for one in lacking:
        where = f"{one.detail}: {one.looked_in}" if one.kind in ("codec", "text-encoder") or one.state == "wrong hash" else _folder(one)
        fixes.setdefault(one.fix, {}).setdefault(where, []).append(one)
    for fix, places in fixes.items():
        console.print()
        for where, ones in places.items():
            console.print(f"{', '.join(one.name for one in ones)}: {where}", soft_wrap=True, markup=False)
        users = dict.fromkeys(user for ones in places.values() for one in ones for user in one.needed_by)
        console.print(f"  for {', '.join(users)}", soft_wrap=True, markup=False)
        console.print(f"  fix: {fix}", soft_wrap=True, markup=False)
    console.print()
    total = len(found)
    console.print(f"{recipe}: {len(lacking)} of {total} missing or wrong" if lacking else f"{recipe}: all {total} are here")


def _folder(one: "Finding") -> str:
    """Say where something that is not there was looked for."""
    return f"{one.detail} in {Path(one.looked_in).parent}" if one.looked_in and one.kind != "package" else one.detail
