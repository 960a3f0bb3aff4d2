"""A picture with everything in its file to a larger one: size, colours, alpha, notes. Built on `linearsr.upscaler`."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from PIL.Image import Resampling

from linearsr.colour import ColourFix
from linearsr.memory import MemoryModel, MemoryPlan
from linearsr.pictures import Picture, resample
from linearsr.residency import Residency
from linearsr.sizing import SizePlan, Wanted, plan_size
from linearsr.upscaler import Estimate, Upscaler


@dataclass(frozen=True, kw_only=True)
class Enlargement:
    """What is asked of every picture."""

    wanted: Wanted = field(default_factory=Wanted)
    tags: Sequence[str] = ()
    seed: int = 0
    steps: int | None = None
    """Sampler steps; None takes the model's own."""
    estimate: Estimate = "routed"
    colour_fix: ColourFix = "none"


def plan_enlargement(
    size_px: tuple[int, int],
    request: Enlargement,
    memory: MemoryModel,
    budget_bytes: int,
    *,
    residency: Residency | None = None,
    tile: int | None = None,
) -> tuple[SizePlan, MemoryPlan]:
    """Return the sizes and the cut for a picture of (width, height), without touching a network.

    Raises:
        PictureTooLarge: if it does not fit into the budget even in tiles.
    """
    sizes = plan_size(size_px, request.wanted, memory.config.scale)
    width, height = sizes.network_input
    size = (height, width)
    return sizes, memory.plan(size, budget_bytes, residency=residency, tile=tile, colour_fix=request.colour_fix)


def enlarge(upscaler: Upscaler, picture: Picture, request: Enlargement, *, tile: int | None = None) -> Picture:
    """Enlarge colours by the network and alpha by Lanczos; the rest of the picture stays.

    Args:
        upscaler: a loaded model; its stopwatch is told of the resampling too.
        picture: what to enlarge.
        request: how.
        tile: tokens along a tile's side; None runs the network on the whole picture.
    """
    sizes = plan_size(picture.size, request.wanted, upscaler.bundle.config.scale)
    watch = upscaler.stopwatch
    with watch.section("resize"):
        entered = resample(picture.colour, sizes.network_input, Resampling.BICUBIC)
        lr = torch.from_numpy(entered.copy()).permute(2, 0, 1)[None].contiguous()
    restored = upscaler.upscale_tensor(
        lr,
        tags=request.tags,
        seed=request.seed,
        steps=request.steps,
        estimate=request.estimate,
        colour_fix=request.colour_fix,
        tile=tile,
    )
    with watch.section("resize"):
        colour = resample(restored[0].permute(1, 2, 0).numpy(), sizes.output, Resampling.LANCZOS)
        alpha = None if picture.alpha is None else resample(picture.alpha, sizes.output, Resampling.LANCZOS)
    notes = (*picture.notes, sizes.note) if sizes.note else picture.notes
    return replace(picture, colour=colour, alpha=alpha, notes=notes)
