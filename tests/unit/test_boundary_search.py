"""The searcher and the scheduler of a boundary search, driven as Ray Tune drives them, without Ray."""

from itertools import pairwise
from types import SimpleNamespace

import pytest

from linearsr.experts import intervals, log_snr
from linearsr.partition import CutGrid, Proposal, propose
from linearsr_platform.cluster.boundary_search import BoundarySpace, PastTrial, boundaries_of, boundary_search
from linearsr_platform.cluster.rungs import rung_scheduler
from linearsr_platform.errors import UserError

GRID = CutGrid()
PROPOSALS = propose(4, profile=None, grid=GRID)
STEP_AND_ROUNDING = GRID.step / 2 + 1e-6
TARGET = (0.2, 0.6, 0.9)


def make(experts=(4,), proposals=PROPOSALS, grid=GRID, **settings):
    return boundary_search(
        grid, experts, proposals, metric="score", mode=settings.pop("mode", "max"), seed=settings.pop("seed", 0), **settings
    )


def score_of(boundaries):
    """Minus the squared distance from a target in log-SNR; boundaries beyond three count nothing."""
    return -sum((log_snr(one) - log_snr(other)) ** 2 for one, other in zip(boundaries, TARGET, strict=False))


def drive(searcher, names, grid=GRID, failing=()):
    """Suggest and finish one trial after another; returns their boundaries."""
    found = []
    for name in names:
        found.append(boundaries_of(searcher.suggest(name), grid))
        if name in failing:
            searcher.on_trial_complete(name, error=True)
        else:
            searcher.on_trial_complete(name, result={"score": score_of(found[-1])})
    return found


def names(count, start=0):
    return [f"t{number}" for number in range(start, start + count)]


def trained_anew(found):
    """Return how many intervals of each trial no trial before it had."""
    known, new = set(), []
    for boundaries in found:
        new.append(len(set(intervals(boundaries)) - known))
        known |= set(intervals(boundaries))
    return new


def test_the_proposals_come_first_in_order_on_the_grid_and_each_once():
    twice = [*PROPOSALS, Proposal(name="again", boundaries=PROPOSALS[0].boundaries), Proposal(name="other", boundaries=(0.5,))]
    found = drive(make(proposals=twice), names(len(PROPOSALS) + 1))
    for proposal, boundaries in zip(PROPOSALS, found, strict=False):
        distance = max(abs(log_snr(one) - log_snr(other)) for one, other in zip(boundaries, proposal.boundaries, strict=True))
        assert distance <= STEP_AND_ROUNDING
    assert len(set(found)) == len(found)
    assert all(len(boundaries) == 3 for boundaries in found)


@pytest.mark.parametrize("seed", [0, 2**63 - 1])
def test_every_suggestion_is_valid_and_none_is_repeated(seed):
    found = drive(make(experts=(1, 2, 4), seed=seed), names(60))
    assert {len(boundaries) + 1 for boundaries in found} <= {1, 2, 4}
    assert len(set(found)) == len(found)
    for boundaries in found:
        edges = [GRID.low, *sorted(log_snr(one) for one in boundaries), GRID.high]
        assert min(high - low for low, high in pairwise(edges)) >= GRID.min_width - 1e-6


def test_a_small_grid_is_tried_out_before_the_best_is_repeated():
    grid = CutGrid(low=-2, high=2, step=0.5, min_width=0.5)
    places = 7 * 6 // 2  # Two of the seven inner cuts.
    found = drive(make(experts=(3,), proposals=[], grid=grid), names(places + 2), grid=grid)
    assert len(set(found[:places])) == places
    assert set(found[places:]) == {max(found, key=score_of)}


