"""Several experts as one denoiser: at every noise level the sampler asks the one that owns it."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from linearsr.conditioning import TextEmbedding
from linearsr.config import SamplerConfig
from linearsr.experts import route
from linearsr.model import Condition, SuperResolver
from linearsr.residency import ExpertSet, ExpertsInTurn
from linearsr.sampling import Denoiser, sample, sampling_times
from linearsr.schedule import warn_of_unvisited
from linearsr.tiles import Tiling, Window, blend, whole
from linearsr.timing import Stopwatch

Caption = Tensor | TextEmbedding
"""Tag ids (B, T), or text embeddings."""


class RoutedSampler:
    """Follows the flow from noise to a clean latent through all experts. Source: LinearSR section 3; method.md 3.7."""

    def __init__(
        self, experts: ExpertSet, boundaries: Sequence[float], sampler: SamplerConfig, *, stopwatch: Stopwatch | None = None
    ) -> None:
        """Keep the experts, noisiest first, and the ascending noise levels between them."""
        self.experts, self.boundaries, self.sampler = experts, tuple(boundaries), sampler
        self._shift = experts[0].config.flow.shift
        self._stopwatch = stopwatch or Stopwatch(enabled=False)
        self._current: int | None = None

    def times(self, steps: int | None = None) -> tuple[float, ...]:
        """Return the noise levels at which an expert runs, descending; `steps` other than the sampler's are on its grid.

        Warns with `UnvisitedExpertWarning` if they never call one of the experts.
        """
        sampler = self.sampler
        if steps is not None and steps != sampler.num_steps:
            sampler = replace(sampler, num_steps=steps, times=None)
        warn_of_unvisited(sampler, self._shift, self.boundaries)
        return sampling_times(sampler, self._shift)

    def sample(
        self,
        noise: Tensor,
        pixels: Tensor,
        captions: Caption,
        steps: int | None = None,
        *,
        null: Caption | None = None,
        tiling: Tiling | None = None,
    ) -> Tensor:
        """Return the clean latent that the experts make of `noise`, both (B, c, H, W).

        Args:
            noise: standard normal; the sampler's temperature is applied here.
            pixels: LR pictures (B, 3, h, w) in [-1, 1].
            captions: tag ids (B, T), or text embeddings.
            steps: sampler steps; None takes the sampler as it is.
            null: what stands for no tags, for guidance on text embeddings; id 0 does for tag ids.
            tiling: how the network's forward is cut; None is one forward for the whole grid.

        Raises:
            ValueError: if guidance on text embeddings has no null.
        """
        if null is None and isinstance(captions, Tensor):
            null = torch.zeros_like(captions)
        if null is None and self.sampler.guidance_scale != 1:
            raise ValueError("RoutedSampler.sample: got no null captions; expected some for guidance on text; fix: pass `Captions.null`")
        times = self.times(steps)
        self._expect([route(t, self.boundaries) for t in times])
        cut = tiling or whole((noise.shape[2], noise.shape[3]))
        denoise = self._denoiser(pixels, captions, captions if null is None else null, cut, self.sampler.guidance_scale)
        start = self.sampler.temperature * noise
        return sample(
            denoise,
            start,
            times,
            kind=self.sampler.kind,
            expert_of=lambda t: route(t, self.boundaries),
            keep_history=self.sampler.history == "keep",
        )

    def one_step(self, noise: Tensor, pixels: Tensor, captions: Caption, *, tiling: Tiling | None = None) -> Tensor:
        """Return the noisiest expert's clean estimate from pure noise, without guidance; arguments as in `sample`."""
        self._expect([0])
        cut = tiling or whole((noise.shape[2], noise.shape[3]))
        return self._denoiser(pixels, captions, captions, cut, 1.0)(noise, 1.0)

    def _expect(self, order: Sequence[int]) -> None:
        if isinstance(self.experts, ExpertsInTurn):
            self.experts.expect(order)

    def _denoiser(self, pixels: Tensor, captions: Caption, null: Caption, tiling: Tiling, weight: float) -> Denoiser:
        """Return a denoiser that asks the right expert; each encodes the picture once, when it is first asked.

        `weight` is that of guidance; 1 evaluates one branch.
        """
        watch = self._stopwatch
        conditions: dict[tuple[int, bool], Condition] = {}

        def condition_of(index: int, expert: SuperResolver, *, with_tags: bool) -> Condition:
            key = (index, with_tags)
            if key not in conditions:
                read = captions if with_tags else null
                known = next(iter(conditions.values()), None)
                for other in [one for one in conditions if one[0] != index]:
                    del conditions[other]  # Noise only falls: that expert is done.
                with watch.section("prior"), watch.following(stem=expert.network.stem, tags=expert.network.tags):
                    if known is None:
                        conditions[key] = expert.condition(pixels, read)
                    else:  # The prior is the codec's, the same for all experts.
                        conditions[key] = Condition(expert.network.prepare(pixels, read, reused=True), known.prior_mean)
            return conditions[key]

        def estimate(z: Tensor, t: float, *, with_tags: bool) -> Tensor:
            index = route(t, self.boundaries)
            expert = self._expert(index)
            condition = condition_of(index, expert, with_tags=with_tags)
            with watch.section(f"expert {index + 1}"):
                if tiling.num_tiles == 1:
                    return expert.denoise(z, t, condition)
                return blend(tiling, lambda window: expert.denoise(z[..., *window], t, _crop(condition, window)))

        def denoise(z: Tensor, t: float) -> Tensor:
            clean = estimate(z, t, with_tags=True)
            if weight == 1:
                return clean
            # The clean estimate is affine in the velocity, so guidance on one is guidance on the other.
            return torch.lerp(estimate(z, t, with_tags=False), clean, weight)

        return denoise

    def _expert(self, index: int) -> SuperResolver:
        """Return an expert; a change of experts counts as a switch, whether it moves weights or not."""
        if index == self._current:
            return self.experts[index]
        self._current = index
        with self._stopwatch.section("switch"):
            return self.experts[index]


def _crop(condition: Condition, window: Window) -> Condition:
    """Return the condition of one tile. The LR stem ran on the whole picture, so a tile sees its surroundings through it."""
    prior = None if condition.prior_mean is None else condition.prior_mean[..., *window]
    return Condition(replace(condition.network, lr_features=condition.network.lr_features[..., *window]), prior)
