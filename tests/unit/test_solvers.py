"""Solvers against independent ones: DPM-Solver++ of diffusers, and method.md 1.5 written out in float64."""

from collections.abc import Sequence
from itertools import pairwise
from math import exp, hypot, log, log2

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from linearsr.config import PAPER_BOUNDARIES, BackboneConfig, LatentStatistics, ModelConfig, SamplerConfig, TagsConfig
from linearsr.experts import route
from linearsr.model import SuperResolver
from linearsr.routed import RoutedSampler
from linearsr.sampling import sample_dpm_solver_2m, sample_euler
from linearsr.schedule import sampling_times

SANA_TIMES = sampling_times(SamplerConfig(num_steps=20, grid="sana"), 3.0)
NOISE = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def crooked(z: Tensor, t: float) -> Tensor:
    """A denoiser that bends, so that orders and history show."""
    return torch.sin(2 * z + t) * (1 - t) + 0.3 * torch.cos(5 * t + z)


def written_out(times: Sequence[float], orders: Sequence[int]) -> Tensor:
    """method.md 1.5, term by term, with the order of every step given."""
    z, older, step_before = NOISE, None, None
    for t, after, order in zip(times, (*times[1:], 0.0), orders, strict=True):
        estimate = crooked(z, t)
        if after == 0:
            return estimate
        step = log((1 - after) / after) - log((1 - t) / t)
        blend = estimate
        if order == 2:
            ratio = step_before / step
            blend = (1 + 1 / (2 * ratio)) * estimate - older / (2 * ratio)
        z = (after / t) * z - (1 - after) * (exp(-step) - 1) * blend
        older, step_before = estimate, step
    return z


def test_dpm_solver_is_that_of_the_formulas_first_and_last_step_of_first_order() -> None:
    ours = sample_dpm_solver_2m(crooked, NOISE, SANA_TIMES, lambda t: 0)
    torch.testing.assert_close(ours, written_out(SANA_TIMES, [1, *[2] * 18, 1]), rtol=1e-12, atol=1e-12)


def test_dpm_solver_is_that_of_diffusers() -> None:
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        use_flow_sigmas=True, flow_shift=3.0, prediction_type="flow_prediction", algorithm_type="dpmsolver++", solver_order=2
    )
    scheduler.set_timesteps(20)
    z = NOISE
    for timestep, sigma in zip(scheduler.timesteps, scheduler.sigmas.tolist(), strict=False):
        velocity = (z - crooked(z, sigma)) / sigma
        z = scheduler.step(velocity, timestep, z).prev_sample.double()
    ours = sample_dpm_solver_2m(crooked, NOISE, SANA_TIMES, lambda t: 0)
    torch.testing.assert_close(ours, z, rtol=1e-4, atol=1e-4)


def test_a_switch_of_experts_drops_history_there_and_only_there() -> None:
    ours = sample_dpm_solver_2m(crooked, NOISE, SANA_TIMES, lambda t: route(t, PAPER_BOUNDARIES))
    # 4, 2, 13 and 1 evaluations: the steps from the 1st, 5th, 7th and last are the first of their expert.
    torch.testing.assert_close(ours, written_out(SANA_TIMES, [1, 2, 2, 2, 1, 2, 1, *[2] * 12, 1]), rtol=1e-12, atol=1e-12)
    assert (ours - written_out(SANA_TIMES, [1, *[2] * 18, 1])).abs().max() > 1e-4


@given(
    boundaries=st.lists(st.floats(0.02, 0.98), max_size=5, unique=True).map(sorted),
    num_steps=st.integers(1, 12),
    grid=st.sampled_from(["uniform", "sana"]),
)
def test_kept_history_makes_several_experts_of_one_field_a_single_one(boundaries: list[float], num_steps: int, grid: str) -> None:
    times = sampling_times(SamplerConfig(num_steps=num_steps, grid=grid), 3.0)  # type: ignore[arg-type]
    single = sample_dpm_solver_2m(crooked, NOISE, times, lambda t: 0)
    assert torch.equal(sample_dpm_solver_2m(crooked, NOISE, times, lambda t: route(t, boundaries), keep_history=True), single)
    dropped = sample_dpm_solver_2m(crooked, NOISE, times, lambda t: route(t, boundaries))
    # The last step has no use for history, nor has the first, or the second after one from pure noise.
    second = range(2 if times[0] == 1 else 1, num_steps - 1)
    switches = [route(times[i - 1], boundaries) != route(times[i], boundaries) for i in second]
    assert torch.equal(dropped, single) != any(switches)


