"""Intervals of paired differences hold what they promise, and a win within noise is not called one."""

import json
from collections.abc import Sequence

import numpy as np
import pytest

from linearsr_platform.report.comparison import paired_comparison
from linearsr_platform.report.search_model import Comparison, SearchReport, TrialRow, conclusions
from linearsr_platform.stages.finalists import Contender, compare, comparisons_of, data_of

SEEDS, CROPS = 3, 32


def draw(rng: np.random.Generator, *, seed_spread: float, crop_spread: float, noise: float) -> np.ndarray:
    """Differences whose true mean is 0."""
    of_seeds, of_crops = seed_spread * rng.standard_normal((SEEDS, 1)), crop_spread * rng.standard_normal((1, CROPS))
    return of_seeds + of_crops + noise * rng.standard_normal((SEEDS, CROPS))


def reported(comparisons: Sequence[Comparison]) -> SearchReport:
    """Return a report of these comparisons and one trial."""
    best = TrialRow(
        name="trial-000", boundaries=(), origin="search", state="done", rung=1, rungs=1, score=20.0, score_error=0.1, trained=1, cached=0,
        seconds=1.0,
    )  # fmt: skip
    return SearchReport(
        name="s", metric="psnr_y", higher_is_better=True, trials=(best,), proposals=(), comparisons=tuple(comparisons), best=best,
        profile=None, trained=0, cached=0, seconds=0.0, started="",
    )  # fmt: skip


def winner(comparisons: list[Comparison]) -> str:
    """Return the label of what a report of these comparisons recommends."""
    report = reported(comparisons)
    assert report.winner is not None
    return report.winner.label


@pytest.mark.parametrize(("seed_spread", "crop_spread", "noise"), [(1, 0, 1), (0, 1, 1), (0.3, 1, 0.5), (0, 0, 1)])
def test_an_interval_holds_the_truth_as_often_as_it_says(seed_spread: float, crop_spread: float, noise: float) -> None:
    rng = np.random.default_rng(0)
    draws = [draw(rng, seed_spread=seed_spread, crop_spread=crop_spread, noise=noise) for _ in range(1000)]
    intervals = [paired_comparison(values, confidence=0.95).interval for values in draws]
    assert np.mean([low <= 0 <= high for low, high in intervals]) > 0.93


def test_an_interval_is_not_wide_where_little_varies() -> None:
    """With seeds that do not matter it comes near the one over crops alone, for which 32 are enough."""
    rng = np.random.default_rng(1)
    found = [paired_comparison(draw(rng, seed_spread=0, crop_spread=1, noise=0.2), confidence=0.95).interval for _ in range(200)]
    assert np.median([high - low for low, high in found]) == pytest.approx(2 * 1.96 / CROPS**0.5, rel=0.15)


def test_one_seed_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got 1 seeds and 4 crops; .* fix: raise search.finalists.seeds"):
        paired_comparison(np.zeros((1, 4)), confidence=0.95)


def test_only_a_win_beyond_noise_takes_the_place_of_what_the_trials_found() -> None:
    rng = np.random.default_rng(2)
    scores = 20 + rng.standard_normal((1, 1, CROPS)) + 0.01 * rng.standard_normal((3, SEEDS, CROPS))
    scores[1] += 0.001
    contenders = [
        Contender(label=name, boundaries=cuts) for name, cuts in (("best found", (0.4,)), ("paper", (0.875,)), ("single expert", ()))
    ]
    first, *others = compare(contenders, scores, higher_is_better=True)
    assert (first.label, first.verdict, first.difference) == ("best found", "reference", None)
    assert {one.label: one.verdict for one in others} == {"paper": "no difference", "single expert": "no difference"}
    assert winner([first, *others]) == "best found"

    scores[1] += 0.1
    told = compare(contenders, scores, higher_is_better=True)
    assert [one.label for one in told] == ["best found", "paper", "single expert"]
    assert winner(told) == "paper"
    assert told[1].difference == pytest.approx(0.101, abs=0.01)
    assert winner(compare(contenders, -scores, higher_is_better=False)) == "paper"


def test_a_crop_without_a_finite_score_is_told_and_kept() -> None:
    scores = 20 + np.random.default_rng(3).standard_normal((3, SEEDS, CROPS))
    scores[1, 1, 0] = np.nan
    contenders = [Contender(label=name, boundaries=()) for name in ("best found", "paper", "single expert")]
    told = compare(contenders, scores, higher_is_better=True)
    assert [(one.label, one.verdict == "not known") for one in told] == [
        ("best found", False), ("single expert", False), ("paper", True)
    ]  # fmt: skip
    data = data_of(told, seeds=[1, 2, 3], means={"paper": {"psnr_y": np.nan}})
    read = comparisons_of(json.loads(json.dumps(data, allow_nan=False)))
    assert repr(read) == repr(tuple(told))
    assert "cannot be compared with the paper's" in "".join(conclusions(reported(read)))
