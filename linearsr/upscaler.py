"""From an image to a larger image, with a released bundle."""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from linearsr.bundle import Bundle
from linearsr.colour import ColourFix, fix_colours
from linearsr.kernels import Kernels
from linearsr.latent import LatentSpace, upsample_bicubic
from linearsr.residency import Residency, hold_experts
from linearsr.routed import RoutedSampler
from linearsr.tag_reader import TagReader
from linearsr.tiles import cut
from linearsr.timing import Stopwatch

Estimate = Literal["routed", "one_step"]


class Upscaler:
    """Holds the experts of a bundle and enlarges pictures of any size and aspect ratio."""

    def __init__(
        self,
        bundle: Bundle,
        *,
        device: str | torch.device = "cpu",
        residency: Residency = "all",
        stopwatch: Stopwatch | None = None,
        reader: TagReader | None = None,
        kernels: Kernels | None = None,
    ) -> None:
        """Load the experts; nothing of the bundle is executed.

        Args:
            bundle: a released model.
            device: where the network runs.
            residency: whether all experts stay on the device or one at a time; pictures are the same.
            stopwatch: is told what takes how long.
            reader: of the bundle's tags, on the same device, if there is one that has learnt some.
            kernels: the experts compute with on a CPU; pictures are the same but for rounding.

        Raises:
            BundleError: if an expert's weights are not those of the bundle's network.
        """
        self.bundle, self.device = bundle, torch.device(device)
        self.stopwatch = stopwatch or Stopwatch(enabled=False)
        self.space = LatentSpace(bundle.config, bundle.statistics)
        self.experts = hold_experts(bundle, self.device, residency, kernels)
        self.reader = reader or TagReader(bundle.config.tags, bundle.text, self.device)
        self.routed = RoutedSampler(self.experts, bundle.boundaries, bundle.sampler, stopwatch=self.stopwatch)

    def upscale(
        self, image: Image.Image, *, tags: Sequence[str] = (), seed: int = 0, steps: int | None = None, estimate: Estimate = "routed"
    ) -> Image.Image:
        """Enlarge a picture `scale` times; it is converted to RGB. See `upscale_tensor`."""
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float() / 255
        restored = self.upscale_tensor(pixels, tags=tags, seed=seed, steps=steps, estimate=estimate)
        return Image.fromarray((restored[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())

    @torch.inference_mode()
    def upscale_tensor(
        self,
        lr: Tensor,
        *,
        tags: Sequence[str] = (),
        seed: int = 0,
        steps: int | None = None,
        estimate: Estimate = "routed",
        colour_fix: ColourFix = "none",
        tile: int | None = None,
    ) -> Tensor:
        """Enlarge a batch: (B, 3, h, w) in [0, 1] -> (B, 3, s h, s w) in [0, 1], on the CPU.

        Args:
            lr: Pictures of one size.
            tags: Words for what they show; see `TagReader`.
            seed: Of the initial noise, which is drawn for the whole picture: it does not depend on `tile`.
            steps: Sampler steps; None takes the bundle's sampler as it is.
            estimate: `routed` follows the sampler through the experts; `one_step` is the noisiest expert's clean
                estimate from pure noise.
            colour_fix: Takes colours from the LR picture: see `linearsr.colour`.
            tile: Tokens along a tile's side; None runs the network on the whole picture at once. See `linearsr.tiles`.

        Raises:
            ValueError: for an unknown estimate or colour fix, or no steps.
        """
        if estimate not in get_args(Estimate):
            raise ValueError(f"estimate: got {estimate!r}; expected one of {', '.join(get_args(Estimate))}")
        config, watch = self.bundle.config, self.stopwatch
        padded, (height, width) = self._pad(lr)
        with watch.section("text"):
            captions, null = self.reader.read(tags, lr.shape[0]), self.reader.null(lr.shape[0])
        pixels = (padded * 2 - 1).to(self.device)
        grid = token_grid(padded.shape[2], padded.shape[3], config.lr_pixels_per_token)
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn((lr.shape[0], config.codec.latent_channels, *grid), generator=generator).to(self.device)
        tiling = None if tile is None else cut(grid, tile)
        with watch.section("sampler"):
            if estimate == "one_step":
                clean = self.routed.one_step(noise, pixels, captions, tiling=tiling)
            else:
                clean = self.routed.sample(noise, pixels, captions, steps, null=null, tiling=tiling)
        del noise
        with watch.section("decode"):
            restored = self.space.decode(clean) / 2 + 0.5
            restored = restored[..., : height * config.scale, : width * config.scale]
        del clean
        with watch.section("colour fix"):
            if colour_fix != "none":
                source = upsample_bicubic(lr.float().to(self.device), config.scale).clamp(0, 1)
                restored = fix_colours(restored, source, colour_fix)
        return restored.cpu()

    def _pad(self, lr: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Mirror the right and bottom edges up to a multiple of a token; return the original (height, width) too."""
        unit = self.bundle.config.lr_pixels_per_token
        height, width = lr.shape[2:]
        pad_h, pad_w = -height % unit, -width % unit
        # Mirroring needs more pixels than it adds; a picture of a few pixels is stretched at its edge instead.
        mode = "reflect" if pad_h < height and pad_w < width else "replicate"
        return F.pad(lr, (0, pad_w, 0, pad_h), mode=mode), (height, width)


def token_grid(height_px: int, width_px: int, lr_pixels_per_token: int) -> tuple[int, int]:
    """Return the (rows, columns) of tokens that an LR picture becomes after padding."""
    return -(-height_px // lr_pixels_per_token), -(-width_px // lr_pixels_per_token)
