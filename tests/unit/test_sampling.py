"""Samplers: exact on paths whose answer is known, and consistent with each other."""

import pytest
import torch
from torch import Tensor

from linearsr.config import SamplerConfig
from linearsr.sampling import sample, sample_dpm_solver_2m, sample_euler, sampling_times

TIMES = sampling_times(SamplerConfig(num_steps=20), shift=3.0)


def gaussian_denoiser(z: Tensor, t: float) -> Tensor:
    """Exact E[z_0 | z_t] for z_0 ~ N(0, 0.5^2)."""
    variance = (1 - t) ** 2 * 0.25 + t**2
    return (1 - t) * 0.25 / variance * z


def test_default_times_are_the_shifted_grid() -> None:
    assert TIMES[0] == 1
    assert TIMES[-1] == pytest.approx(3 * 0.05 / 1.1)
    assert list(TIMES) == sorted(TIMES, reverse=True)


def test_one_step_returns_the_estimate_itself() -> None:
    noise = torch.randn(1, 2, 2, 2)
    assert torch.equal(sample_euler(lambda z, t: 3 * z, noise, (1.0,)), 3 * noise)


@pytest.mark.parametrize("kind", ["euler", "dpm++2m"])
def test_samplers_follow_the_exact_flow_of_a_gaussian(kind: str) -> None:
    # The probability-flow ODE maps N(0, 1) to N(0, 0.5^2) linearly: z_0 = 0.5 z_1.
    noise = torch.randn(1, 1, 8, 8, dtype=torch.float64)
    times = sampling_times(SamplerConfig(num_steps=400), shift=1.0)
    result = sample(gaussian_denoiser, noise, times, kind=kind, expert_of=lambda t: 0)
    torch.testing.assert_close(result, 0.5 * noise, rtol=2e-2, atol=0)


def test_second_order_needs_fewer_steps() -> None:
    noise = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    errors = {
        kind: abs(sample(gaussian_denoiser, noise, TIMES, kind=kind, expert_of=lambda t: 0).item() - 0.5) for kind in ("euler", "dpm++2m")
    }
    assert errors["dpm++2m"] < errors["euler"] / 2


def test_history_is_dropped_when_the_expert_changes() -> None:
    noise = torch.randn(1, 1, 4, 4, dtype=torch.float64)
    switching = iter(range(10_000))
    always_new = sample_dpm_solver_2m(gaussian_denoiser, noise, TIMES, lambda t: next(switching))
    torch.testing.assert_close(always_new, sample_euler(gaussian_denoiser, noise, TIMES))
