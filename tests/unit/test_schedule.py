"""Where samplers stop on the noise axis: published grids, evaluations of each expert, and a word when one never runs."""

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from linearsr.config import PAPER_BOUNDARIES, BackboneConfig, LatentStatistics, ModelConfig, SamplerConfig
from linearsr.experts import steps_per_expert
from linearsr.model import SuperResolver
from linearsr.routed import RoutedSampler
from linearsr.schedule import UnvisitedExpertWarning, sampling_times, times_for_all, unvisited_experts


def evaluations(grid: str, count: int) -> tuple[int, ...]:
    return steps_per_expert(sampling_times(SamplerConfig(num_steps=count, grid=grid), 3.0), PAPER_BOUNDARIES)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("grid", "count", "served"),
    [
        ("sana", 4, (1, 1, 2, 0)),
        ("sana", 8, (2, 1, 5, 0)),
        ("sana", 14, (3, 2, 8, 1)),
        ("sana", 20, (4, 2, 13, 1)),
        ("sana", 28, (5, 4, 17, 2)),
        ("sana", 50, (9, 6, 31, 4)),
        ("flow-euler", 20, (4, 2, 12, 2)),
    ],
)
def test_experts_get_the_evaluations_of_method_md_3_7(grid: str, count: int, served: tuple[int, ...]) -> None:
    assert evaluations(grid, count) == served


def test_grids_are_those_of_diffusers_schedulers() -> None:
    diffusers = pytest.importorskip("diffusers")
    theirs = {
        "sana": diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction"),
        "flow-euler": diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
    }
    for grid, scheduler in theirs.items():
        scheduler.set_timesteps(20)
        ours = sampling_times(SamplerConfig(num_steps=20, grid=grid), 3.0)  # type: ignore[arg-type]
        assert ours == pytest.approx(scheduler.sigmas[:-1].tolist(), abs=1e-6), grid


def test_one_step_starts_at_noise_on_every_grid() -> None:
    assert [sampling_times(SamplerConfig(num_steps=1, grid=grid), 3.0)[0] for grid in ("uniform", "flow-euler")] == [1, 1]
    with pytest.raises(ValueError, match=r"sampler\.grid: got 'sana'; expected unset where times are given"):
        SamplerConfig(num_steps=1, times=(1.0,), grid="sana")


def test_an_expert_that_never_runs_is_named_with_what_would_help() -> None:
    told = unvisited_experts(SamplerConfig(num_steps=8), 3.0, PAPER_BOUNDARIES)
    assert told is not None
    assert "8 steps on the uniform grid without a noise level for expert 4 of 4 (0.000 to 0.223)" in told
    assert "fix: take at least 12 steps or set sampler.grid to flow-euler" in told
    for cure in (SamplerConfig(num_steps=12), SamplerConfig(num_steps=8, grid="flow-euler")):
        assert unvisited_experts(cure, 3.0, PAPER_BOUNDARIES) is None
    listed = unvisited_experts(SamplerConfig(num_steps=2, times=(1.0, 0.1)), 3.0, (0.2, 0.9))
    assert listed is not None
    assert "times without a noise level for expert 2 of 3 (0.200 to 0.900)" in listed


@given(st.sets(st.floats(0.001, 0.999), max_size=4), st.integers(1, 20))
def test_every_expert_gets_a_step_where_experts_are_compared(boundaries: set[float], count: int) -> None:
    sampler, ascending = SamplerConfig(num_steps=count), sorted(boundaries)
    times = times_for_all(sampler, 3.0, ascending)
    assert min(steps_per_expert(times, ascending)) >= 1
    assert set(times) >= set(sampling_times(sampler, 3.0))
    assert len(times) - count == steps_per_expert(sampling_times(sampler, 3.0), ascending).count(0)
    SamplerConfig(num_steps=len(times), times=times)  # What a sampler accepts.


def test_sampling_warns_and_says_nothing_when_all_experts_run() -> None:
    config = ModelConfig(backbone=BackboneConfig(width=32, num_blocks=1, caption_width=8))
    statistics = LatentStatistics(mean=(0.0,) * 48, std=(1.0,) * 48, residual_std=(1.0,) * 48)
    sampler = RoutedSampler([SuperResolver(config, statistics)] * 2, (0.2,), SamplerConfig(num_steps=2, times=(1.0, 0.1)))
    inputs = (torch.randn(1, 48, 2, 2), torch.zeros(1, 3, 2, 2), torch.zeros(1, 1, dtype=torch.long))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error")
        sampler.sample(*inputs)
        with pytest.raises(UnvisitedExpertWarning, match=r"expert 2 of 2 \(0\.000 to 0\.200\)"):
            sampler.sample(*inputs, steps=1)
