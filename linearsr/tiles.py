"""Overlapping tiles of the latent grid, for pictures whose forward does not fit into memory at once.

The sampler keeps one state for the whole picture. At each step the network estimates the clean latent tile by tile, and the
estimates are blended by feathered weights (MultiDiffusion, arXiv 2302.08113), so tiles never drift apart. Noise is drawn for the
whole picture: where a tile begins changes nothing about it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain, product
from math import ceil

import torch
from torch import Tensor

Window = tuple[slice, slice]
"""Rows and columns of the latent grid that a tile covers."""


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a latent grid is cut; one tile over everything is the plain forward."""

    grid: tuple[int, int]
    """Tokens of the picture, (H, W)."""
    side: tuple[int, int]
    """Tokens of a tile, at most those of the grid."""
    overlap: int
    """Tokens that neighbours share at least, along each axis that is cut."""

    def __post_init__(self) -> None:
        """Check that tiles advance and fit."""
        fits = all(1 <= side <= whole for side, whole in zip(self.side, self.grid, strict=True))
        advances = all(self.overlap < side or side == whole for side, whole in zip(self.side, self.grid, strict=True))
        if not (fits and advances and self.overlap >= 0):
            rule = "1 <= side <= grid, and 0 <= overlap < side where the grid is cut"
            raise ValueError(f"tiling: got side {self.side}, overlap {self.overlap} on grid {self.grid}; expected {rule}")

    @property
    def starts(self) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """First row of each row of tiles, first column of each column: evenly spread, so that all tiles are of one size."""
        rows, columns = (_starts(whole, side, self.overlap) for whole, side in zip(self.grid, self.side, strict=True))
        return rows, columns

    @property
    def num_tiles(self) -> int:
        """Tiles altogether."""
        rows, columns = self.starts
        return len(rows) * len(columns)

    def windows(self) -> Iterator[Window]:
        """Yield each tile's rows and columns."""
        for top, left in product(*self.starts):
            yield slice(top, top + self.side[0]), slice(left, left + self.side[1])


def whole(grid: tuple[int, int]) -> Tiling:
    """Return the one tile that covers the grid."""
    return Tiling(grid, grid, 0)


def cut(grid: tuple[int, int], side: int, overlap: int | None = None) -> Tiling:
    """Return tiles of `side` x `side` tokens, or less where the grid has less; default overlap: a quarter of the side."""
    chosen = max(1, side // 4) if overlap is None else overlap
    return Tiling(grid, (min(side, grid[0]), min(side, grid[1])), chosen)


def feather(tiling: Tiling, window: Window, device: torch.device | None = None) -> Tensor:
    """Return a tile's weights before normalisation, (h, w) float32 in (0, 1], on a device, or else the CPU.

    Along each axis they rise linearly over the tokens shared with the neighbour, and stay 1 where there is none.
    """
    axes = []
    for starts, side, place in zip(tiling.starts, tiling.side, window, strict=True):
        position = torch.arange(side, dtype=torch.float32, device=device) + 0.5
        index = starts.index(place.start)
        ramp = torch.ones(side, device=device)
        if index > 0:
            ramp = torch.minimum(ramp, position / (starts[index - 1] + side - starts[index]))
        if index < len(starts) - 1:
            ramp = torch.minimum(ramp, (side - position) / (starts[index] + side - starts[index + 1]))
        axes.append(ramp)
    return axes[0][:, None] * axes[1]


def blend(tiling: Tiling, estimate: Callable[[Window], Tensor]) -> Tensor:
    """Ask for the estimate of every tile and blend them.

    Args:
        tiling: the cut; with a single tile its estimate is returned as it is.
        estimate: makes (B, c, h, w) float32 of a tile's rows and columns.
    Returns:
        (B, c, H, W) float32.
    """
    if tiling.num_tiles == 1:
        return estimate(next(tiling.windows()))
    parts = ((window, estimate(window)) for window in tiling.windows())
    first, part = next(parts)
    blended, total = part.new_zeros(*part.shape[:2], *tiling.grid), part.new_zeros(tiling.grid)
    for place, one in chain([(first, part)], parts):
        # Made where it is needed: a copy to a GPU would make the host wait at every tile.
        weight = feather(tiling, place, one.device)
        total[place] += weight
        blended[..., *place] += one * weight
    return blended.div_(total)


def _starts(whole_side: int, side: int, overlap: int) -> tuple[int, ...]:
    """Spread tiles evenly along one axis, the last one flush with the end."""
    if side >= whole_side:
        return (0,)
    count = ceil((whole_side - overlap) / (side - overlap))
    return tuple(round(index * (whole_side - side) / (count - 1)) for index in range(count))
