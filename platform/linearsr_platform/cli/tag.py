"""`linearsr tag`: what photographs show, written beside them in the files that `prepare` reads."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from linearsr_platform.cli.options import Verbose
from linearsr_platform.errors import StageError, UserError

if TYPE_CHECKING:
    from linearsr.degradation_config import Degradation
    from linearsr.taggers import Photo, Tag, Tagger

BATCH = 8
"""Photographs tagged in one forward."""
KEPT = "kept what was there"


@dataclass(frozen=True, slots=True)
class Reduction:
    """How `--lr` degrades a photograph before it is tagged."""

    scale: int
    degradation: "Degradation"


def tag(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Photographs; folders below it too.", show_default=False)],
    tagger: Annotated[str, typer.Option(help="imagenet, clip, ram, dape or side-file.")] = "imagenet",
    weights: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder of weights, for clip, ram and dape.", show_default=False)
    ] = None,
    vocabulary: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Words to choose from, one a line, for clip.", show_default=False)
    ] = None,
    threshold: Annotated[
        float | None, typer.Option(min=0, max=1, help="Least confidence; default: the tagger's own.", show_default=False)
    ] = None,
    top_k: Annotated[int, typer.Option(min=1, help="Most tags of a photograph.")] = 5,
    lr: Annotated[
        bool,
        typer.Option(
            "--lr",
            help="Degrade each photograph first and write its tags as `tags_lr`: one draw by the file's name, not those that training, "
            "validation and evaluation degrade it by.",
        ),
    ] = False,
    recipe: Annotated[
        str | None, typer.Option(metavar="RECIPE", help="Recipe whose scale and degradation --lr takes.", show_default=False)
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace tags that are there already, also a person's.")] = False,
    verbose: Verbose = False,
) -> None:
    """Write tags into `NAME.json` beside each photograph of a folder; what is said there already stays."""
    key = "tags_lr" if lr else "tags"
    if recipe is not None and not lr:
        raise UserError("--recipe: got one without --lr; expected both, or neither")
    sides = _sides(folder)
    wanted = [path for path, fields in sides.items() if overwrite or key not in fields]
    reduction = _reduction(recipe) if lr else None
    words = _words(vocabulary)
    from linearsr_platform.cli.environment import quiet_libraries

    quiet_libraries(verbose=verbose)
    from linearsr.taggers import TaggerConfig, TaggerError, make_tagger
    from linearsr_platform.cli.progress import make_display

    config = TaggerConfig(threshold=threshold, top_k=top_k, weights=None if weights is None else str(weights), vocabulary=words)
    results = dict.fromkeys(sides, KEPT)
    refused: list[str] = []
    try:
        model = make_tagger(tagger, config)
        with make_display() as display:
            display.task("tag", len(wanted), "photographs")
            for start in range(0, len(wanted), BATCH):
                for path, tags in _tag(model, wanted[start : start + BATCH], reduction):
                    results[path] = _write(path, sides[path], key, tags, tagger) if isinstance(tags, list) else tags
                    refused += [] if isinstance(tags, list) else [path.name]
                display.update("tag", min(start + BATCH, len(wanted)), len(wanted))
    except TaggerError as error:
        raise UserError(str(error)) from error
    _show(folder, results, key)
    if refused:
        raise StageError(f"{len(refused)} of {len(sides)} photographs cannot be read: {', '.join(refused)}; the others are tagged")


def _sides(folder: Path) -> dict[Path, dict[str, object]]:
    """Return what is said beside each photograph, every broken file at once as one error."""
    from linearsr_platform.data.images import SUFFIXES
    from linearsr_platform.data.labels import side_fields

    if not folder.is_dir():
        raise UserError(f"{folder}: got no such folder; expected one with photographs")
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES)
    if not files:
        raise UserError(f"{folder}: got a folder without images; expected files that end in {', '.join(SUFFIXES)}")
    sides, problems = {}, []
    for path in files:
        try:
            sides[path] = side_fields(path)
        except ValueError as error:
            problems.append(f"{path}: the label beside it cannot be read: {error}")
    if problems:
        raise UserError("\n".join(problems))
    return sides


def _reduction(recipe: str | None) -> Reduction:
    from linearsr.config import DegradationConfig, ModelConfig
    from linearsr_platform.recipe.load import load_recipe

    if recipe is None:
        return Reduction(ModelConfig().scale, DegradationConfig())
    loaded = load_recipe(recipe).recipe
    return Reduction(loaded.model.scale, loaded.degradation)


def _words(vocabulary: Path | None) -> tuple[str, ...]:
    if vocabulary is None:
        return ()
    try:
        return tuple(filter(None, map(str.strip, vocabulary.read_text(encoding="utf-8-sig").splitlines())))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--vocabulary: got {vocabulary}, which cannot be read: {error}; expected one word or phrase a line") from error


def _tag(model: "Tagger", paths: Sequence[Path], reduction: Reduction | None) -> Iterator[tuple[Path, "list[Tag] | str"]]:
    """Yield the tags of each photograph, or why it cannot be read."""
    from linearsr_platform.data.images import BadImageError

    photos: list[Photo] = []
    for path in paths:
        try:
            photos.append(_read(path, reduction))
        except BadImageError as error:
            yield path, str(error)
    for photo, tags in zip(photos, model.tag(photos) if photos else [], strict=True):
        assert photo.path is not None  # noqa: S101 (each was read from a file)
        yield photo.path, tags


def _read(path: Path, reduction: Reduction | None) -> "Photo":
    """Read a photograph as `prepare` does; with a reduction, return its degraded version, the same at every call."""
    import numpy as np
    from PIL import Image

    from linearsr.degradation import degrade
    from linearsr.taggers import Photo
    from linearsr_platform.data.images import BadImageError, decode_image

    pixels = decode_image(path.read_bytes(), halve_jpeg=reduction is not None).pixels
    if reduction is not None:
        height, width = (side // reduction.scale * reduction.scale for side in pixels.shape[:2])
        if not height or not width:
            raise BadImageError(f"{pixels.shape[1]}x{pixels.shape[0]} px is too small to reduce {reduction.scale} times")
        seed = int.from_bytes(hashlib.sha256(path.name.encode()).digest()[:8], "big")
        pixels = degrade(np.ascontiguousarray(pixels[:height, :width]), reduction.scale, reduction.degradation, np.random.default_rng(seed))
    return Photo(Image.fromarray(pixels), path)


def _write(path: Path, fields: dict[str, object], key: str, tags: "list[Tag]", tagger: str) -> str:
    """Write tags, and who gave them how surely, beside all else that is said; return them as a text for the table."""
    from linearsr_platform.data.labels import write_side_file

    told = fields.get("tagged")
    mark = {"by": tagger, "confidence": [round(tag.confidence, 4) for tag in tags]}
    tagged = {**(told if isinstance(told, dict) else {}), key: mark}
    write_side_file(path, {**fields, key: [tag.name for tag in tags], "tagged": tagged})
    return ", ".join(f"{tag.name} {tag.confidence:.2f}" for tag in tags) or "none sure enough"


def _show(folder: Path, results: dict[Path, str], key: str) -> None:
    from rich.console import Console
    from rich.table import Table

    written = sum(result != KEPT for result in results.values())
    table = Table("photograph", key, caption=f"{written} of {len(results)} photographs")
    for path, result in results.items():
        table.add_row(str(path.relative_to(folder)), result)
    Console().print(table)
