"""`linearsr test-sets`: which test sets are known, which are here, and whether they are still the same."""

import json
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from linearsr_platform.cli.options import Verbose
from linearsr_platform.errors import StageError

if TYPE_CHECKING:
    from linearsr_platform.data.test_sets import Presence

Root = Annotated[Path, typer.Option("--root", metavar="DIR", help="Folder of the test sets and of their manifest, test_sets.json.")]
AsJson = Annotated[bool, typer.Option("--json", help="Write the result as JSON.")]
Named = Annotated[str, typer.Argument(metavar="NAME", help="RealSR, DRealSR, DIV2K-Val, RealLQ250 or RealLR200.", show_default=False)]
ROOT = Path("test-sets")


def list_sets(root: Root = ROOT, as_json: AsJson = False, verbose: Verbose = False) -> None:
    """Show every known test set, whether it is here and unchanged, and where to get it. Nothing is ever downloaded."""
    from linearsr_platform.data.test_sets import TEST_SETS, presence_of, read_records

    records = read_records(root)
    _show([presence_of(known, root, records) for known in TEST_SETS.values()], root, as_json=as_json)


def add(
    name: Named,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where you have put it.", show_default=False)],
    root: Root = ROOT,
    verbose: Verbose = False,
) -> None:
    """Check a test set that you have downloaded, and record its hash; from then on it must stay the same."""
    from linearsr_platform.data.test_sets import add_test_set

    found = add_test_set(name, folder, root, datetime.now(tz=UTC).date())
    pairs = "pairs" if found.hr is not None else "images"
    typer.echo(f"{found.name}: {len(found.pairs)} {pairs}, SHA-256 {found.sha256}")
    if found.known.sha256 is None:
        typer.echo("no published hash to compare with: this copy is now the one that others are compared with")


def verify(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Only this one; else all that were added.", show_default=False)
    ] = None,
    root: Root = ROOT,
    as_json: AsJson = False,
    verbose: Verbose = False,
) -> None:
    """Read test sets again and compare them with their recorded hashes; exit with 1 if one has changed or is gone."""
    from linearsr_platform.data.test_sets import TEST_SETS, find_test_set, known_test_set, presence_of, read_records

    records = read_records(root)
    if name is not None and known_test_set(name).name not in records:
        find_test_set(name, root)  # Says how to get it.
    wanted = list(records) if name is None else [known_test_set(name).name]
    found = [presence_of(TEST_SETS[one], root, records) for one in wanted if one in TEST_SETS]
    _show(found, root, as_json=as_json)
    broken = [one.known.name for one in found if one.state != "ok"]
    if broken:
        raise StageError(f"{len(broken)} of {len(found)} test sets are not what was added: {', '.join(broken)}")


TEST_SETS: dict[str, Callable[..., None]] = {"list": list_sets, "add": add, "verify": verify}
"""The verbs of `linearsr test-sets`."""


def _show(found: "list[Presence]", root: Path, *, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps({"root": str(root), "test_sets": [_as_json(one) for one in found]}, indent=2))
        return
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    if not found:
        typer.echo(f"no test set was added under {root}; `linearsr test-sets list` says where to get them")
        return
    console = Console(highlight=False)
    numbers = [Column(name, justify="right") for name in ("images", "of", "scale")]
    table = Table("test set", "", *numbers, "originals", "SHA-256", box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    colours = {"ok": "green", "changed": "bold red", "not recorded": "yellow", "absent": "dim"}
    for one in found:
        facts = (str(one.images or "-"), str(one.known.images), f"x{one.known.scale}", "yes" if one.known.hr else "no")
        table.add_row(one.known.name, Text(one.state, colours[one.state]), *facts, one.sha256[:12])
    console.print(table)
    console.print()
    places: dict[str, list[Presence]] = {}
    for one in found:
        if one.state != "ok":
            places.setdefault(f"{one.detail}\n  {one.known.licence}" if not one.sha256 else one.detail, []).append(one)
    for place, ones in places.items():
        console.print(f"{', '.join(one.known.name for one in ones)}: {place}", soft_wrap=True, markup=False)
    new = [one for one in found if one.state in ("absent", "not recorded") and not one.sha256]
    if new:
        layout = ", ".join(f"{one.known.folder}/" for one in new)
        console.print(
            f"\nput them into {root}/ as {layout}\nthen: linearsr test-sets add NAME FOLDER --root {root}", soft_wrap=True, markup=False
        )


def _as_json(one: "Presence") -> dict[str, object]:
    known = one.known
    return {
        "name": known.name,
        "state": one.state,
        "images": one.images,
        "expected_images": known.images,
        "scale": known.scale,
        "originals": bool(known.hr),
        "sha256": one.sha256 or None,
        "published_sha256": known.sha256,
        "page": known.page,
        "licence": known.licence,
        "detail": one.detail,
    }