@pytest.mark.parametrize(("far", "kept"), [(False, 2), (True, 1)])
def test_moving_one_boundary_leaves_all_but_its_own_experts_as_they_were(far, kept):
    space = BoundarySpace(grid=GRID, experts=(4,))
    for offsets in [(0, 10, 30), (7, 7, 7), (0, 0, GRID.slack(4)), GRID.offsets(PROPOSALS[0].boundaries)]:
        for index in range(3):
            moves = space.moves(offsets, index, far=far)
            assert moves[offsets[index]] == offsets
            for moved in moves.values():
                assert len(space.intervals(offsets) & space.intervals(moved)) >= kept
                assert len(set(GRID.boundaries(offsets)) & set(GRID.boundaries(moved))) >= 2
        assert max(len(space.moves(offsets, index, far=True)) for index in range(3)) > GRID.slack(4) / 2


def test_trials_after_the_proposals_reuse_most_experts():
    found = drive(make(), names(40))
    new = trained_anew(found)[8:]
    assert sum(new) / len(new) < 1.6  # Of four; about 1.9 if only one boundary moved, and not to where another trial had it.


@pytest.mark.parametrize(("mode", "sign"), [("max", 1), ("min", -1)])
def test_the_search_gets_much_closer_to_the_best_than_its_proposals(mode, sign):
    searcher, distances = make(mode=mode), []
    for name in names(50):
        distances.append(-score_of(boundaries_of(searcher.suggest(name), GRID)))
        searcher.on_trial_complete(name, result={"score": -sign * distances[-1]})
    assert min(distances) < 0.2 * min(distances[: len(PROPOSALS)])


def test_the_same_seed_gives_the_same_trials_and_another_gives_others():
    assert drive(make(seed=3), names(20)) == drive(make(seed=3), names(20))
    assert drive(make(seed=3), names(20)) != drive(make(seed=4), names(20))


def test_a_saved_searcher_goes_on_as_if_it_had_not_been_interrupted(tmp_path):
    whole = drive(make(), names(30))
    first = make()
    begun = drive(first, names(12))
    running = boundaries_of(first.suggest("t12"), GRID)
    first.save(str(tmp_path / "searcher.pkl"))
    second = make(seed=99)
    second.restore(str(tmp_path / "searcher.pkl"))
    second.on_trial_complete("t12", result={"score": score_of(running)})
    assert [*begun, running, *drive(second, names(17, start=13))] == whole


def test_running_and_failed_trials_are_not_suggested_again_and_break_nothing():
    searcher = make()
    running = [boundaries_of(searcher.suggest(name), GRID) for name in names(6)]
    found = drive(searcher, names(30, start=6), failing={"t6", "t9", "t20"})
    assert len(set(running + found)) == 36


def test_what_ended_before_an_interruption_is_known_and_what_had_not_comes_first():
    searcher = make()
    configs = {name: searcher.suggest(name) for name in names(8)}
    history = [
        PastTrial(config=config, scores=() if name == "t5" else (score_of(boundaries_of(config, GRID)),), ended=name not in ("t2", "t7"))
        for name, config in configs.items()
    ]
    found = drive(make(history=history), names(20, start=8))
    assert found[:2] == [boundaries_of(configs["t2"], GRID), boundaries_of(configs["t7"], GRID)]
    ended = {boundaries_of(config, GRID) for config in configs.values()}
    assert not ended & set(found[2:])


def test_who_got_furthest_ranks_above_a_high_score_at_an_early_rung():
    places = [Proposal(name=str(high), boundaries=(0.2, 0.5, high)) for high in (0.93, 0.95, 0.97)]
    finished, stopped, running = (make(proposals=[one]).suggest("t0") for one in places)
    history = [PastTrial(config=stopped, scores=(9.0,), ended=True), PastTrial(config=finished, scores=(1.0, 2.0, 3.0), ended=True)]
    searcher = make(proposals=places[2:], history=history)
    assert searcher.suggest("t0") == running
    searcher.on_trial_result("t0", {"score": 0.0, "training_iteration": 1})
    ranked = searcher._sampler._history(searcher._ot_study, SimpleNamespace(number=-1)).ranked
    assert [GRID.boundaries(offsets) for offsets in ranked] == [boundaries_of(config, GRID) for config in (finished, running, stopped)]


