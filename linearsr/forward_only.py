"""Attention and Mix-FFN of a block on a CPU without a gradient: some tokens at a time go through the projections and all between.

Then nothing of the hidden width, and no queries, keys or values, are ever in memory for all tokens, and the little that is worked on stays
in the cache. Results are those of the modules; only the order of sums differs.

Shape suffixes: B batch, N tokens = H x W of the latent grid, C width, F hidden channels of Mix-FFN; b samples, r rows and n tokens of those
that are worked on.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from linearsr.bands import largest_piece, pieces
from linearsr.kernels import Kernels
from linearsr.linear import add_products, product, product_dtype, product_into, products_into

aten = torch.ops.aten


def works_forward_only(x: Tensor) -> bool:
    """Say whether these functions may take the place of modules that are called with `x`.

    Not under autocast, which changes the dtype of some products and leaves that of those with an `out`.
    """
    if x.device.type != "cpu" or torch.is_grad_enabled() or torch.compiler.is_compiling():
        return False
    return not torch.is_autocast_enabled("cpu")


def folding_pays(x_BNC: Tensor) -> bool:
    """Say whether `folded_attention` takes fewer products than narrow ones head by head: with many tokens for the channels.

    Not in halves that the processor multiplies itself, which would round the sums over tokens.
    """
    return x_BNC.shape[1] >= x_BNC.shape[2] and product_dtype(x_BNC) in (torch.float32, torch.float64)


def folded_attention(x_BNC: Tensor, qkv: Tensor, out: Tensor, bias: Tensor, head_width: int, eps: float) -> tuple[Tensor, Tensor]:
    """Attend by ReLU linear attention with the projections around it: (B, N, C) -> (B, N, C).

    A head's result is (q / z) K^T V W_o with V = x W_v, and z = q . sum(k). All but q / z is linear, so K^T x, one large product for all
    heads, is enough to know what queries meet, a matrix of C x C. Source: method.md 2.3.

    Args:
        x_BNC: Tokens.
        qkv: Weight of queries, keys and values, (3 C, C).
        out, bias: Of the output projection, (C, C) and (C,).
        head_width: D.
        eps: Added to the normaliser, so a query without a positive key gives 0 and not NaN.

    Returns:
        The result, and the normaliser (B, heads, N, 1) of each query before `eps`.
    """
    x_BNC = x_BNC.contiguous()
    (batch, tokens, width), wide = x_BNC.shape, product_dtype(x_BNC)
    heads = width // head_width
    queries, keys, values = qkv.to(wide).view(3, width, width)
    cuts = list(pieces(batch, tokens, width, 1, width**2))
    state_BCC, total_BC = x_BNC.new_zeros((batch, width, width), dtype=wide), x_BNC.new_zeros((batch, width), dtype=wide)
    for samples, part in cuts:
        x_bnC = x_BNC[samples, part].to(wide)
        key_bnC = product(x_bnC, keys).clamp_min_(0)
        add_products(state_BCC[samples], key_bnC, x_bnC)
        total_BC[samples] += key_bnC.sum(dim=1)
    values_HCD = values.view(heads, head_width, width).transpose(1, 2)
    out_HDC = out.to(wide).view(width, heads, head_width).permute(1, 2, 0)
    folded_BCC = (state_BCC.view(batch, heads, head_width, width) @ values_HCD @ out_HDC).flatten(1, 2)
    own_CH = torch.eye(heads, dtype=wide).repeat_interleave(head_width, dim=0)
    result_BNC = torch.empty_like(x_BNC)
    normaliser_BNH = x_BNC.new_empty((batch, tokens, heads), dtype=wide)
    for samples, part in cuts:
        x_bnC = x_BNC[samples, part].to(wide)
        query_bnC = product(x_bnC, queries).clamp_min_(0)
        normaliser_bnH = normaliser_BNH[samples, part]
        torch.bmm(query_bnC, total_BC[samples, :, None] * own_CH, out=normaliser_bnH)
        query_bnC.view(*normaliser_bnH.shape, head_width).div_((normaliser_bnH + eps)[..., None])
        products_into(result_BNC[samples, part], query_bnC, folded_BCC[samples].transpose(1, 2), bias.to(wide))
    return result_BNC, normaliser_BNH.transpose(1, 2)[..., None]


def mix_ffn(
    x_BNC: Tensor,
    up: tuple[Tensor, Tensor],
    depthwise: tuple[Tensor, Tensor],
    down: Tensor,
    grid: tuple[int, int],
    kernels: Kernels | None = None,
) -> Tensor:
    """Project up, apply SiLU, a depthwise 3x3 convolution and a SiLU gate, and project down: (B, N, C) -> (B, N, C).

    Args:
        x_BNC: Tokens of the (H, W) grid in row-major order.
        up: Weight (2 F, C) and bias (2 F,).
        depthwise: Weight (2 F, 1, 3, 3) and bias (2 F,).
        down: Weight (C, F).
        grid: (H, W).
        kernels: Compute what is between the projections, if they take such values.
    """
    wide = product_dtype(x_BNC)
    weight, bias, kernel, offset, last = (part.to(wide) for part in (*up, *depthwise, down))
    x_BHWC = x_BNC.contiguous().view(x_BNC.shape[0], *grid, x_BNC.shape[2])
    out_BHWC = torch.empty_like(x_BHWC)
    memory = torch.empty(0, dtype=wide)
    between = _Compiled(kernels, kernel, offset) if kernels is not None and kernels.takes(memory) else _Plain(kernel, offset)
    map_brWF2: Tensor | None = None
    for band in _bands(x_BHWC, len(weight)):
        map_brWF2, memory = band.memory(memory, x_BHWC, len(weight), map_brWF2)
        fresh_bRWF2 = map_brWF2[:, band.first : band.first + band.fresh.stop - band.fresh.start]
        between.project(x_BHWC[band.samples, band.fresh], weight, bias, fresh_bRWF2)
        product_into(out_BHWC[band.samples, band.rows], between.gated(map_brWF2, band.halo), last)
    return out_BHWC.flatten(1, 2)


def folded_values(num_tokens: int, width: int) -> int:
    """Return how many values `folded_attention` of one sample has in memory beside its input, result and normaliser."""
    return largest_piece(num_tokens, width, 1, width**2) * width + 3 * width**2


def mix_ffn_values(grid: tuple[int, int], width: int, hidden: int) -> int:
    """Return how many values `mix_ffn` of one sample has in memory beside its input and result, with F `hidden` channels."""
    height, across = grid
    rows = largest_piece(height, across * 2 * hidden, across, 3 * width * hidden)
    halo = 0 if rows == height else 2
    return across * hidden * (2 * (rows + halo) + 3 * rows)


@dataclass(frozen=True, slots=True)
class _Plain:
    """What is between the projections, by torch: rows are kept after SiLU."""

    kernel: Tensor
    offset: Tensor

    def project(self, x_bRWC: Tensor, weight: Tensor, bias: Tensor, out_bRWF2: Tensor) -> None:
        # Rounded as the modules do.
        hidden_bRWF2 = product(x_bRWC.to(weight.dtype), weight, bias).to(x_bRWC.dtype).to(weight.dtype)
        aten.silu.out(hidden_bRWF2, out=out_bRWF2)

    def gated(self, active_brWF2: Tensor, halo: int) -> Tensor:
        planes = F.conv2d(active_brWF2.permute(0, 3, 1, 2), self.kernel, self.offset, padding=(1 - halo, 1), groups=len(self.kernel))
        value_brWF, gate_brWF = planes.permute(0, 2, 3, 1).chunk(2, dim=-1)
        return F.silu(gate_brWF).mul_(value_brWF)


class _Compiled:
    """The same by kernels, which apply SiLU as they read: rows are kept as they come, and SiLU of none, 0, is 0."""

    def __init__(self, kernels: Kernels, kernel: Tensor, offset: Tensor) -> None:
        self.kernels, self.kernel, self.offset = kernels, kernel.float().contiguous(), offset.float().contiguous()

    def project(self, x_bRWC: Tensor, weight: Tensor, bias: Tensor, out_bRWF2: Tensor) -> None:
        product_into(out_bRWF2, x_bRWC.to(weight.dtype), weight, bias)
        if x_bRWC.dtype != weight.dtype:
            out_bRWF2.copy_(out_bRWF2.to(x_bRWC.dtype))  # Rounded as the modules do.

    def gated(self, map_brWF2: Tensor, halo: int) -> Tensor:
        grid = (map_brWF2.shape[1] - 2 * halo, map_brWF2.shape[2])
        gated_bnF = self.kernels.gated_depthwise(map_brWF2.flatten(1, 2), self.kernel, self.offset, grid, halo=halo)
        return gated_bnF.view(-1, *grid, gated_bnF.shape[2])


@dataclass(frozen=True, slots=True)
class _Band:
    """Whole grids of some samples, or some rows of one."""

    samples: slice
    rows: slice
    """Of which the result is computed."""
    fresh: slice
    """Of which the activated map is: one more below, where there is one, without those that the band above has already."""
    halo: int
    """Rows of neighbours that the convolution reads at either side: 1, or 0 for whole grids."""
    height: int
    """Of the grid."""

    @property
    def first(self) -> int:
        """Where the fresh rows begin among those that the convolution reads."""
        return 0 if self.halo == 0 else 1 if self.rows.start == 0 else 2

    def memory(self, memory: Tensor, x_BHWC: Tensor, channels: int, before: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return a place for the activated map, (b, r + 2 halo, W, 2 F), with all but its fresh rows filled in, and the memory it is in.

        Args:
            memory: Of bands before, flat.
            x_BHWC: All tokens.
            channels: 2 F.
            before: What this returned for the band above.
        """
        samples, rows = self.samples.stop - self.samples.start, self.rows.stop - self.rows.start
        active, memory = _taken(memory, torch.Size((samples, rows + 2 * self.halo, x_BHWC.shape[2], channels)))
        if self.first == 1:
            active[:, 0] = 0
        elif self.first == 2 and before is not None:
            # One after the other: of a band of one row, the second is where the first was to be read.
            active[:, 0] = before[:, -2]
            active[:, 1] = before[:, -1]
        if self.halo and self.rows.stop == self.height:
            active[:, -1] = 0
        return active, memory


def _bands(x_BHWC: Tensor, channels: int) -> Iterator[_Band]:
    batch, height, across, width = x_BHWC.shape
    for samples, rows in pieces(batch, height, across * channels, across, 3 * width * channels // 2):
        halo = int(rows != slice(0, height))
        start = rows.start + 1 if halo and rows.start > 0 else rows.start
        yield _Band(samples, rows, slice(start, min(rows.stop + halo, height)), halo, height)


def _taken(memory: Tensor, shape: torch.Size) -> tuple[Tensor, Tensor]:
    """Return the beginning of flat memory in a shape, with whatever is there, and the memory; more of it where it is too small."""
    if memory.numel() < shape.numel():
        memory = memory.new_empty(shape.numel())
    return memory[: shape.numel()].view(shape), memory
