"""`linearsr prefetch`: brings the weights that a recipe needs, so that nothing has to be downloaded when it runs."""

import json
from collections.abc import Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from textwrap import indent
from typing import TYPE_CHECKING, Annotated

import typer

from linearsr_platform.cli.options import Overrides, Profile, RecipePath, Verbose
from linearsr_platform.errors import RecipeErrors, StageError, UserError

if TYPE_CHECKING:
    from linearsr_platform.recipe.load import LoadedRecipe
    from linearsr_platform.recipe.needs import Need
    from linearsr_platform.stages.prefetch import Outcome

MEGABYTE = 1e6


def prefetch(
    recipe: RecipePath,
    profile: Profile = None,
    overrides: Overrides = None,
    into: Annotated[Path, typer.Option("--into", metavar="DIR", help="Folder that the weights go to.")] = Path("weights"),
    mirror: Annotated[
        str | None,
        typer.Option("--from", metavar="DIR_OR_URL", help="Take them from a folder or URL with the same names, not from their publishers."),
    ] = None,
    what: Annotated[
        str | None, typer.Option(metavar="KIND,...", help="Only these: metrics, codec, text-encoder, tagger, init-weights.")
    ] = None,
    tagger: Annotated[list[str] | None, typer.Option(metavar="NAME", help="Also those of a tagger: ram, dape or clip.")] = None,
    hub: Annotated[
        list[str] | None, typer.Option(metavar="KIND=ORG/NAME", help="Repository of the Hugging Face hub for codec or text-encoder.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would be brought, and open no connection.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Write the result as JSON.")] = False,
    verbose: Verbose = False,
) -> None:
    """Bring the weights a recipe needs into one folder with a manifest; exit with 1 if some cannot be had. Repeat it freely."""
    from linearsr_platform.cli.environment import quiet_libraries

    quiet_libraries(verbose=verbose)
    from linearsr_platform import storage
    from linearsr_platform.recipe.needs import needs_of
    from linearsr_platform.stages.prefetch import Prefetch

    loaded = load_for_weights(recipe, profile, overrides or [])
    needs = needs_of(loaded.recipe, tagger or [], _hubs(hub or []))
    needs = _chosen(needs, what)
    if ":/" in str(into):
        raise UserError(f"--into: got {str(into)!r}; expected a folder of this machine; fix: copy it there after, and take it by --from")
    if mirror is not None and storage.absolute(mirror) == storage.absolute(str(into)):
        raise UserError(f"--from: got {mirror!r}, which is --into; expected another place")
    today = datetime.now(tz=UTC).date()
    if dry_run:
        outcomes = Prefetch(into=into.absolute(), mirror=mirror, today=today).plan(needs)
    else:
        outcomes = _run(needs, into, mirror, as_json=as_json)
    changes = settings_of([outcome.need for outcome in outcomes if outcome.is_had], into)
    if as_json:
        typer.echo(json.dumps({"into": str(into), "weights": [_as_json(one) for one in outcomes], "settings": changes}, indent=2))
    else:
        _show(outcomes, into, changes)
    failed = [outcome for outcome in outcomes if not outcome.is_had]
    if failed:
        names = ", ".join(one.need.name for one in failed)
        raise StageError(f"{len(failed)} of {len(outcomes)} weights cannot be had: {names}; fix: --from a folder or URL that has them")


def load_for_weights(recipe: str, profile: str | None, overrides: Sequence[str]) -> "LoadedRecipe":
    """Load a recipe that may lack nothing but the name of the folder of its metrics' weights."""
    from linearsr_platform.recipe.load import load_recipe

    try:
        return load_recipe(recipe, profile, overrides)
    except RecipeErrors as error:
        if not all(problem.key.startswith(("validation.metrics", "evaluate.metrics")) for problem in error.errors):
            raise
        try:
            # "" is a folder that nobody can name, so that what follows sees that none was named.
            loaded = load_recipe(recipe, profile, [*overrides, "validation.weights=''"])
        except RecipeErrors:
            raise error from None
        validation = loaded.recipe.validation.model_copy(update={"weights": None})
        return replace(loaded, recipe=loaded.recipe.model_copy(update={"validation": validation}))


def settings_of(needs: "Sequence[Need]", into: Path) -> dict[str, str]:
    """Return the settings, by dotted key, that their recipe needs to find weights in a folder; none for those that it finds already."""
    from linearsr_platform import storage

    found = {}
    for need in needs:
        value = str(into / need.setting_folder)
        finds = need.value is not None and storage.is_local(need.value) and storage.absolute(need.value) == storage.absolute(value)
        if need.key and not finds:
            found[need.key] = value
    return found