def test_no_experts_and_too_many_are_refused():
    with pytest.raises(UserError, match=r"search\.experts"):
        make(experts=())
    with pytest.raises(ValueError, match="40 experts"):
        make(experts=(40,))


def trial(name):
    return SimpleNamespace(trial_id=name)


def report(scheduler, name, steps, score):
    return scheduler.on_trial_result(None, trial(name), {"steps": steps, "score": score})


def started(scheduler, *trials):
    for name in trials:
        scheduler.on_trial_add(None, trial(name))
    return scheduler


def test_the_worse_half_stops_at_our_rungs_and_nobody_at_the_last():
    scheduler = started(rung_scheduler((100, 250, 1000), metric="score", mode="max", reduction=2), *"abcd")
    assert [report(scheduler, name, 100, score) for name, score in zip("abcd", (2, 1, 3, 0), strict=True)] == [
        "CONTINUE",
        "STOP",
        "CONTINUE",
        "STOP",
    ]
    assert [report(scheduler, name, 250, score) for name, score in (("a", 5), ("c", 4))] == ["CONTINUE", "STOP"]
    started(scheduler, "e")
    assert report(scheduler, "a", 1000, 9) == "CONTINUE"
    assert [report(scheduler, "e", steps, score) for steps, score in ((100, 4), (250, 6), (1000, -9))] == ["CONTINUE"] * 3


def test_lower_is_better_where_the_metric_says_so():
    scheduler = started(rung_scheduler((10, 20), metric="score", mode="min", reduction=2), *"ab")
    assert [report(scheduler, "a", 10, 1.0), report(scheduler, "b", 10, 2.0)] == ["CONTINUE", "STOP"]


@pytest.mark.parametrize(("mode", "sign"), [("max", 1), ("min", -1)])
def test_scores_of_an_earlier_attempt_judge_the_first_trial_after_it(mode, sign):
    history = {"old-1": {10: sign * 5.0, 20: sign * 8.0}, "old-2": {10: sign * 4.0}}
    fresh = started(rung_scheduler((10, 20, 30), metric="score", mode=mode, reduction=2), "a")
    knowing = started(rung_scheduler((10, 20, 30), metric="score", mode=mode, reduction=2, history=history), "a", "b")
    assert report(fresh, "a", 10, sign * 1.0) == "CONTINUE"
    assert report(knowing, "a", 10, sign * 1.0) == "STOP"
    assert [report(knowing, "b", 10, sign * 4.6), report(knowing, "b", 20, sign * 7.0)] == ["CONTINUE", "STOP"]


def test_reporting_a_rung_again_changes_nothing(tmp_path):
    once, twice = (started(rung_scheduler((10, 20, 30), metric="score", mode="max", reduction=2), *"abc") for _ in range(2))
    for scheduler in (once, twice):
        report(scheduler, "a", 10, 5.0)
        report(scheduler, "a", 20, 5.0)
    assert [report(twice, "a", 10, -9.0), report(twice, "a", 20, 99.0)] == ["CONTINUE", "CONTINUE"]
    twice.save(str(tmp_path / "scheduler.pkl"))
    twice = rung_scheduler((10, 20, 30), metric="score", mode="max", reduction=2)
    twice.restore(str(tmp_path / "scheduler.pkl"))
    for name, score in (("b", 4.0), ("c", 4.6)):
        assert report(twice, name, 10, score) == report(once, name, 10, score)
    assert once.debug_string() == twice.debug_string()


@pytest.mark.parametrize(("rungs", "reduction"), [((), 2), ((10, 10), 2), ((20, 10), 2), ((0, 10), 2), ((10, 20), 1)])
def test_rungs_that_cannot_be_are_refused(rungs, reduction):
    with pytest.raises(UserError, match=r"search\.re|search\.rungs"):
        rung_scheduler(rungs, metric="score", mode="max", reduction=reduction)
