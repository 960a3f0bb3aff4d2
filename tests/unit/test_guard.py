"""The guard's policy on plain numbers, its probe on an attention, and diagnosis on what workers saw."""

import json
import random

import pytest
import torch
from torch import nn

from linearsr.attention import LinearAttention
from linearsr.guard import AttentionReading, Fault, Guard, GuardConfig, StepReading, Trip, lr_scale, number_in_series
from linearsr.probes import AttentionProbe
from linearsr_platform.train.diagnosis import bad_weights, first_not_finite, first_standing_out, grown_weights
from linearsr_platform.train.examination import Journal
from linearsr_platform.train.results import Sighting

NAN, INF = float("nan"), float("inf")
CONFIG = GuardConfig()


def noisy(first: int, count: int, *, level: float = 1.0, seed: int = 0) -> list[StepReading]:
    """Steps whose loss and gradient norm scatter by 20 %."""
    draw = random.Random(seed + first)
    return [StepReading(step, level * draw.lognormvariate(0, 0.2), draw.lognormvariate(0, 0.2)) for step in range(first, first + count)]


def fed(config: GuardConfig = CONFIG, steps: int = 100) -> Guard:
    guard = Guard(config)
    for first in range(1, steps, 10):
        assert guard.observe(noisy(first, 10)) is None
    return guard


def trip(*, number: int = 1, back: int = 100, scale: float = 0.5) -> Trip:
    return Trip(
        step=back + 9,
        detected_at=back + 10,
        statistic="loss",
        value="nan",
        limit="a finite number",
        layer="head.weight",
        evidence="gradient of head.weight on worker 1: nan",
        bad_data=False,
        action="rolled back",
        rolled_back_to=back,
        lr_scale=scale,
        number=number,
    )


@pytest.mark.parametrize(("loss", "norm", "statistic"), [(NAN, 1.0, "loss"), (1.0, INF, "gradient norm"), (1.0, -1.0, "gradient norm")])
def test_a_number_that_is_not_finite_trips_at_once_and_its_first_step_is_named(loss: float, norm: float, statistic: str) -> None:
    fault = Guard(CONFIG).observe([StepReading(1, 1.0, 1.0), StepReading(2, loss, norm), StepReading(3, NAN, NAN)])
    assert fault is not None
    assert (fault.step, fault.detected_at, fault.statistic, fault.finite) == (2, 3, statistic, False)


def test_strikes_trip_only_when_they_come_close_together() -> None:
    scattered, close = fed(), fed()
    for first in range(101, 201, 25):
        assert scattered.observe([StepReading(first, 10.0, 1.0), *noisy(first + 1, 24)]) is None
    assert close.observe([StepReading(101, 10.0, 1.0), *noisy(102, 9)]) is None
    assert not close.calm
    fault = close.observe([StepReading(111, 10.0, 1.0), StepReading(112, 1.0, 1.0), StepReading(113, 10.0, 1.0)])
    assert fault is not None
    assert (fault.step, fault.detected_at, fault.statistic, fault.value) == (101, 113, "loss", 10.0)


def test_gradient_norm_has_its_own_limit() -> None:
    fault = fed().observe([StepReading(step, 1.0, 50.0) for step in (101, 102, 103)])
    assert fault is not None
    assert (fault.step, fault.statistic) == (101, "gradient norm")
    assert fault.limit == pytest.approx(10.0, rel=0.1)


def test_one_surge_is_enough_and_a_single_high_step_is_not() -> None:
    assert fed().observe([StepReading(101, 30.0, 1.0)]) is None
    fault = fed().observe([StepReading(101, 100.0, 1.0)])
    assert fault is not None
    assert fault.limit == pytest.approx(50.0, rel=0.1)


def test_there_are_no_limits_before_there_is_a_history() -> None:
    guard = fed(steps=40)
    assert guard.observe([StepReading(step, 1e6, 1e6) for step in range(41, 46)]) is None
    assert guard.loss_limit() is None


def test_a_loss_that_falls_a_hundredfold_never_trips() -> None:
    guard = Guard(CONFIG)
    for first in range(1, 2000, 10):
        assert guard.observe(noisy(first, 10, level=100 / (1 + first / 20))) is None
        assert guard.calm


def test_a_rollback_forgets_strikes_and_the_steps_undone() -> None:
    guard = fed()
    guard.observe([StepReading(101, 10.0, 1.0), StepReading(102, 10.0, 1.0)])
    guard.rolled_back(60)
    assert guard.calm
    assert guard.loss_limit() is not None
    assert guard.observe([StepReading(61, 10.0, 1.0)]) is None
    guard.rolled_back(40)
    assert guard.loss_limit() is None