def _hubs(texts: list[str]) -> dict[str, str]:
    from linearsr_platform.recipe.weight_sources import HUB_ID

    hubs = {}
    for text in texts:
        kind, _, repository = text.partition("=")
        if not HUB_ID.fullmatch(repository):
            raise UserError(f"--hub: got {text!r}; expected codec=ORG/NAME or text-encoder=ORG/NAME")
        hubs[kind] = repository
    return hubs


def _chosen(needs: "list[Need]", what: str | None) -> "list[Need]":
    from linearsr_platform.recipe.needs import KINDS

    kinds = KINDS if what is None else tuple(part.strip() for part in what.split(","))
    for kind in kinds:
        if kind not in KINDS:
            raise UserError(f"--what: got {kind!r}; expected some of {', '.join(KINDS)}, with commas")
    if what is not None and "tagger" in kinds and not any(need.kind == "tagger" for need in needs):
        raise UserError("--what: got 'tagger'; expected to be told which one, no recipe says it; fix: --tagger ram")
    return [need for need in needs if need.kind in kinds and not _is_users_own(need)]


def _is_users_own(need: "Need") -> bool:
    """Tell whether a recipe starts from a local file that is there: `linearsr import-sana` wrote it, and it may stay."""
    from linearsr_platform import storage

    path = need.path
    return need.kind == "init-weights" and path is not None and storage.is_local(path) and storage.exists(path)


def _run(needs: "list[Need]", into: Path, mirror: str | None, *, as_json: bool) -> "list[Outcome]":
    from linearsr_platform.cli.progress import display_beside_result
    from linearsr_platform.stages.prefetch import Prefetch

    with display_beside_result(as_json=as_json) as display:
        seen: set[str] = set()

        def on_bytes(need: "Need", done: int, total: int) -> None:
            megabytes = max(1, round(total / MEGABYTE))
            if need.name not in seen:
                seen.add(need.name)
                display.task(need.name, megabytes, "MB")
            display.update(need.name, round(done / MEGABYTE), megabytes)

        today = datetime.now(tz=UTC).date()
        return Prefetch(into=into.absolute(), mirror=mirror, today=today, on_bytes=on_bytes).run(needs)


def _show(outcomes: "list[Outcome]", into: Path, changes: dict[str, str]) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    if not outcomes:
        typer.echo("nothing to bring: the recipe needs no weights")
        return
    console = Console(highlight=False)
    table = Table("what", "name", "", "MB", box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    table.columns[3].justify = "right"
    colours = {"present": "", "brought": "green", "would bring": "yellow", "no source": "bold red", "failed": "bold red"}
    for outcome in outcomes:
        size = f"{outcome.bytes / MEGABYTE:.1f}" if outcome.bytes else ""
        table.add_row(outcome.need.kind, Text(outcome.need.name, overflow="fold"), Text(outcome.state, colours[outcome.state]), size)
    console.print(table)
    for outcome in outcomes:
        if outcome.detail:
            word = "from" if outcome.is_had else f"{outcome.state}:"
            console.print(f"{outcome.need.name}: {word} {outcome.detail}", soft_wrap=True, markup=False)
    licences = {outcome.need.name: outcome.need.source.licence for outcome in outcomes if outcome.need.source is not None}
    console.print()
    for licence in dict.fromkeys(licences.values()):
        names = ", ".join(name for name, one in licences.items() if one == licence)
        console.print(f"licence {licence}: {names}", soft_wrap=True, markup=False)
    if any(outcome.is_had for outcome in outcomes):
        _show_settings(into, changes)


def _show_settings(into: Path, changes: dict[str, str]) -> None:
    typer.echo()
    if not changes:
        typer.echo(f"the recipe looks in {into} already")
        return
    import yaml

    nested: dict[str, object] = {}
    for key, value in changes.items():
        section, (*parents, last) = nested, key.split(".")
        for parent in parents:
            inner = section.setdefault(parent, {})
            assert isinstance(inner, dict)  # noqa: S101 (no setting of ours is inside another one)
            section = inner
        section[last] = value
    typer.echo("put into the recipe, or a profile:")
    typer.echo(indent(yaml.safe_dump(nested, sort_keys=False), "  "), nl=False)
    typer.echo("or say on the command line:")
    typer.echo("  " + " ".join(f"--set {key}={value}" for key, value in changes.items()))


def _as_json(outcome: "Outcome") -> dict[str, object]:
    need = outcome.need
    return {
        "kind": need.kind,
        "target": need.target,
        "state": outcome.state,
        "detail": outcome.detail,
        "bytes": outcome.bytes,
        "needed_by": list(need.needed_by),
        "licence": need.source.licence if need.source is not None else None,
    }
