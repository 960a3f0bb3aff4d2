"""`linearsr import-sana` and `linearsr export`: networks from diffusers' SANA folders, and into them."""

from pathlib import Path
from typing import Annotated

import typer

from linearsr_platform.cli.options import Verbose
from linearsr_platform.errors import UserError

PIXELS_PER_LATENT = 32
"""Of SANA's codec along one side. Source: method.md 1.7."""


def import_sana(
    source: Annotated[Path, typer.Argument(metavar="PATH", help="Diffusers folder of a SANA transformer or pipeline.", show_default=False)],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="New folder to write.", show_default=False)],
    scale: Annotated[int, typer.Option(help="Upsampling factor that the LR stem is built for: 1, 2, 4 or 8.")] = 4,
    stem_width: Annotated[int, typer.Option(min=1, help="Channels of the LR stem's output.")] = 32,
    seed: Annotated[
        int, typer.Option(help="Seed of the LR stem's weights; the pretrained network does not see it until it is trained.")
    ] = 0,
    verbose: Verbose = False,
) -> None:
    """Turn a diffusers SANA folder into a network to train from."""
    if scale not in (1, 2, 4, 8):
        raise UserError(f"--scale: got {scale}; expected 1, 2, 4 or 8")
    from linearsr.sana import NETWORK_JSON, NETWORK_WEIGHTS, SanaError
    from linearsr.sana import import_sana as convert

    try:
        model = convert(source, target, stem_width=stem_width, lr_pixels_per_token=PIXELS_PER_LATENT // scale, seed=seed)
    except SanaError as error:
        raise UserError(str(error)) from error
    shape = model.shape
    parameters = sum(value.numel() for value in model.weights.values())
    typer.echo(f"{target}: {shape.num_blocks} blocks, {shape.width} wide, {parameters / 1e6:.2f}M parameters with the LR stem")
    typer.echo(f"  {NETWORK_WEIGHTS}  weights: `--set model.init_weights={target / NETWORK_WEIGHTS}` starts pre-training from them")
    typer.echo(f"  {NETWORK_JSON}  the shape: `backbone` goes into a recipe's model.backbone; it reads prompts, so it needs model.text")


def export(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder of import-sana or of a bundle, or models:/NAME@ALIAS.", show_default=False)
    ],
    target: Annotated[Path, typer.Argument(metavar="OUT", help="New folder to write.", show_default=False)],
    format: Annotated[str, typer.Option(help="`diffusers` writes a folder for SanaTransformer2DModel.")] = "diffusers",  # noqa: A002
    expert: Annotated[int, typer.Option(min=1, help="Which expert of a bundle, 1 for the noisiest.")] = 1,
    storage: Annotated[str, typer.Option(metavar="URL", help="Storage root whose MLflow store is asked for models:/...")] = "runs",
    tracking_uri: Annotated[
        str | None, typer.Option(metavar="URI", help="MLflow to ask instead; default: the store under --storage.", show_default=False)
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Write one network as another library loads it."""
    if format != "diffusers":
        raise UserError(f"--format: got {format!r}; expected diffusers")
    from linearsr.sana import EXTRA_WEIGHTS, NETWORK_JSON, SanaError, SanaModel, export_diffusers, read_expert, read_network
    from linearsr_platform.cli.upscale import load

    try:
        if (Path(model) / NETWORK_JSON).is_file():
            network = read_network(Path(model))
        else:
            bundle = load(model, storage, tracking_uri)
            if expert > len(bundle.experts):
                raise UserError(f"--expert: got {expert}; expected 1 to {len(bundle.experts)}")
            weights = read_expert(bundle.experts[expert - 1])
            network = SanaModel(bundle.config.backbone, bundle.config.codec.latent_channels, weights, {})
        rest = export_diffusers(network, target)
    except SanaError as error:
        raise UserError(str(error)) from error
    typer.echo(f"{target}: written for diffusers' SanaTransformer2DModel.from_pretrained")
    if rest:
        parts = ", ".join(sorted({name.split(".")[0] for name in rest}))
        typer.echo(f"  {EXTRA_WEIGHTS}  {len(rest)} tensors that diffusers has no place for: {parts}")
