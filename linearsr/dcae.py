"""DC-AE, SANA's deep-compression autoencoder f32c32, as a latent codec; diffusers runs it. Source: method.md 1.7, 1.8.

The network is frozen and in float32, belongs to no model's state, and is loaded when first used, once for each device of a process.
"""

from collections.abc import Callable, Mapping
from functools import lru_cache
from importlib import import_module
from math import ceil
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from linearsr.codec_source import EXTRA, CodecError, check_codec, find_autoencoder
from linearsr.config import CodecConfig

OVERLAP = 8
"""Positions that neighbouring tiles share, half a small tile at most. Measured where two tiles of 32 meet, on random weights in SANA's
stages: mean squared difference to whole decoding over the picture's variance 0.26 at 1 position, 0.097 at 2, 0.035 at 4, 0.028 at 8,
0.028 at 16."""
REASON = 240
"""Characters of what torch says of weights that do not fit: it names every one of them."""


class DeepCompressionCodec:
    """Satisfies `linearsr.codec.Codec`; picklable, it holds no weights itself.

    A picture of more than `tile` positions a side is coded in overlapping tiles, whose results fade into each other, so memory is that
    of one tile whatever the size of picture and batch. A picture that fits in one tile is coded exactly as diffusers codes it. Larger
    ones cannot be: the linear attention of the three deepest stages takes in the whole picture, and sees only a tile here, which no
    overlap makes up for; and the convolutions of SANA's decoder reach 20 positions far. Fading hides the second and leaves no edge;
    the first is a slow change of tone and contrast from tile to tile.
    """

    def __init__(self, config: CodecConfig) -> None:
        """Find the weights without reading them.

        Raises:
            CodecError: if they are not there or of another autoencoder, or diffusers is not installed.
        """
        check_codec(config)
        files = find_autoencoder(config.source)
        self.scaling_factor = files.scaling_factor
        self._config, self._stamp = config, files.stamp
        self._tile, self._overlap = config.tile, _overlap(config.tile)

    def encode(self, pixels: Tensor) -> Tensor:
        """Map (B, 3, H, W) in [-1, 1] to (B, 32, H / 32, W / 32) float32, not yet scaled. H and W must be multiples of 32.

        Raises:
            ValueError: if they are not.
        """
        factor, (height, width) = self._config.factor, pixels.shape[2:]
        if height % factor or width % factor:
            raise ValueError(f"dc-ae: got a picture of {height} x {width} px; expected multiples of {factor}; fix: crop or pad it")
        return self._apply("encode", pixels, unit_in=factor, unit_out=1)

    def decode(self, latent: Tensor) -> Tensor:
        """Map (B, 32, h, w), not scaled any more, to (B, 3, 32 h, 32 w) float32; nothing is differentiable."""
        return self._apply("decode", latent, unit_in=1, unit_out=self._config.factor)

    @torch.no_grad()
    def _apply(self, method: str, x: Tensor, *, unit_in: int, unit_out: int) -> Tensor:
        code = getattr(_load(self._config.source, self._stamp, str(x.device)), method)

        def run(part: Tensor) -> Tensor:
            coded: Tensor = code(part, return_dict=False)[0]
            return coded

        # Half precision around this call is the network's, not the codec's.
        with torch.autocast(x.device.type, enabled=False):
            return in_tiles(run, x.float(), tile=self._tile, overlap=self._overlap, unit_in=unit_in, unit_out=unit_out)


@lru_cache(maxsize=2)
def _load(source: str | None, stamp: object, device: str) -> nn.Module:
    """Return the autoencoder on a device; `stamp` makes replaced files another autoencoder."""
    files = find_autoencoder(source)
    model = empty_autoencoder(files.settings)
    with torch.inference_mode(mode=False):
        try:
            # Copied: what is read is mapped from the file, badly aligned for the kernels and changed with it.
            parts = [load_file(path) for path in files.weights]
            weights = {name: value.to(device, torch.float32, copy=True) for part in parts for name, value in part.items()}
            model.load_state_dict(weights, assign=True)
        except (RuntimeError, SafetensorError) as error:
            reason = " ".join(str(error).split())[:REASON]
            message = f"codec.source: {files.folder}: got weights that do not fit ({reason})"
            raise CodecError(f"{message}; expected those of its config.json; fix: fetch the DC-AE again") from error
    return model


