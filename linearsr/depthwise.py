"""The middle of Mix-FFN with its gradient written by hand: SiLU, a depthwise convolution on the grid, a SiLU gate.

Autograd would keep five tensors of the hidden width; this keeps its input alone and computes the rest again. Everything is pointwise or
depthwise, so a CPU works on some channels of value and gate in a band of the grid's rows at a time, which stay in its cache.

Shape suffixes: B batch, N tokens = H x W of the latent grid, F hidden channels of Mix-FFN, K of them that are worked on, r rows of a band.
One backward pass is supported, in any float dtype and on any device; there is no second derivative. Source: method.md 2.5.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from linearsr.bands import bands
from linearsr.kernels import Kernels, compiled_gated_depthwise
from linearsr.linear import product_dtype

aten = torch.ops.aten

MIN_CHANNELS = 64
"""Fewer at a time make the depthwise convolution itself slow, up to ten times at 16 channels."""
MIN_ROWS = 4
"""Two more rows are activated for each band than come out of it."""


def gated_depthwise(hidden_BNF2: Tensor, weight: Tensor, bias: Tensor, grid: tuple[int, int], kernels: Kernels | None = None) -> Tensor:
    """Apply SiLU, a depthwise 3x3 convolution on the grid and a SiLU gate: (B, N, 2 F) -> (B, N, F). Keeps its input alone.

    Args:
        hidden_BNF2: Tokens of the (H, W) grid in row-major order.
        weight, bias: Of the convolution, (2 F, 1, 3, 3) and (2 F,).
        grid: (H, W).
        kernels: Compute it, if they take such values; plain torch does without them.
    """
    if kernels is not None and kernels.takes(hidden_BNF2):
        return compiled_gated_depthwise(hidden_BNF2, weight, bias, grid, kernels)
    if torch.compiler.is_compiling():  # The compiler fuses the plain definition, and decides by itself what to keep.
        planes = _planes(_on_grid(F.silu(hidden_BNF2), grid))
        value, gate = _tokens(F.conv2d(planes, weight, bias, padding=1, groups=weight.shape[0])).flatten(1, 2).chunk(2, dim=-1)
        return value * F.silu(gate)
    return _GatedDepthwise.apply(hidden_BNF2, weight, bias, grid)  # type: ignore[no-any-return]


class _GatedDepthwise(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden_BNF2: Tensor, weight: Tensor, bias: Tensor, grid: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(hidden_BNF2, weight, bias)
        ctx.grid = grid
        out_BHWF = hidden_BNF2.new_empty((hidden_BNF2.shape[0], *grid, hidden_BNF2.shape[2] // 2))
        active: Tensor | None = None
        for piece in _pieces(_on_grid(hidden_BNF2, grid)):
            active = piece.active(active)
            value, gate = piece.convolved(active, weight, bias).chunk(2, dim=-1)
            torch.mul(value, F.silu(gate, inplace=True), out=out_BHWF[:, piece.rows, :, piece.channels])
        return out_BHWF.flatten(1, 2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BNF: Tensor) -> tuple[Tensor | None, ...]:
        hidden_BNF2, weight, bias = ctx.saved_tensors
        hidden_BHWF2, grad_BHWF = (_on_grid(whole, ctx.grid) for whole in (hidden_BNF2, grad_BNF))
        # Bands are summed in float32: each would be rounded to a half by itself.
        wide = torch.promote_types(weight.dtype, torch.float32)
        grads = torch.empty_like(hidden_BHWF2), torch.zeros_like(weight, dtype=wide), torch.zeros_like(bias, dtype=wide)
        active: Tensor | None = None
        unfinished: Tensor | None = None
        for piece in _pieces(hidden_BHWF2):
            active = piece.active(active)
            convolved = piece.convolved(active, weight, bias)
            value, gate = convolved.chunk(2, dim=-1)
            grad_out = grad_BHWF[:, piece.rows, :, piece.channels].to(value.dtype)
            # Gradients take the place of what they are gradients of: fresh memory would cost more than the arithmetic.
            grad_activated = grad_out * value
            aten.silu.out(gate, out=value).mul_(grad_out)
            aten.silu_backward.grad_input(grad_activated, gate, grad_input=gate)
            unfinished = piece.put_gradients(grads, active, convolved, weight, unfinished)
        return grads[0].flatten(1, 2), grads[1].to(weight.dtype), grads[2].to(bias.dtype), None


@dataclass(frozen=True, slots=True)
class _Piece:
    """Some channels of value and gate in a band of rows."""

    hidden: Tensor
    """(B, H, W, 2 F)."""
    channels: slice
    """Of the F of the value; the gate has the same of the other F."""
    rows: slice
    halo: int
    """Rows of neighbouring bands that the convolution reads at either side: 1, or 0 for a band that is the whole grid."""

    @property
    def _has_all_channels(self) -> bool:
        return self.channels == slice(0, self.hidden.shape[-1] // 2)

    @property
    def _is_whole(self) -> bool:
        return self.halo == 0 and self._has_all_channels

    @property
    def _places(self) -> list[slice]:
        """Where the channels are among the 2 F: those of the value and those of the gate, or all in one."""
        half = self.hidden.shape[-1] // 2
        if self._has_all_channels:
            return [slice(0, 2 * half)]
        return [self.channels, slice(self.channels.start + half, self.channels.stop + half)]

    def _parts(self, whole: Tensor, dim: int = -1) -> Iterator[tuple[slice, Tensor]]:
        """Yield what of value and gate side by side belongs to each of the places."""
        return zip(self._places, whole.chunk(len(self._places), dim=dim), strict=True)

    def active(self, before: Tensor | None) -> Tensor:
        """Return SiLU of value and gate side by side, (B, r + 2 halo, W, 2 K); beyond the grid it is zero.

        Args:
            before: What the piece before returned. Unless the grid's first rows begin here, its last two rows are the first two of this.
        """
        if self._is_whole:
            return F.silu(self.hidden.to(product_dtype(self.hidden)))
        batch, height, across, _ = self.hidden.shape
        low, high = self.rows.start - self.halo, self.rows.stop + self.halo
        width = 2 * (self.channels.stop - self.channels.start)
        active = self.hidden.new_empty((batch, high - low, across, width), dtype=product_dtype(self.hidden))
        if self.rows.start == 0 or before is None:
            new = slice(0, min(high, height))
            active[:, : self.halo] = 0
        else:
            new = slice(self.rows.start + 1, min(high, height))
            active[:, :2] = before[:, -2:]
        active[:, new.stop - low :] = 0
        for place, into in self._parts(active[:, new.start - low : new.stop - low]):
            part = self.hidden[:, new, :, place]
            aten.silu.out(part if part.dtype == into.dtype else into.copy_(part), out=into)
        return active

    def convolved(self, active: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """Return the convolution of what `active` returned, (B, r, W, 2 K)."""
        kernel, offset = (self._paired(part).to(active.dtype) for part in (weight, bias))
        return _tokens(F.conv2d(_planes(active), kernel, offset, padding=(1 - self.halo, 1), groups=kernel.shape[0]))

    def put_gradients(
        self, grads: tuple[Tensor, Tensor, Tensor], active: Tensor, grad_convolved: Tensor, weight: Tensor, unfinished: Tensor | None
    ) -> Tensor | None:
        """Add to the gradients of weight and bias, and write those of the hidden rows that no later band adds to.

        Args:
            grads: Of the hidden map (B, H, W, 2 F), the weight and the bias.
            active, grad_convolved: Of this piece.
            weight: Of the convolution.
            unfinished: What the band before returned; None for the first.

        Returns:
            Gradients of the last two rows, (B, 2, W, 2 K), to which the next band adds; None after the last.
        """
        kernel = self._paired(weight).to(active.dtype)
        grad_active, *grads_kernel = aten.convolution_backward(
            _planes(grad_convolved), _planes(active), kernel, [kernel.shape[0]],
            [1, 1], [1 - self.halo, 1], [1, 1], False, [0, 0], kernel.shape[0], [True, True, True],
        )  # fmt: skip
        for grad, part in zip(grads[1:], grads_kernel, strict=True):
            for place, of_place in self._parts(part, dim=0):
                grad[place] += of_place
        grad_active = _tokens(grad_active)
        if unfinished is not None:
            grad_active[:, :2] += unfinished
        low, height = self.rows.start - self.halo, self.hidden.shape[1]
        last = self.rows.stop == height
        done = slice(max(low, 0), height if last else self.rows.stop - 1)
        for place, part in self._parts(grad_active[:, done.start - low : done.stop - low]):
            into, hidden = (whole[:, done, :, place] for whole in (grads[0], self.hidden))
            if into.dtype == part.dtype:
                aten.silu_backward.grad_input(part, hidden, grad_input=into)
            else:
                into.copy_(aten.silu_backward(part, hidden.to(part.dtype)))
        return None if last else grad_active[:, -2:]

    def _paired(self, whole: Tensor) -> Tensor:
        """Return what belongs to the channels of value and gate, along the first axis."""
        return whole if self._has_all_channels else torch.cat([whole[place] for place in self._places])


def _pieces(hidden_BHWF2: Tensor) -> Iterator[_Piece]:
    """Cut channels, then rows, into what fits the cache of a CPU; a GPU takes all at once."""
    batch, height, across, double = hidden_BHWF2.shape
    for channels in bands(double // 2, 2 * batch * across * min(height, MIN_ROWS), hidden_BHWF2, at_least=MIN_CHANNELS):
        values = 2 * batch * across * (channels.stop - channels.start)
        cuts = bands(height, values, hidden_BHWF2, at_least=MIN_ROWS)
        for rows in cuts:
            yield _Piece(hidden_BHWF2, channels, rows, halo=int(len(cuts) > 1))


def _on_grid(x_BNF: Tensor, grid: tuple[int, int]) -> Tensor:
    """View tokens (B, N, F) as (B, H, W, F)."""
    return x_BNF.view(x_BNF.shape[0], *grid, x_BNF.shape[2])


def _planes(x_BHWK: Tensor) -> Tensor:
    """View (B, H, W, K) as (B, K, H, W); that is channels-last in memory, so nothing is copied."""
    return x_BHWK.permute(0, 3, 1, 2)


def _tokens(x_BKHW: Tensor) -> Tensor:
    """View (B, K, H, W), channels-last in memory, as (B, H, W, K)."""
    return x_BKHW.permute(0, 2, 3, 1)
