"""The noise levels that a sampler visits: flow shift, grids, and which experts they never reach. Imports no torch.

Times u are unshifted, t are noise levels after the shift, which is what networks and `route` see; both run from 0 to 1 (noise).
"""

import warnings
from collections.abc import Sequence
from dataclasses import replace
from math import isinf
from typing import TYPE_CHECKING, TypeVar

from linearsr.config import SamplerConfig
from linearsr.experts import EFFECTIVE_LOG_SNR, intervals, log_snr, noise_level, steps_per_expert

if TYPE_CHECKING:
    from torch import Tensor

FloatOrTensor = TypeVar("FloatOrTensor", float, "Tensor")

_SANA_START = 0.999
_FINEST = 1e-3
"""The unshifted time nearest to data in SANA's training: its times are thousandths."""
_MOST_STEPS = 200
"""Steps beyond which more of them are no advice."""


class UnvisitedExpertWarning(UserWarning):
    """The sampler's noise levels miss an expert's interval, so that it never runs."""


def shift_time(u: FloatOrTensor, shift: float) -> FloatOrTensor:
    """Return t = s u / (1 + (s - 1) u) for u in [0, 1]. Source: method.md 1.3.

    Written so that no rounding leaves [0, 1]: 0 and 1 stay exactly what they are for every shift.
    """
    return shift * u / (shift * u + (1 - u))


def unshift_time(t: FloatOrTensor, shift: float) -> FloatOrTensor:
    """Return the u in [0, 1] that `shift_time` maps to t."""
    return t / (t + shift * (1 - t))


def sampling_times(config: SamplerConfig, shift: float) -> tuple[float, ...]:
    """Return the descending noise levels at which the network runs; the path then ends at 0, which is not listed.

    Source: method.md 1.5, of the grids of `SamplerConfig.grid`.
    """
    if config.times is not None:
        return config.times
    count = config.num_steps
    if config.grid == "flow-euler":
        # The least time is shifted twice, as in diffusers, which is why this grid comes so near to 0.
        step = (1 - shift_time(_FINEST, shift)) / max(1, count - 1)
        return tuple(shift_time(1 - i * step, shift) for i in range(count))
    start = _SANA_START if config.grid == "sana" else 1.0
    return tuple(shift_time(start * (1 - i / count), shift) for i in range(count))


def times_for_all(config: SamplerConfig, shift: float, boundaries: Sequence[float]) -> tuple[float, ...]:
    """Return `sampling_times`, and in every expert's interval without one a noise level more, in the middle of its log-SNR.

    For comparing experts: those that never ran would not be measured.
    """
    times = sampling_times(config, shift)
    counts = steps_per_expert(times, boundaries)
    missed = [interval for interval, count in zip(intervals(boundaries), counts, strict=True) if count == 0]
    return tuple(sorted((*times, *(_middle(*interval) for interval in missed)), reverse=True))


def unvisited_experts(config: SamplerConfig, shift: float, boundaries: Sequence[float]) -> str | None:
    """Say which experts the sampler never calls and what would help; None if it calls all of them.

    Args:
        config: The sampler.
        shift: Flow shift.
        boundaries: Ascending noise levels between experts.
    """
    counts = steps_per_expert(sampling_times(config, shift), boundaries)
    idle = [index for index, count in enumerate(counts) if count == 0]
    if not idle:
        return None
    owned = intervals(boundaries)
    missed = ", ".join(f"expert {index + 1} of {len(counts)} ({owned[index][0]:.3f} to {owned[index][1]:.3f})" for index in idle)
    which = f"{config.num_steps} step{'s' if config.num_steps > 1 else ''} on the {config.grid} grid" if config.times is None else "times"
    fix = "list a time inside each of these intervals" if config.times is not None else _more_steps(config, shift, boundaries)
    return f"sampler: got {which} without a noise level for {missed}; expected one for each expert, which else never runs; fix: {fix}"


def warn_of_unvisited(config: SamplerConfig, shift: float, boundaries: Sequence[float]) -> None:
    """Warn with `UnvisitedExpertWarning`, in the words of `unvisited_experts`, if the sampler misses an expert."""
    missed = unvisited_experts(config, shift, boundaries)
    if missed is not None:
        warnings.warn(missed, UnvisitedExpertWarning, stacklevel=3)


def _middle(low: float, high: float) -> float:
    """Return the noise level in the middle of an interval's log-SNR; an outer one has the end of `EFFECTIVE_LOG_SNR`."""
    noisy, clean = log_snr(high), log_snr(low)
    if isinf(noisy):
        noisy = min(EFFECTIVE_LOG_SNR[0], clean - 1)
    if isinf(clean):
        clean = max(EFFECTIVE_LOG_SNR[1], noisy + 1)
    return noise_level((noisy + clean) / 2)


def _more_steps(config: SamplerConfig, shift: float, boundaries: Sequence[float]) -> str:
    """Name the least number of steps, and the other grid if it helps at once."""

    def reaches_all(other: SamplerConfig) -> bool:
        return 0 not in steps_per_expert(sampling_times(other, shift), boundaries)

    more = range(config.num_steps + 1, _MOST_STEPS)
    enough = next((count for count in more if reaches_all(replace(config, num_steps=count))), None)
    ways = [] if enough is None else [f"take at least {enough} steps"]
    if reaches_all(replace(config, grid="flow-euler")):
        ways.append("set sampler.grid to flow-euler")
    return " or ".join([*ways, "list sampler.times"])
