"""Several experts as one denoiser: at every noise level the sampler asks the one that owns it."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from linearsr.conditioning import TextEmbedding
from linearsr.config import SamplerConfig
from linearsr.experts import route
from linearsr.model import Condition, SuperResolver
from linearsr.sampling import Denoiser, sample, sampling_times
from linearsr.schedule import warn_of_unvisited


class RoutedSampler:
    """Follows the flow from noise to a clean latent through all experts. Source: LinearSR section 3; method.md 3.7."""

    def __init__(self, experts: Sequence[SuperResolver], boundaries: Sequence[float], sampler: SamplerConfig) -> None:
        """Keep the experts, noisiest first, and the ascending noise levels between them."""
        self.experts, self.boundaries, self.sampler = experts, tuple(boundaries), sampler

    def times(self, steps: int | None = None) -> tuple[float, ...]:
        """Return the noise levels at which an expert runs, descending; `steps` other than the sampler's are on its grid.

        Warns with `UnvisitedExpertWarning` if they never call one of the experts.
        """
        sampler = self.sampler
        if steps is not None and steps != sampler.num_steps:
            sampler = replace(sampler, num_steps=steps, times=None)
        warn_of_unvisited(sampler, self.experts[0].config.flow.shift, self.boundaries)
        return sampling_times(sampler, self.experts[0].config.flow.shift)

    def sample(
        self,
        noise: Tensor,
        pixels: Tensor,
        captions: Tensor | TextEmbedding,
        steps: int | None = None,
        *,
        null: Tensor | TextEmbedding | None = None,
    ) -> Tensor:
        """Return the clean latent that the experts make of `noise`, both (B, c, H, W).

        Args:
            noise: standard normal; the sampler's temperature is applied here.
            pixels: LR pictures (B, 3, h, w) in [-1, 1].
            captions: tag ids (B, T), or text embeddings.
            steps: sampler steps; None takes the sampler as it is.
            null: what stands for no tags, for guidance on text embeddings; id 0 does for tag ids.

        Raises:
            ValueError: if guidance on text embeddings has no null.
        """
        if null is None and isinstance(captions, Tensor):
            null = torch.zeros_like(captions)
        if null is None and self.sampler.guidance_scale != 1:
            raise ValueError("RoutedSampler.sample: got no null captions; expected some for guidance on text; fix: pass `Captions.null`")
        denoise = self._denoiser(pixels, captions, captions if null is None else null)
        start = self.sampler.temperature * noise
        return sample(denoise, start, self.times(steps), kind=self.sampler.kind, expert_of=lambda t: route(t, self.boundaries))

    def _denoiser(self, pixels: Tensor, captions: Tensor | TextEmbedding, null: Tensor | TextEmbedding) -> Denoiser:
        """Return a denoiser that asks the right expert; each encodes the picture once, when it is first asked."""
        weight = self.sampler.guidance_scale
        conditions: dict[tuple[int, bool], Condition] = {}

        def estimate(z: Tensor, t: float, *, with_tags: bool) -> Tensor:
            index = route(t, self.boundaries)
            key = (index, with_tags)
            if key not in conditions:
                conditions[key] = self.experts[index].condition(pixels, captions if with_tags else null)
            return self.experts[index].denoise(z, t, conditions[key])

        def denoise(z: Tensor, t: float) -> Tensor:
            clean = estimate(z, t, with_tags=True)
            if weight == 1:
                return clean
            # The clean estimate is affine in the velocity, so guidance on one is guidance on the other.
            return torch.lerp(estimate(z, t, with_tags=False), clean, weight)

        return denoise
