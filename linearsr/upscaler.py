"""From an image to a larger image, with a released bundle."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from linearsr.bundle import Bundle, BundleError
from linearsr.experts import route
from linearsr.model import Condition, SuperResolver
from linearsr.sampling import Denoiser, sample, sampling_times
from linearsr.tags import encode_tags

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
            tags: Words for what they show; unknown ones are ignored.
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
        ids = torch.from_numpy(encode_tags(tags, config.tags)).expand(lr.shape[0], -1).to(self.device)
        pixels = (padded * 2 - 1).to(self.device)
        side_h, side_w = (side // config.lr_pixels_per_token for side in padded.shape[2:])
        generator = torch.Generator().manual_seed(seed)
        noise = torch.randn((lr.shape[0], config.codec.latent_channels, side_h, side_w), generator=generator).to(self.device)
        if estimate == "one_step":
            clean = self.experts[0].denoise(noise, 1.0, self.experts[0].condition(pixels, ids))
        else:
            clean = self._sample(noise, pixels, ids, steps)
        restored = self.experts[0].space.decode(clean) / 2 + 0.5
        return restored[..., : height * config.scale, : width * config.scale].cpu()

    def times(self, steps: int | None = None) -> tuple[float, ...]:
        """Return the noise levels at which an expert runs, descending."""
        sampler = self.bundle.sampler
        if steps is not None and steps != sampler.num_steps:
            sampler = replace(sampler, num_steps=steps, times=None)
        return sampling_times(sampler, self.bundle.config.flow.shift)

    def _sample(self, noise: Tensor, pixels: Tensor, ids: Tensor, steps: int | None) -> Tensor:
        sampler, boundaries = self.bundle.sampler, self.bundle.boundaries

        def expert_of(t: float) -> int:
            return route(t, boundaries)

        denoise = self._routed_denoiser(pixels, ids)
        return sample(denoise, sampler.temperature * noise, self.times(steps), kind=sampler.kind, expert_of=expert_of)

    def _routed_denoiser(self, pixels: Tensor, ids: Tensor) -> Denoiser:
        """Return a denoiser that asks the right expert; each encodes the picture once, when it is first asked."""
        weight = self.bundle.sampler.guidance_scale
        conditions: dict[tuple[int, bool], Condition] = {}

        def estimate(z: Tensor, t: float, *, with_tags: bool) -> Tensor:
            index = route(t, self.bundle.boundaries)
            key = (index, with_tags)
            if key not in conditions:
                conditions[key] = self.experts[index].condition(pixels, ids if with_tags else torch.zeros_like(ids))
            return self.experts[index].denoise(z, t, conditions[key])

        def denoise(z: Tensor, t: float) -> Tensor:
            clean = estimate(z, t, with_tags=True)
            if weight == 1:
                return clean
            # The clean estimate is affine in the velocity, so guidance on one is guidance on the other.
            return torch.lerp(estimate(z, t, with_tags=False), clean, weight)

        return denoise

    def _pad(self, lr: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Mirror the right and bottom edges up to a multiple of a token; return the original (height, width) too."""
        unit = self.bundle.config.lr_pixels_per_token
        height, width = lr.shape[2:]
        pad_h, pad_w = -height % unit, -width % unit
        # Mirroring needs more pixels than it adds; a picture of a few pixels is stretched at its edge instead.
        mode = "reflect" if pad_h < height and pad_w < width else "replicate"
        return F.pad(lr, (0, pad_w, 0, pad_h), mode=mode), (height, width)