def error_across_a_switch(count: int, above: float, below: float, *, keep_history: bool) -> float:
    """Err with `count` steps where the data of the noisier expert are N(0, above^2) and those of the other N(0, below^2).

    Both fields are exact, so are the paths: z_t is proportional to the deviation of z_t. The switch is half-way in log-SNR.
    """
    first, last = (log((1 - t) / t) for t in (0.95, 0.1))
    times = [1 / (1 + exp(first + (last - first) * i / count)) for i in range(count + 1)]
    switch = times[count // 2]

    def expert_of(t: float) -> int:
        return route(t, (switch * (1 + 1e-9),))

    def denoise(z: Tensor, t: float) -> Tensor:
        sigma = (above, below)[expert_of(t)]
        return (1 - t) * sigma**2 / hypot((1 - t) * sigma, t) ** 2 * z

    z = NOISE
    for sigma, start, end in ((above, times[0], switch), (below, switch, times[-1])):
        z = z * hypot((1 - end) * sigma, end) / hypot((1 - start) * sigma, start)
    found = sample_dpm_solver_2m(denoise, NOISE, times, expert_of, keep_history=keep_history)
    return (found - denoise(z, times[-1])).abs().max().item()


def orders(above: float, below: float, *, keep_history: bool) -> list[float]:
    """Orders of convergence, each seen in twice as many steps."""
    errors = [error_across_a_switch(count, above, below, keep_history=keep_history) for count in (32, 64, 128, 256)]
    return [log2(coarse / fine) for coarse, fine in pairwise(errors)]


def test_kept_history_is_of_second_order_across_a_switch_where_experts_agree_and_of_first_where_not() -> None:
    assert orders(0.5, 0.5, keep_history=True) == pytest.approx([2, 2, 2], abs=0.1)
    assert orders(0.5, 0.4, keep_history=True) == pytest.approx([1, 1, 1], abs=0.25)
    # One step of first order among many costs no order.
    assert min(orders(0.5, 0.4, keep_history=False)) > 1.9


def test_a_first_step_from_pure_noise_is_the_limit_of_one_from_nearly_pure_noise() -> None:
    rest = SANA_TIMES[1:]
    limit = sample_dpm_solver_2m(crooked, NOISE, (1.0, *rest), lambda t: 0)
    torch.testing.assert_close(sample_dpm_solver_2m(crooked, NOISE, (1 - 1e-12, *rest), lambda t: 0), limit, rtol=0, atol=5e-2)
    torch.testing.assert_close(sample_euler(crooked, NOISE, (1.0,)), crooked(NOISE, 1.0))


@pytest.mark.parametrize("prior", ["none", "lr"])
def test_guidance_on_clean_estimates_is_guidance_on_velocities(prior: str) -> None:
    config = ModelConfig(
        backbone=BackboneConfig(width=32, num_blocks=1, caption_width=8),
        tags=TagsConfig(vocabulary=("cat",)),
        prior=prior,  # type: ignore[arg-type]
    )
    network = SuperResolver(config, LatentStatistics(mean=(0.1,) * 48, std=(0.5,) * 48, residual_std=(0.4,) * 48))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    noise, pixels, tags = torch.randn(2, 48, 3, 3), torch.rand(2, 3, 3, 3), torch.tensor([[1, 0]] * 2)
    first, then = 0.9, 0.4
    sampler = RoutedSampler([network], (), SamplerConfig(num_steps=2, times=(first, then), guidance_scale=4.5))

    def velocity(z: Tensor, t: float) -> Tensor:
        branches = (network.denoise(z, t, network.condition(pixels, ids)) for ids in (torch.zeros_like(tags), tags))
        without, with_tags = ((z - clean).double() / t for clean in branches)
        return without + 4.5 * (with_tags - without)

    with torch.no_grad():
        z = noise + (then - first) * velocity(noise, first).float()
        expected = z - then * velocity(z, then).float()
        torch.testing.assert_close(sampler.sample(noise, pixels, tags), expected, rtol=1e-4, atol=1e-4)


def test_the_sampler_s_history_is_what_the_routed_sampler_does_at_a_switch() -> None:
    config = ModelConfig(backbone=BackboneConfig(width=32, num_blocks=1, caption_width=8))
    network = SuperResolver(config, LatentStatistics(mean=(0.1,) * 48, std=(0.5,) * 48, residual_std=(0.4,) * 48))
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    noise, pixels, tags = torch.randn(1, 48, 3, 3), torch.rand(1, 3, 3, 3), torch.zeros(1, 1, dtype=torch.long)

    def drawn(boundaries: tuple[float, ...], **settings: str) -> Tensor:
        sampler = SamplerConfig(kind="dpm++2m", num_steps=5, **settings)  # type: ignore[arg-type]
        with torch.no_grad():
            return RoutedSampler([network] * (len(boundaries) + 1), boundaries, sampler).sample(noise, pixels, tags)

    assert torch.equal(drawn((0.8,), history="keep"), drawn(()))
    assert torch.equal(drawn((0.8,), history="drop"), drawn((0.8,)))
    assert not torch.equal(drawn((0.8,)), drawn(()))


def test_without_a_prior_the_network_predicts_the_velocity_and_nothing_else() -> None:
    config = ModelConfig(backbone=BackboneConfig(width=32, num_blocks=1, caption_width=8), prior="none")
    network = SuperResolver(config, LatentStatistics(mean=(0.1,) * 48, std=(0.5,) * 48, residual_std=(0.4,) * 48))
    torch.nn.init.normal_(network.network.head.weight, std=0.5)
    z, lr, tags = torch.randn(2, 48, 3, 3), torch.rand(2, 3, 3, 3), torch.zeros(2, 1, dtype=torch.long)
    condition = network.condition(lr, tags)
    with torch.no_grad():
        for t in (0.01, 0.5, 1.0):
            level = torch.full((2,), t)
            velocity = network.network(z, level, condition.network)
            assert torch.equal(network.denoise(z, t, condition), z - level[:, None, None, None] * velocity)
            torch.testing.assert_close(network.space.error_scale(level[:, None, None, None]).flatten(), level)


def test_with_the_lr_prior_input_and_output_are_those_of_the_posterior() -> None:
    config = ModelConfig(backbone=BackboneConfig(width=32, num_blocks=1, caption_width=8), prior="lr")
    sigma, t = 0.4, 0.6
    network = SuperResolver(config, LatentStatistics(mean=(0.1,) * 48, std=(0.5,) * 48, residual_std=(sigma,) * 48))
    torch.nn.init.normal_(network.network.head.weight, std=0.5)
    lr, tags = torch.rand(1, 3, 3, 3) * 2 - 1, torch.zeros(1, 1, dtype=torch.long)
    with torch.no_grad():
        condition = network.condition(lr, tags)
        mean = network.space.prior_mean(lr)
        # Many clean latents under the prior, and what their noisy versions tell about them, by regression on samples.
        clean = mean + sigma * torch.randn(4000, *mean.shape[1:])
        noisy = (1 - t) * clean + t * torch.randn_like(clean)
        excess, residual = noisy - (1 - t) * mean, clean - mean
        slope = (excess * residual).mean() / excess.square().mean()
        left = (residual - slope * excess).std()
        z = noisy[:1]
        prediction = network.network(slope * excess[:1] / sigma, torch.full((1,), t), condition.network)
        expected = mean + slope * excess[:1] + left * prediction
        torch.testing.assert_close(network.denoise(z, t, condition), expected, rtol=2e-2, atol=2e-2)
