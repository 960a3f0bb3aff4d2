"""What a DC-AE takes on its device, from its settings alone: weights, and what coding one tile holds at its widest point.

Counted on torch's meta device, where the autoencoder runs as diffusers wrote it and computes nothing: a third of a second for SANA's, once
diffusers is imported. Every map in it has so many channels a pixel, so bytes are in proportion to the positions of a tile.
`tests/unit/test_codec_memory.py` holds them against SANA's blocks counted by hand and against bytes of real tiles.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch

from linearsr.codec_source import check_codec, find_autoencoder
from linearsr.config import DC_AE_CHANNELS, DC_AE_FACTOR, CodecConfig
from linearsr.dcae import empty_autoencoder, tile_size
from linearsr.live_bytes import LiveBytes

FLOAT_BYTES = 4
"""The codec runs in float32, whatever the network does."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CodecMemory:
    """Bytes that a DC-AE takes, by arithmetic on what was counted for one tile."""

    weight_bytes: int
    """On the device from the codec's first use on."""
    encode_bytes: int
    """For each latent position of a tile while it is encoded, its latent included, its pixels not."""
    decode_bytes: int
    """For each latent position of a tile while it is decoded, its pixels included."""
    tile: int
    """Positions along a tile's side, at most."""

    @classmethod
    def of(cls, config: CodecConfig) -> Self | None:
        """Read the settings of a codec's autoencoder, not its weights; None for a codec that has none.

        Raises:
            CodecError: if files are missing or foreign, or diffusers is not installed.
        """
        if config.kind != "dc-ae":
            return None
        check_codec(config)
        return cls.counted(find_autoencoder(config.source).settings, config.tile)

    @classmethod
    def counted(cls, settings: Mapping[str, object], tile: int) -> Self:
        """Run an autoencoder of these settings, diffusers' `config.json`, over one tile on the meta device.

        Raises:
            CodecError: if diffusers is not installed.
        """
        model: Any = empty_autoencoder(settings)
        weights = sum(value.numel() for value in model.state_dict().values())
        with torch.inference_mode(), torch.device("meta"):
            latent = torch.empty(1, DC_AE_CHANNELS, tile, tile)
            pixels = torch.empty(1, 3, tile * DC_AE_FACTOR, tile * DC_AE_FACTOR)
            with LiveBytes() as encode:
                model.encode(pixels)
            with LiveBytes() as decode:
                model.decode(latent)
        encode_bytes, decode_bytes = (-(-counted.peak // tile**2) for counted in (encode, decode))
        return cls(weight_bytes=weights * FLOAT_BYTES, encode_bytes=encode_bytes, decode_bytes=decode_bytes, tile=tile)

    def at_once(self, grid: tuple[int, int], batch: int) -> int:
        """Return how many of a batch of pictures are coded at once; see `linearsr.dcae.in_tiles`."""
        return min(batch, max(1, self.tile**2 // (grid[0] * grid[1])))

    def encode(self, grid: tuple[int, int]) -> int:
        """Return the bytes of encoding a picture of (H, W) positions, the picture itself apart."""
        rows, columns = tile_size(grid, self.tile)
        return rows * columns * self.encode_bytes

    def decode(self, grid: tuple[int, int]) -> int:
        """Return the bytes of decoding (H, W) positions, and of the picture that tiles are put into."""
        rows, columns = tile_size(grid, self.tile)
        put_into = 0 if (rows, columns) == grid else 3 * DC_AE_FACTOR**2 * FLOAT_BYTES * grid[0] * grid[1]
        return rows * columns * self.decode_bytes + put_into
