"""Calls compiled kernels; see `linearsr.kernels.build`.

Shape suffixes: B batch, N tokens = H x W of the latent grid, C width, F hidden channels of Mix-FFN.
"""

import ctypes
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

HEAD_WIDTH = 32
"""Of SANA and all presets, the one that `relu_attention` is compiled for."""
DTYPES = (torch.float32, torch.bfloat16)


class KernelsError(ValueError):
    """The kernels cannot be compiled or loaded here; the message says why, and what to do."""


@dataclass(frozen=True)
class Kernels:
    """A compiled library; picklable, and of use wherever the file is.

    All work on tensors of `DTYPES` on the CPU, each in one piece of memory, with as many threads as torch; arithmetic is float32, and
    results do not depend on the number of threads.
    """

    path: Path

    def takes(self, x: Tensor) -> bool:
        """Say whether the kernels compute with values like these: of one of `DTYPES`, on a CPU, and nobody compiles the network."""
        return x.device.type == "cpu" and x.dtype in DTYPES and not torch.compiler.is_compiling()

    def gated_depthwise(self, hidden_BNF2: Tensor, weight: Tensor, bias: Tensor, grid: tuple[int, int], *, halo: int = 0) -> Tensor:
        """Apply SiLU, a depthwise 3x3 convolution on the grid and a SiLU gate: (B, N, 2 F) -> (B, N, F).

        Args:
            hidden_BNF2: Tokens of the grid in row-major order; with a halo, of (H + 2 halo) x W.
            weight, bias: Of the convolution, (2 F, 1, 3, 3) and (2 F,), float32.
            grid: (H, W) of what comes out.
            halo: Rows of neighbours at either side that the convolution reads, 0 or 1.
        """
        batch, _, channels = hidden_BNF2.shape
        out = hidden_BNF2.new_empty((batch, grid[0] * grid[1], channels // 2))
        tensors, sizes = (hidden_BNF2, weight, bias, out), (batch, *grid, channels // 2, halo)
        self._call("gated_depthwise", _is_half(hidden_BNF2), *tensors, *sizes, torch.get_num_threads())
        return out

    def gated_depthwise_gradients(
        self, hidden_BNF2: Tensor, grad_BNF: Tensor, weight: Tensor, bias: Tensor, grid: tuple[int, int]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the gradients of tokens, weight and bias (both float32), given that of the result of `gated_depthwise`."""
        grads = torch.empty_like(hidden_BNF2), torch.empty_like(weight), torch.empty_like(bias)
        batch, _, channels = hidden_BNF2.shape
        tensors = (hidden_BNF2, grad_BNF, weight, bias, *grads)
        self._call("gated_depthwise_backward", _is_half(hidden_BNF2), *tensors, batch, *grid, channels // 2, torch.get_num_threads())
        return grads

    def relu_attention(self, qkv_BNC3: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        """Do what `linearsr.fused.relu_attention` does, with heads of `HEAD_WIDTH`; return the state (B, H, D + 1, D) too."""
        batch, tokens, width = qkv_BNC3.shape[0], qkv_BNC3.shape[1], qkv_BNC3.shape[2] // 3
        heads = width // HEAD_WIDTH
        out = qkv_BNC3.new_empty((batch, tokens, width))
        normaliser = qkv_BNC3.new_empty((batch, heads, tokens, 1), dtype=torch.float32)
        state = qkv_BNC3.new_empty((batch, heads, HEAD_WIDTH + 1, HEAD_WIDTH), dtype=torch.float32)
        tensors = (qkv_BNC3, out, normaliser, state)
        self._call("relu_attention", _is_half(qkv_BNC3), *tensors, batch, tokens, heads, eps, torch.get_num_threads())
        return out, normaliser, state

    def relu_attention_gradient(
        self, qkv_BNC3: Tensor, out_BNC: Tensor, normaliser: Tensor, state: Tensor, grad_BNC: Tensor, eps: float
    ) -> Tensor:
        """Return the gradient of the packed queries, keys and values, given what `relu_attention` returned and the result's."""
        batch, heads, tokens, _ = normaliser.shape
        grad_qkv = torch.empty_like(qkv_BNC3)
        tensors = (qkv_BNC3, out_BNC, normaliser, state, grad_BNC, grad_qkv)
        self._call("relu_attention_backward", _is_half(qkv_BNC3), *tensors, batch, tokens, heads, eps, torch.get_num_threads())
        return grad_qkv

    def luminance_psnr(self, x: Tensor, y: Tensor, weights: tuple[float, float, float], peak: float, limit_db: float) -> Tensor:
        """Return the PSNR in dB, at most `limit_db`, of a weighted sum of channels, (B,) float64, for two (B, 3, H, W) in any layout."""
        x, y = x.float(), y.float()
        psnr = torch.empty(len(x), dtype=torch.float64)
        interleaved = all(picture.is_contiguous(memory_format=torch.channels_last) for picture in (x, y))
        pixels = [picture.permute(0, 2, 3, 1) if interleaved else picture.contiguous() for picture in (x, y)]
        numbers = (*map(float, (*weights, peak, limit_db)), len(x), x.shape[2] * x.shape[3], int(interleaved))
        self._call("luminance_psnr", *pixels, psnr, *numbers)
        return psnr

    def _call(self, name: str, *arguments: Tensor | float) -> None:
        """Call a function of the library: tensors are pointers there, numbers `long` and `float`."""
        tensors = [value for value in arguments if isinstance(value, Tensor)]
        assert all(tensor.is_contiguous() and tensor.device.type == "cpu" for tensor in tensors)  # noqa: S101 (callers see to it)
        getattr(_loaded(self.path), name)(*map(_argument, arguments))


def _is_half(x: Tensor) -> int:
    return int(x.dtype == torch.bfloat16)


def _argument(value: Tensor | float) -> ctypes.c_void_p | ctypes.c_long | ctypes.c_float:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_long(value) if isinstance(value, int) else ctypes.c_float(value)


@cache
def _loaded(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        raise KernelsError(f"{path}: got {error}; expected kernels compiled on this machine; fix: remove the file") from error
