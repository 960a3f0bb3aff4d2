"""`linearsr upscale`: image files to larger image files, with a bundle or a registered model."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from linearsr_platform.cli.options import Verbose
from linearsr_platform.cli.store import existing_store
from linearsr_platform.errors import UserError

if TYPE_CHECKING:
    from PIL import Image

    from linearsr.bundle import Bundle
    from linearsr.upscaler import Upscaler

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
JPEG_QUALITY = 95


def upscale(
    source: Annotated[Path, typer.Argument(metavar="IN", help="An image (PNG, JPEG, WebP) or a folder of them.", show_default=False)],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="File or folder to write; its suffix sets the format.", show_default=False)],
    model: Annotated[
        str, typer.Option(metavar="MODEL", help="Folder of a bundle, models:/NAME@ALIAS or models:/NAME/VERSION.", show_default=False)
    ],
    storage: Annotated[str, typer.Option(metavar="URL", help="Storage root whose MLflow store is asked for models:/...")] = "runs",
    tracking_uri: Annotated[
        str | None, typer.Option(metavar="URI", help="MLflow to ask instead; default: the store under --storage.", show_default=False)
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Sampler steps; default: the model's own.", show_default=False)] = None,
    estimate: Annotated[str, typer.Option(help="`routed` samples through all experts, `one_step` runs the network once.")] = "routed",
    tags: Annotated[str, typer.Option(help="Comma-separated words for what is in the picture.")] = "",
    text_encoder: Annotated[
        str | None, typer.Option(metavar="DIR", help="Text encoder of a model that reads tags; default: where it was.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the initial noise; the same seed gives the same picture.")] = 0,
    verbose: Verbose = False,
) -> None:
    """Enlarge an image, or every image of a folder."""
    if estimate not in ("routed", "one_step"):
        raise UserError(f"--estimate: got {estimate!r}; expected routed or one_step")
    pairs = plan(source, target)
    from linearsr_platform.cli.environment import quiet_libraries, tell_warnings

    quiet_libraries(verbose=verbose)
    from linearsr.schedule import UnvisitedExpertWarning

    tell_warnings(UnvisitedExpertWarning)
    from linearsr.upscaler import Upscaler
    from linearsr_platform.cli.progress import make_display

    upscaler = Upscaler(load(model, storage, tracking_uri, text_encoder))
    words = [word.strip() for word in tags.split(",") if word.strip()]
    check_tags(upscaler, words)
    with make_display() as display:
        display.task("upscale", len(pairs), "images")
        for done, (read_from, write_to) in enumerate(pairs, start=1):
            picture = upscaler.upscale(open_image(read_from), tags=words, seed=seed, steps=steps, estimate=estimate)  # type: ignore[arg-type]
            save_image(picture, write_to)
            display.update("upscale", done, len(pairs))
            display.message(f"{write_to}  {picture.width} x {picture.height}")


def plan(source: Path, target: Path) -> list[tuple[Path, Path]]:
    """Return which file becomes which, with every problem found before anything is enlarged.

    Raises:
        UserError: if there is nothing to read, or a target's format cannot be written.
    """
    if source.is_dir():
        files = sorted(path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES)
        if not files:
            raise UserError(f"{source}: got a folder without images; expected files that end in {', '.join(SUFFIXES)}")
        if target.is_file():
            raise UserError(f"{target}: got a file; expected a folder, because {source} is one")
        return [(path, target / path.relative_to(source)) for path in files]
    if not source.is_file():
        raise UserError(f"{source}: no such file or folder")
    if target.is_dir():
        target = target / source.name
    if target.suffix.lower() not in SUFFIXES:
        raise UserError(f"{target}: got suffix {target.suffix!r}; expected one of {', '.join(SUFFIXES)}")
    return [(source, target)]


def load(model: str, storage_root: str, tracking_uri: str | None, text_encoder: str | None = None) -> "Bundle":
    """Return the bundle that `model` names, checked against its hashes, with its text encoder where `text_encoder` says."""
    from linearsr.bundle import BundleError, load_bundle, with_text_encoder
    from linearsr_platform.registry.models import resolve

    folder = resolve(model, lambda: existing_store(storage_root, tracking_uri))
    try:
        bundle = load_bundle(folder)
        return bundle if text_encoder is None else with_text_encoder(bundle, text_encoder)
    except BundleError as error:
        raise UserError(str(error)) from error


def check_tags(upscaler: "Upscaler", words: list[str]) -> None:
    """Refuse tags that the model cannot read, before anything is enlarged."""
    from linearsr.text import TextEncoderError

    try:
        upscaler.reader.read(words)
    except TextEncoderError as error:
        raise UserError(str(error)) from error


def open_image(path: Path) -> "Image.Image":
    """Read an image as RGB, upright, as training images are read."""
    from PIL import Image

    from linearsr_platform.data.images import BadImageError, decode_image

    try:
        return Image.fromarray(decode_image(path.read_bytes()).pixels)
    except BadImageError as error:
        raise UserError(f"{path}: {error}; expected a readable image") from error


def save_image(picture: "Image.Image", path: Path) -> None:
    """Write an image whole or not at all, in the format its suffix names."""
    from linearsr_platform.storage import atomic_file

    with atomic_file(str(path)) as temporary:
        # PNG has no quality and ignores it.
        picture.save(temporary, quality=JPEG_QUALITY)
