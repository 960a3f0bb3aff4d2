"""`linearsr tag`: what photographs show, written beside them in the files that `prepare` reads."""

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import has_magic
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from linearsr_platform import storage
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
    """How `--lr` degrades a photograph before it is tagged: as the recipe's evaluation does."""

    scale: int
    degradation: "Degradation"
    seed: int
    sources: tuple[tuple[Path, bool], ...] = ()
    """Folders of the recipe's sources, and whether their JPEGs are halved."""

    def halves(self, path: Path) -> bool:
        """Tell whether a JPEG is halved: as all sources say that it is in; yes if it is in none."""
        return all(halved for folder, halved in self.sources if path.resolve().is_relative_to(folder))


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
            help="Degrade each photograph first and write its tags as `tags_lr`: by one draw, which is the evaluation's of a held-out "
            "one; training and validation draw anew.",
        ),
    ] = False,
    recipe: Annotated[
        str | None, typer.Option(metavar="RECIPE", help="Recipe whose scale, degradation and evaluate.seed --lr takes.", show_default=False)
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
    _show(folder, results, key, len(wanted) - len(refused))
    if refused:
        raise StageError(f"{len(refused)} of {len(sides)} photographs cannot be read: {', '.join(refused)}; the others are tagged")


def _sides(folder: Path) -> dict[Path, dict[str, object]]:
    """Return what is said beside each photograph, every broken file at once as one error."""
    from fsspec.implementations.local import LocalFileSystem

    from linearsr_platform.data.images import SUFFIXES
    from linearsr_platform.data.labels import side_fields
    from linearsr_platform.local import files_below

    if not folder.is_dir():
        raise UserError(f"{folder}: got no such folder; expected one with photographs")
    # A link to nothing is told with what cannot be read; a folder or a device is no photograph, whatever its name.
    # Those behind links to folders too, as `prepare` takes them.
    found = (folder / os.path.relpath(file, folder) for file in files_below(LocalFileSystem(), os.path.abspath(folder)))
    files = sorted(path for path in found if path.suffix.lower() in SUFFIXES and (path.is_file() or not path.exists()))
    if not files:
        raise UserError(f"{folder}: got a folder without images; expected files that end in {', '.join(SUFFIXES)}")
    sides, problems = {}, []
    owners: dict[Path, Path] = {}
    for path in files:
        owner = owners.setdefault(side := path.with_suffix(".json"), path)
        if owner != path:
            problems.append(
                f"{side}: got {owner.name} and {path.name}; expected one photograph for each such file; fix: rename one of them"
            )
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
    from linearsr_platform.recipe.schema import EvaluateSection

    if recipe is None:
        return Reduction(ModelConfig().scale, DegradationConfig(), EvaluateSection().seed)
    settings = load_recipe(recipe).recipe
    local = [source for source in settings.data.sources.values() if storage.is_local(source.url)]
    sources = tuple((_folder_of(storage.absolute(source.url)), source.halve_jpeg) for source in local)
    return Reduction(settings.model.scale, settings.degradation, settings.evaluate.seed, sources)


def _folder_of(path: str) -> Path:
    """Return the folder that holds whatever a source's path or glob names."""
    from linearsr_platform.data.sources import root_of_glob

    return Path(root_of_glob(path) if has_magic(path) else path).resolve()


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
        except OSError as error:
            yield path, f"cannot be read: {error.strerror}"
    for photo, tags in zip(photos, model.tag(photos) if photos else [], strict=True):
        assert photo.path is not None  # noqa: S101 (each was read from a file)
        yield photo.path, tags


def _read(path: Path, reduction: Reduction | None) -> "Photo":
    """Read a photograph as `prepare` does; with a reduction, return its degraded version, the same at every call."""
    from PIL import Image

    from linearsr.taggers import Photo
    from linearsr_platform.data.images import decode_image

    if reduction is None:
        return Photo(Image.fromarray(decode_image(path.read_bytes()).pixels), path)
    from linearsr_platform.data.degraded import lr_image

    pixels = decode_image(path.read_bytes(), halve_jpeg=reduction.halves(path)).pixels
    _, lr = lr_image(pixels, scale=reduction.scale, degradation=reduction.degradation, seed=reduction.seed, name=path.stem)
    return Photo(Image.fromarray(lr), path)


def _write(path: Path, fields: dict[str, object], key: str, tags: "list[Tag]", tagger: str) -> str:
    """Write tags, and who gave them how surely, beside all else that is said; return them as a text for the table."""
    from linearsr_platform.data.labels import write_side_file

    told = fields.get("tagged")
    mark = {"by": tagger, "confidence": [round(tag.confidence, 4) for tag in tags]}
    tagged = {**(told if isinstance(told, dict) else {}), key: mark}
    write_side_file(path, {**fields, key: [tag.name for tag in tags], "tagged": tagged})
    return ", ".join(f"{tag.name} {tag.confidence:.2f}" for tag in tags) or "none sure enough"


def _show(folder: Path, results: dict[Path, str], key: str, written: int) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table("photograph", key, caption=f"{written} of {len(results)} photographs")
    for path, result in results.items():
        # As text: brackets in a name are no markup.
        table.add_row(Text(str(path.relative_to(folder))), Text(result))
    Console().print(table)