def test_a_guard_that_goes_on_from_what_another_remembered_comes_to_the_same_faults() -> None:
    def remembered(guard: Guard) -> Guard:
        again = Guard(CONFIG)
        again.restore(json.loads(json.dumps(guard.state())))
        return again

    seen = fed(steps=600)
    seen.observe([StepReading(601, 10.0, 1.0), StepReading(602, 10.0, 1.0), StepReading(603, 1e4, 1.0, screened=True)])
    again = remembered(seen)
    assert again.loss_limit() == seen.loss_limit() is not None
    assert again.state() == seen.state()
    third, screened = [StepReading(604, 10.0, 1.0)], [StepReading(step, 1e4, 1.0, screened=True) for step in range(604, 1000)]
    for readings, statistic in ((third, "loss"), (screened, "share of screened steps")):
        faults = [remembered(seen).observe(readings) for _ in range(2)]
        assert faults == [remembered(again).observe(readings)] * 2
        assert faults[0] is not None
        assert faults[0].statistic == statistic


def test_screened_steps_neither_strike_nor_move_the_limits() -> None:
    guard = fed()
    before = guard.loss_limit()
    assert guard.observe([StepReading(step, 1e4, 1e3, screened=True) for step in range(101, 151)]) is None
    assert guard.loss_limit() == before
    limit, quarter = guard.loss_limit(), guard.loss_limit(4)
    assert limit is not None
    assert quarter is not None
    assert quarter - 1 == pytest.approx(2 * (limit - 1), rel=0.2)


def test_data_that_is_mostly_bad_trips_although_it_is_screened() -> None:
    guard = Guard(GuardConfig(history=60))
    assert guard.observe([StepReading(step, 1.0, 1.0, screened=step % 2 == 0) for step in range(1, 201)]) is None
    fault = guard.observe([StepReading(step, 1e4, 1.0, screened=True) for step in range(201, 211)])
    assert fault is not None
    assert (fault.statistic, fault.step) == ("share of screened steps", 201)


def test_switched_off_it_still_refuses_what_is_not_finite_and_nothing_else() -> None:
    guard = Guard(GuardConfig(enabled=False))
    assert guard.observe([*noisy(1, 100), *(StepReading(step, 1e6, 1e6) for step in range(101, 120))]) is None
    assert guard.observe([StepReading(120, NAN, 1.0)]) is not None


def test_attentions_trip_by_layer_and_worker() -> None:
    sound = AttentionReading("blocks.0.attention", 0, 0.1, 0.0, 3.0, 5.0)
    readings = [
        sound,
        AttentionReading("blocks.0.attention", 1, 0.1, 0.0, 3.0, INF),
        AttentionReading("blocks.1.attention", 0, 1, 0, NAN, 1),
    ]
    fault = Guard(CONFIG).observe_attention(7, 10, readings)
    assert fault is not None
    assert (fault.step, fault.detected_at, fault.statistic, fault.layer, fault.worker) == (7, 10, "normaliser", "blocks.0.attention", 1)
    large = Guard(CONFIG).observe_attention(7, 10, [AttentionReading("blocks.0.attention", 0, 0.1, 0.0, 2e4, 5.0)])
    assert large is not None
    assert (large.statistic, large.limit) == ("activation", 1e4)
    assert Guard(CONFIG).observe_attention(7, 10, [sound]) is None


def test_a_validation_metric_that_is_not_finite_trips() -> None:
    fault = Guard(CONFIG).observe_validation(50, {"psnr_y": 20.0, "gmsd": NAN})
    assert fault == Fault(50, 50, "validation gmsd", fault.value) if fault else False
    assert Guard(CONFIG).observe_validation(50, {"psnr_y": 20.0}) is None


def test_rate_is_cut_climbs_back_and_a_series_ends() -> None:
    assert lr_scale(CONFIG, [], 500) == 1.0
    rates = [lr_scale(CONFIG, [trip()], step) for step in (100, 125, 150, 9000)]
    assert rates == [0.5, 0.75, 1.0, 1.0]
    assert number_in_series(CONFIG, [], 5) == 1
    assert number_in_series(CONFIG, [trip(number=2)], 900) == 3
    assert number_in_series(CONFIG, [trip(number=2)], 1200) == 1