def empty_autoencoder(settings: Mapping[str, object]) -> nn.Module:
    """Return diffusers' autoencoder of these settings, `config.json`, frozen and on the meta device: it has no weights yet.

    Raises:
        CodecError: if diffusers is not installed.
    """
    try:
        kind: Any = import_module("diffusers.models.autoencoders.autoencoder_dc").AutoencoderDC
    except ModuleNotFoundError as error:
        raise CodecError(f'codec dc-ae: got no {error.name}; expected diffusers; fix: pip install "linearsr[{EXTRA}]"') from error
    # Neither draws random numbers nor fills memory that the weights replace; and weights that were born in inference mode
    # could never be part of a training step.
    with torch.inference_mode(mode=False), torch.device("meta"):
        model: nn.Module = kind.from_config(dict(settings))
    return model.requires_grad_(requires_grad=False).eval()


def tile_size(grid: tuple[int, int], tile: int) -> tuple[int, int]:
    """Return the rows and columns of the tiles that a picture of (H, W) positions is coded in, the picture's own if it is one tile."""
    rows, columns = (_spread(side, tile, _overlap(tile))[1] for side in grid)
    return rows, columns


def in_tiles(function: Callable[[Tensor], Tensor], x: Tensor, *, tile: int, overlap: int, unit_in: int, unit_out: int) -> Tensor:
    """Apply a codec's function to a batch of pictures of any size, at most `tile` x `tile` positions at a time.

    Where everything fits in one tile this is `function`, over parts of the batch. Otherwise tiles are spread evenly, and where two meet
    one fades out as the other fades in, over `overlap` positions, by a squared sine: neither jumps nor kinks.

    Args:
        function: Maps (b, c, h unit_in, w unit_in) to (b, d, h unit_out, w unit_out).
        x: (B, c, H unit_in, W unit_in).
        tile: Positions a side.
        overlap: Positions that neighbours share at least, less than `tile`.
        unit_in, unit_out: Pixels a position in the argument and in the result.

    Returns:
        (B, d, H unit_out, W unit_out).
    """
    height, width = x.shape[2] // unit_in, x.shape[3] // unit_in
    if height <= tile and width <= tile:
        return torch.cat([function(part) for part in torch.split(x, max(1, tile * tile // (height * width)))])
    rows, columns = (_windows(side, tile, overlap, unit_out) for side in (height, width))
    out: Tensor | None = None
    for index in range(x.shape[0]):
        for top, bottom, down in rows:
            for left, right, across in columns:
                coded = function(x[index : index + 1, :, top * unit_in : bottom * unit_in, left * unit_in : right * unit_in])
                if out is None:
                    out = coded.new_zeros(x.shape[0], coded.shape[1], height * unit_out, width * unit_out)
                target = out[index, :, top * unit_out : bottom * unit_out, left * unit_out : right * unit_out]
                target += coded[0] * (down[:, None] * across).to(coded)
                # Or it would lie beside the next tile.
                del coded
    assert out is not None  # noqa: S101 (a batch has a picture)
    return out


def _windows(side: int, tile: int, overlap: int, unit: int) -> list[tuple[int, int, Tensor]]:
    """Return where tiles begin and end along one side, and each one's weights, which add up to 1 everywhere."""
    count, length = _spread(side, tile, overlap)
    if count == 1:
        return [(0, side, torch.ones(side * unit))]
    starts = [round(index * (side - length) / (count - 1)) for index in range(count)]
    rise = torch.sin((torch.arange(overlap * unit, dtype=torch.float64) + 0.5) * torch.pi / (2 * overlap * unit)).square()
    total = torch.zeros(side * unit, dtype=torch.float64)
    weights = []
    for start in starts:
        weight = torch.ones(length * unit, dtype=torch.float64)
        if start > 0:
            weight[: overlap * unit] *= rise
        if start + length < side:
            weight[-overlap * unit :] *= rise.flip(0)
        total[start * unit : (start + length) * unit] += weight
        weights.append(weight)
    spans = [(start, start + length) for start in starts]
    return [(low, high, (weight / total[low * unit : high * unit]).float()) for (low, high), weight in zip(spans, weights, strict=True)]


def _spread(side: int, tile: int, overlap: int) -> tuple[int, int]:
    """Return how many tiles cover one side, and their length.

    As few tiles as can be, and none longer than their overlap asks for: 64 positions take three of 27 rather than of 32.
    """
    if side <= tile:
        return 1, side
    count = ceil((side - overlap) / (tile - overlap))
    return count, ceil((side + (count - 1) * overlap) / count)


def _overlap(tile: int) -> int:
    return min(OVERLAP, tile // 2)
