"""`linearsr shards`: is prepared data what its manifest says, and what does it look like."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from itertools import islice
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from linearsr_platform.cli.options import Verbose
from linearsr_platform.errors import StageError, UserError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from linearsr_platform.data.images import Pixels
    from linearsr_platform.data.manifest import Manifest
    from linearsr_platform.data.verify import Verification

TAGS_SHOWN = 20
REASONS_SHOWN = 5
Url = Annotated[str, typer.Argument(metavar="URL", help="Folder of a manifest.json, or its fsspec URL.", show_default=False)]


def verify(
    url: Url, as_json: Annotated[bool, typer.Option("--json", help="Write the result as JSON.")] = False, verbose: Verbose = False
) -> None:
    """Read all shards and check hashes, sizes, keys, tags, embeddings and latents; exit with 1 if anything is wrong."""
    from linearsr_platform import storage
    from linearsr_platform.cli.progress import make_display
    from linearsr_platform.data.manifest import load_manifest
    from linearsr_platform.data.verify import verify_data_set

    manifest = load_manifest(url)
    with nullcontext() if as_json else make_display() as display:

        def on_progress(done: int, total: int, what: str) -> None:
            if display is not None:
                display.update("verify", done, total)

        if display is not None:
            display.task("verify", sum(len(info.shards) for info in manifest.splits.values()), "shards")
        result = verify_data_set(manifest, url, on_progress)
    if as_json:
        typer.echo(json.dumps(_as_json(result, url, manifest)))
        if result.problems:
            raise typer.Exit(StageError.exit_code)
        return
    for problem in result.problems:
        typer.echo(f"{problem.where}: {problem.what}")
    counted = f"{result.samples} samples in {result.shards} shards"
    if result.problems:
        fix = "fix: prepare the data again (`linearsr run RECIPE --from prepare`)"
        raise StageError(f"{url}: got {len(result.problems)} problems in {counted}; expected none; {fix}")
    typer.echo(f"{storage.shown(url)}: {counted}, all as the manifest says (digest {manifest.digest[:12]})")


def show(
    url: Annotated[str, typer.Argument(metavar="URL", help="Folder of prepared data, of tars, or one .tar.", show_default=False)],
    split: Annotated[str, typer.Option(metavar="NAME", help="Whose pictures the sheet shows.")] = "train",
    sheet: Annotated[Path, typer.Option(metavar="OUT.png", help="Where the contact sheet goes.")] = Path("contact-sheet.png"),
    limit: Annotated[int, typer.Option(min=1, help="Pictures on the sheet at most, from all shards.")] = 24,
    verbose: Verbose = False,
) -> None:
    """Print what a data set holds, and write a contact sheet of some of its pictures; any WebDataset tar will do."""
    from linearsr_platform import storage
    from linearsr_platform.data.manifest import FILE, load_manifest

    tars: Sequence[str] = [url] if url.endswith(".tar") else []
    if not tars and not storage.exists(storage.join(url, FILE)):
        tars = storage.list_files(url, "*.tar")
    if tars:
        _show_tars(tars)
        _write_sheet(tars, sheet, limit)
        return
    manifest = load_manifest(url)
    shards = manifest.shard_urls(url, split)
    _show_manifest(manifest)
    _write_sheet(shards, sheet, limit)


SHARDS: dict[str, Callable[..., None]] = {"verify": verify, "show": show}
"""The verbs of `linearsr shards`."""


def _as_json(result: "Verification", url: str, manifest: "Manifest") -> dict[str, object]:
    problems = [{"where": problem.where, "what": problem.what} for problem in result.problems]
    counts = {"shards": result.shards, "samples": result.samples}
    return {"url": url, "ok": not problems, "digest": manifest.digest, **counts, "problems": problems}


def _show_manifest(manifest: "Manifest") -> None:
    from rich.console import Console
    from rich.table import Column, Table
    from rich.text import Text

    console = Console(highlight=False)
    numbers = [Column(name, justify="right") for name in ("shards", "samples", "size", "smallest", "median", "largest")]
    table = Table("split", *numbers, box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="dim")
    for name, info in manifest.splits.items():
        size = (manifest.sizes or {}).get(name)
        sides = ["", "", ""] if size is None else [f"{one[0]}x{one[1]}" for one in (size.smallest, size.median, size.largest)]
        table.add_row(name, str(len(info.shards)), str(info.samples), _bytes(sum(shard.bytes for shard in info.shards)), *sides)
    console.print(table)
    console.print()
    facts = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for what, value in _facts(manifest).items():
        facts.add_row(Text(what, style="dim"), Text(value))
    console.print(facts)


def _facts(manifest: "Manifest") -> dict[str, str]:
    counts, tags = manifest.counts, manifest.tags or {}
    ranked = sorted(tags, key=lambda tag: (-tags[tag], tag))
    more = f", and {len(ranked) - TAGS_SHOWN} more" if len(ranked) > TAGS_SHOWN else ""
    most = ", ".join(f"{tag} {tags[tag]}" for tag in ranked[:TAGS_SHOWN]) + more
    known = most or f"{len(manifest.vocabulary)} different" if manifest.vocabulary else "none"
    text, latents = manifest.text, manifest.latents
    facts = {
        "found": f"{counts['found']} files, {counts['quarantined']} quarantined, of these {counts.get('duplicates', 0)} duplicates",
        "licences": ", ".join(f"{name or 'not given'} {count}" for name, count in manifest.licences.items()),
        "tags of train": known,
        "embeddings": "none" if text is None else f"width {text.width}, encoder {text.digest[:12]} ({text.encoder.folder})",
        "latents": "none" if latents is None else f"{latents.channels} channels, 1/{latents.factor} a side, codec {latents.codec[:12]}",
        "digest": manifest.digest,
    }
    for position, one in enumerate(manifest.quarantined[:REASONS_SHOWN]):
        facts[f"quarantined {position + 1}"] = f"{one.file}: {one.reason}"
    if len(manifest.quarantined) > REASONS_SHOWN:
        facts["..."] = f"{len(manifest.quarantined) - REASONS_SHOWN} more in manifest.json"
    return facts


def _show_tars(tars: "Sequence[str]") -> None:
    """Print how many members of each kind tars without a manifest hold."""
    from rich.console import Console
    from rich.table import Column, Table

    from linearsr_platform.data.tars import index_tar

    kinds: dict[str, list[int]] = {}
    keys = 0
    for tar in tars:
        members = index_tar(tar, lambda name: False)
        keys += len({member.key for member in members})
        for member in members:
            kinds.setdefault(member.name[len(member.key) + 1 :], []).append(member.size)
    table = Table("member", Column("files", justify="right"), Column("size", justify="right"), box=None, pad_edge=False, header_style="dim")
    for kind, sizes in sorted(kinds.items(), key=lambda item: -len(item[1])):
        table.add_row(f"KEY.{kind}", str(len(sizes)), _bytes(sum(sizes)))
    console = Console(highlight=False)
    console.print(table)
    console.print(f"\n{keys} samples in {len(tars)} tars, no manifest")


def _write_sheet(shards: "Sequence[str]", target: Path, limit: int) -> None:
    """Write a sheet of the first pictures of each shard, as many of each."""
    from linearsr_platform import storage
    from linearsr_platform.data.picture_shards import read_members
    from linearsr_platform.data.sheet import contact_sheet

    pictures: list[tuple[str, Pixels]] = []
    for position, shard in enumerate(shards):
        left = limit - len(pictures)
        share = ceil(left / (len(shards) - position))
        shown = (picture for key, members in read_members(shard) if (picture := _picture(key, members)) is not None)
        pictures += islice(shown, min(share, left))
    if not pictures:
        raise UserError(f"{shards[0]}: got no picture that can be shown; expected png, jpg or webp members")
    image = contact_sheet(pictures)
    with storage.atomic_file(str(target)) as path:
        image.save(path, "PNG")
    typer.echo(f"{len(pictures)} pictures on {target}")


def _picture(key: str, members: "Mapping[str, bytes]") -> "tuple[str, Pixels] | None":
    """Return name and pixels of a sample; None if it has no picture that can be decoded."""
    from linearsr_platform.data.images import SUFFIXES, BadImageError, decode_image
    from linearsr_platform.data.members import read_object

    content = next((content for name, content in members.items() if f".{name}" in SUFFIXES), None)
    if content is None:
        return None
    try:
        pixels = decode_image(content).pixels
        said = read_object(members["json"]) if "json" in members else {}
    except (BadImageError, ValueError):
        return None
    box = said.get("box")
    if isinstance(box, list) and len(box) == 4 and all(isinstance(side, int) for side in box):
        pixels = pixels[box[1] : box[3], box[0] : box[2]]
    return (key, pixels) if pixels.size else None


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