def test_a_trip_is_json_whatever_was_seen() -> None:
    once = trip()
    assert Trip(**json.loads(json.dumps(once.to_json(), allow_nan=False))) == once
    assert "gradient of head.weight on worker 1: nan; back to step 100, learning rate x0.5" in once.describe()


@pytest.mark.parametrize(
    "setting",
    [{"lr_cut": 0.0}, {"max_rollbacks": -1}, {"strikes": 30}, {"norm_factor": 1.0}, {"min_history": 600}, {"loss_deviations": 0.0}],
)
def test_settings_out_of_range_are_named(setting: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=f"guard\\.({next(iter(setting))}|window|history): got"):
        GuardConfig(**setting)


def test_probe_reads_the_normaliser_that_the_attention_divides_by() -> None:
    torch.manual_seed(0)
    attention, x = LinearAttention(8, 4), torch.randn(2, 5, 8)
    plain = attention(x)
    probe = attention.probe = AttentionProbe()
    assert torch.equal(attention(x), plain)
    query, key, _ = attention.qkv(x).chunk(3, dim=-1)
    heads = [part.relu().unflatten(-1, (-1, 4)).transpose(1, 2) for part in (query, key)]
    normaliser = (heads[0] * heads[1].sum(dim=-2, keepdim=True)).sum(-1)
    smallest, dead, magnitude, largest = probe.reading().tolist()
    assert smallest == pytest.approx(normaliser[normaliser > 0].min().item(), rel=1e-5)
    assert dead == pytest.approx((normaliser == 0).float().mean().item())
    assert magnitude == pytest.approx(x.abs().max().item())
    assert largest == pytest.approx(normaliser.max().item(), rel=1e-5)

    attention.probe = nan_probe = AttentionProbe()
    x[1, 2, 3] = NAN
    attention(x)
    assert not torch.isfinite(nan_probe.reading()[2:]).any()


def test_journal_names_the_layer_where_a_gradient_first_goes_bad() -> None:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    network[2].bias.register_hook(lambda gradient: gradient * NAN)
    network[3].register_full_backward_pre_hook(lambda module, gradients: tuple(gradient * NAN for gradient in gradients))
    with Journal(network) as journal:
        loss = network(torch.randn(5, 3)).square().mean()
        journal.watch_gradients()
        loss.backward()
    own = journal.sightings()
    assert [one.kind for one in own] == ["output"] * 6 + ["gradient"] * 6
    found = first_not_finite([own])
    assert found is not None
    assert found.layer in ("2.weight", "2.bias")
    network(torch.randn(5, 3)).square().mean().backward()
    assert len(journal.sightings()) == len(own)


def test_forward_comes_before_backward_and_the_earlier_layer_before_the_earlier_worker() -> None:
    first = [Sighting("output", "a", 1.0), Sighting("output", "b", NAN), Sighting("gradient", "b.weight", NAN)]
    second = [Sighting("output", "a", INF), Sighting("output", "b", NAN), Sighting("gradient", "b.weight", NAN)]
    found = first_not_finite([first, second])
    assert found is not None
    assert (found.layer, found.evidence) == ("a", "output of a on worker 1: inf")
    assert first_not_finite([[Sighting("output", "a", 1.0)]]) is None


def test_what_stands_out_is_measured_against_a_sound_step() -> None:
    sound = [Sighting("output", "a", 100.0), Sighting("output", "b", 1.0), Sighting("gradient", "a.weight", 5.0)]
    bad = [Sighting("output", "a", 110.0), Sighting("output", "b", 20.0), Sighting("gradient", "a.weight", 500.0)]
    found = first_standing_out([sound, bad], [sound, sound])
    assert found is not None
    assert (found.layer, found.evidence) == ("b", "output of b on worker 1: 20, 20 times a sound step's")
    alone = first_standing_out([bad], None)
    assert alone is not None
    assert alone.layer == "a.weight"


def test_weights_are_blamed_unless_all_of_them_are_bad() -> None:
    assert bad_weights({"a": 1.0, "b": NAN, "c": 2.0}) is not None
    assert bad_weights({"a": NAN, "b": NAN}) is None
    assert bad_weights({"a": 1.0}) is None
    assert grown_weights({"a": 1.1, "b": 30.0}, {"a": 1.0, "b": 2.0}) == "weights of b had grown 15-fold"
    assert grown_weights({"a": 1.1, "b": NAN}, {"a": 1.0, "b": 2.0}) == ""
