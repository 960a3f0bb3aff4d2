"""From an image to a larger image, with a released bundle."""

from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from linearsr.bundle import Bundle, BundleError
from linearsr.model import SuperResolver
from linearsr.routed import RoutedSampler
from linearsr.tag_reader import TagReader

Estimate = Literal["routed", "one_step"]


class Upscaler:
    """Holds every expert of a bundle in memory and enlarges pictures of any size and aspect ratio."""

    def __init__(self, bundle: Bundle, *, device: str | torch.device = "cpu") -> None:
        """Load the experts; nothing of the bundle is executed.

        Raises:
            BundleError: if an expert's weights are not those of the bundle's network.
        """
        self.bundle, self.device = bundle, torch.device(device)
        self.experts: list[SuperResolver] = []
        for path in bundle.experts:
            expert = SuperResolver(bundle.config, bundle.statistics)
            try:
                expert.load_state_dict(load_file(path))
            except (RuntimeError, SafetensorError) as error:
                raise BundleError(f"{path}: got other weights ({error}); expected those of {bundle.config}; fix: assemble again") from error
            dtype = torch.bfloat16 if bundle.precision == "bfloat16" else torch.float32
            self.experts.append(expert.to(self.device, dtype).eval())
        self.reader = TagReader(bundle.config.tags, bundle.text, self.device)
        self.routed = RoutedSampler(self.experts, bundle.boundaries, bundle.sampler)

    def upscale(
        self, image: Image.Image, *, tags: Sequence[str] = (), seed: int = 0, steps: int | None = None, estimate: Estimate = "routed"
    ) -> Image.Image:
        """Enlarge a picture `scale` times; it is converted to RGB. See `upscale_tensor`."""
        pixels = torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)[None].float() / 255
        restored = self.upscale_tensor(pixels, tags=tags, seed=seed, steps=steps, estimate=estimate)
        return Image.fromarray((restored[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())

    @torch.inference_mode()
    def upscale_tensor(
        self, lr: Tensor, *, tags: Sequence[str] = (), seed: int = 0, steps: int | None = None, estimate: Estimate = "routed"
    ) -> Tensor:
        """Enlarge a batch: (B, 3, h, w) in [0, 1] -> (B, 3, s h, s w) in [0, 1], on the CPU.

        Args:
            lr: Pictures of one size.
            tags: Words for what they show; see `TagReader`.
            seed: Of the initial noise.
            steps: Sampler steps; None takes the bundle's sampler as it is.
            estimate: `routed` follows the sampler through the experts; `one_step` is the noisiest expert's clean
                estimate from pure noise.

        Raises:
            ValueError: for an unknown estimate, or no steps.
        """
        if estimate not in get_args(Estimate):
            raise ValueError(f"estimate: got {estimate!r}; expected one of {', '.join(get_args(Estimate))}")
        config = self.bundle.config
        padded, (height, width) = self._pad(lr)
        captions, null = self.reader.read(tags, lr.shape[0]), self.reader.null(lr.shape[0])
        pixels = (padded * 2 - 1).to(self.device)
        side_h, side_w = (side // config.lr_pixels_per_token for side in padded.shape[2:])
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn((lr.shape[0], config.codec.latent_channels, side_h, side_w), generator=generator).to(self.device)
        if estimate == "one_step":
            clean = self.experts[0].denoise(noise, 1.0, self.experts[0].condition(pixels, captions))
        else:
            clean = self.routed.sample(noise, pixels, captions, steps, null=null)
        restored = self.experts[0].space.decode(clean) / 2 + 0.5
        return restored[..., : height * config.scale, : width * config.scale].cpu()

    def _pad(self, lr: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Mirror the right and bottom edges up to a multiple of a token; return the original (height, width) too."""
        unit = self.bundle.config.lr_pixels_per_token
        height, width = lr.shape[2:]
        pad_h, pad_w = -height % unit, -width % unit
        # Mirroring needs more pixels than it adds; a picture of a few pixels is stretched at its edge instead.
        mode = "reflect" if pad_h < height and pad_w < width else "replicate"
        return F.pad(lr, (0, pad_w, 0, pad_h), mode=mode), (height, width)
