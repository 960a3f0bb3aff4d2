"""Latent codecs behind `encode` / `decode`: weights-free, exactly invertible block transforms, and SANA's autoencoder.

Of a block transform, each f x f block of pixels becomes one token of 3 f^2 channels by an orthonormal matrix, so decoding is the transpose.
"""

from functools import cache
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from linearsr.config import CodecConfig
from linearsr.constants import Constant
from linearsr.dcae import DeepCompressionCodec


class Codec(Protocol):
    """Turns pixels into latents and back."""

    @property
    def scaling_factor(self) -> float | None:
        """What its authors multiply latents by; None for a codec whose latents are normalised by measured statistics."""

    def encode(self, pixels: Tensor) -> Tensor:
        """Map (B, 3, H, W) in [-1, 1] to (B, c, H / f, W / f), not yet normalised."""

    def decode(self, latent: Tensor) -> Tensor:
        """Map (B, c, h, w) back to (B, 3, h f, w f)."""


def haar_matrix(size: int) -> Tensor:
    """Return the orthonormal Haar matrix (size, size) in float64, coarsest row first; `size` is a power of two."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while matrix.shape[0] < size:
        smooth = torch.kron(matrix, torch.tensor([[1.0, 1.0]], dtype=torch.float64))
        detail = torch.kron(torch.eye(matrix.shape[0], dtype=torch.float64), torch.tensor([[1.0, -1.0]], dtype=torch.float64))
        matrix = torch.cat([smooth, detail]) / 2**0.5
    return matrix


def opponent_colours() -> Tensor:
    """Return the orthonormal matrix (3, 3) in float64 from RGB to grey, red-green and blue-yellow."""
    rows = torch.tensor([[1.0, 1.0, 1.0], [1.0, -1.0, 0.0], [1.0, 1.0, -2.0]], dtype=torch.float64)
    unit: Tensor = rows / rows.norm(dim=1, keepdim=True)
    return unit


@cache
def _block_transform(kind: str, factor: int) -> Tensor:
    """Return the orthonormal matrix (3 f^2, 3 f^2) that acts on pixel-unshuffled channels (colour, row, column)."""
    # It is made once: in inference mode it would be of no use to whoever wants a gradient later.
    with torch.inference_mode(mode=False):
        if kind == "space_to_depth":
            return torch.eye(3 * factor**2)
        basis = haar_matrix(factor)
        return torch.kron(opponent_colours(), torch.kron(basis, basis)).float()


class BlockTransformCodec:
    """Space-to-depth followed by an orthonormal matrix on the channels of each token."""

    scaling_factor: float | None = None

    def __init__(self, config: CodecConfig) -> None:
        """Keep the block size and its matrix."""
        self.factor = config.factor
        self._matrix = Constant(_block_transform(config.kind, config.factor))

    def encode(self, pixels: Tensor) -> Tensor:
        """Map (B, 3, H, W) to (B, 3 f^2, H / f, W / f); the norm is kept. H and W must be multiples of f."""
        blocks = F.pixel_unshuffle(pixels, self.factor)
        return _mix_channels(self._matrix.on(blocks.device), blocks)

    def decode(self, latent: Tensor) -> Tensor:
        """Map (B, 3 f^2, h, w) back to (B, 3, h f, w f)."""
        return F.pixel_shuffle(_mix_channels(self._matrix.on(latent.device).T, latent), self.factor)


def _mix_channels(matrix: Tensor, x: Tensor) -> Tensor:
    mixed: Tensor = torch.einsum("dc,bchw->bdhw", matrix.to(x), x)
    return mixed


def make_codec(config: CodecConfig) -> Codec:
    """Return the codec that `config` names, ready but for weights, which are read when first used.

    Raises:
        CodecError: if it needs weights and they are not there.
    """
    if config.kind == "dc-ae":
        return DeepCompressionCodec(config)
    return BlockTransformCodec(config)
