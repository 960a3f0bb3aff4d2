"""Two things that metrics of whole pictures hardly see and people see at once: seams between tiles, and colours that moved.

Shape letters: C channels, H and W pixels of a picture, h and w of its LR picture.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import avg_pool2d

from linearsr.tiles import Tiling, cut

Edges = tuple[tuple[int, ...], tuple[int, ...]]
"""Rows and columns of pixels with which something new begins; never 0."""

ROUNDING = (1 / 255) ** 2 / 6
"""Mean square of the difference between two neighbours that rounding to 8 bit leaves; keeps ratios of flat pictures finite."""
LOW_PX = 8
"""Side of the LR blocks whose mean colours are compared: below it is texture, which a model may invent, above it colour."""
_D65 = (0.95047, 1.0, 1.08883)
_TO_XYZ = ((0.4124564, 0.3575761, 0.1804375), (0.2126729, 0.7151522, 0.0721750), (0.0193339, 0.1191920, 0.9503041))


def evaluation_tiles(grid: tuple[int, int]) -> Tiling:
    """Return the cut that evaluation looks for seams on: tiles of half the shorter side of the token grid, a quarter shared.

    A tile that follows the picture cuts every test picture, also those that are smaller than a tile that memory would ask for.
    """
    return cut(grid, max(2, -(-min(grid) // 2)))


def tile_edges(tiling: Tiling, token_px: int, size_px: tuple[int, int]) -> Edges:
    """Return where tiles begin and end inside a picture.

    Args:
        tiling: the cut of the token grid.
        token_px: pixels along a token's side.
        size_px: (height, width) of the picture, which may end before the grid does.
    """
    rows, columns = (
        tuple(sorted({edge * token_px for start in starts for edge in (start, start + side)} - {0}))
        for starts, side in zip(tiling.starts, tiling.side, strict=True)
    )
    return tuple(row for row in rows if row < size_px[0]), tuple(column for column in columns if column < size_px[1])


def grid_edges(period_px: int, size_px: tuple[int, int]) -> Edges:
    """Return the edges of a regular grid inside a picture of (height, width)."""
    rows, columns = (tuple(range(period_px, side, period_px)) for side in size_px)
    return rows, columns


def seam(picture: Tensor, edges: Edges, control: Tensor | None = None) -> float:
    """Return how much more gradient there is across edges than elsewhere: 1 without seams, higher with.

    Energies are mean squared differences between neighbouring pixels. What the picture shows has edges too, some of them where tiles meet
    by chance, so the ratio is divided by that of a control: the same picture made whole.

    Args:
        picture: (C, H, W) in [0, 1].
        edges: where seams would be; without any the value is 1.
        control: (C, H, W), a picture of the same without seams; None takes the ratio as it is.
    Source: the idea is that of blockiness measures, such as Wang, Bovik and Evans 2000; dividing by the whole picture is ours.
    """
    if not edges[0] and not edges[1]:
        return 1.0
    ratio = _edge_ratio(picture, edges)
    return ratio if control is None else ratio / _edge_ratio(control, edges)


def colour_shift(picture: Tensor, lr: Tensor) -> float:
    """Return the mean distance in CIELAB (CIE76 Delta E) between the low-frequency colours of a picture and of its LR picture.

    Both are averaged in sRGB over blocks of `LOW_PX` LR pixels. 0 is no shift; about 2 can be seen side by side.

    Args:
        picture: (3, H, W) sRGB in [0, 1].
        lr: (3, h, w), H and W a multiple `scale` of h and w.

    Raises:
        ValueError: if they are not.
    """
    height, width = lr.shape[1:]
    scale = picture.shape[1] // height
    if scale < 1 or picture.shape[1:] != (height * scale, width * scale):
        raise ValueError(f"colour shift: got {tuple(picture.shape)} and LR {tuple(lr.shape)}; expected sides of a whole ratio")
    difference = _lab(_blocks(picture, LOW_PX * scale)) - _lab(_blocks(lr, LOW_PX))
    return float(difference.square().sum(dim=0).sqrt().mean())


def _edge_ratio(picture: Tensor, edges: Edges) -> float:
    on, off = [], []
    for axis, places in ((1, edges[0]), (2, edges[1])):
        steps = picture.double().diff(dim=axis).square().mean(dim=(0, 3 - axis))
        at_edge = torch.zeros(len(steps), dtype=torch.bool)
        at_edge[[place - 1 for place in places]] = True
        on.append(steps[at_edge])
        off.append(steps[~at_edge])
    return float((_mean(on) + ROUNDING) / (_mean(off) + ROUNDING))


def _mean(parts: Sequence[Tensor]) -> Tensor:
    """Return the mean over all numbers; 0 of none."""
    every = torch.cat(list(parts))
    return every.mean() if len(every) else every.sum()


def _blocks(picture: Tensor, side_px: int) -> Tensor:
    """Average (3, H, W) over blocks, those at the right and bottom edge over what there is of them."""
    return avg_pool2d(picture.double()[None], side_px, ceil_mode=True)[0]


def _lab(rgb: Tensor) -> Tensor:
    """Convert sRGB (3, ...) in [0, 1] to CIELAB under D65."""
    light = torch.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055).clamp(min=0) ** 2.4)
    xyz = torch.tensordot(rgb.new_tensor(_TO_XYZ), light, dims=1) / rgb.new_tensor(_D65).view(3, *[1] * (rgb.dim() - 1))
    bent = torch.where(xyz > (6 / 29) ** 3, xyz.clamp(min=1e-12) ** (1 / 3), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return torch.stack([116 * bent[1] - 16, 500 * (bent[0] - bent[1]), 200 * (bent[1] - bent[2])])
