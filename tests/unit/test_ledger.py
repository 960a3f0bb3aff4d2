"""The ledger of a search survives any interruption and counts every trial and every training once."""

import math
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from linearsr_platform.recipe.load import load_recipe
from linearsr_platform.stages.finalists import contenders_of
from linearsr_platform.stages.ledger import Ledger, RungResult, TrialRecord

A, B, C = {"experts": 2, "cut_1_of_1": 3}, {"experts": 2, "cut_1_of_1": 7}, {"experts": 2, "cut_1_of_1": 9}


def report(ledger: Ledger, record: TrialRecord, steps: int, experts: tuple[str, ...], score: float = 20.0) -> TrialRecord:
    result = RungResult(steps=steps, score=score, score_error=0.1, measured={"psnr_y": [score]}, experts=experts, order=ledger.next_order())
    known = ledger.records[record.name].with_result(result)
    ledger.put(known)
    return known


def test_an_interrupted_trial_goes_on_under_its_name_and_an_ended_one_is_not_taken_up_again(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path))
    first, second = ledger.begin(A, (0.5,), "bisection"), ledger.begin(B, (0.25,), "search")
    first = report(ledger, first, 10, ("a1", "a2"))
    ledger.put(replace(first, state="stopped"))

    again = Ledger(str(tmp_path))
    assert again.records == ledger.records
    assert ([one.name for one in again.ended], [one.name for one in again.unfinished]) == (["trial-001"], ["trial-002"])
    assert again.begin(B, (0.25,), "search").name == second.name
    assert again.begin(A, (0.5,), "bisection").name == "trial-003"


def test_a_rung_that_is_reported_again_counts_once(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path))
    record = report(ledger, ledger.begin(A, (0.5,), "search"), 10, ("a1", "a2"))
    assert report(ledger, record, 10, ("a1", "a2"), score=99.0).results == record.results


def test_a_training_is_counted_for_the_trial_that_reported_it_first(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path))
    one, two, three = (ledger.begin(config, (0.5,), "search") for config in (A, B, C))
    report(ledger, two, 10, ("shared", "b"))
    report(ledger, one, 10, ("shared", "a"))
    report(ledger, two, 20, ("shared-20", "b-20"))
    ledger.put(replace(ledger.records[three.name], state="failed", reason="out of memory"))
    rows = {row.name: row for row in Ledger(str(tmp_path)).rows((10, 20), {"trial-001": "expert 2 of 2"})}
    assert {name: (row.trained, row.cached, row.rung) for name, row in rows.items()} == {
        "trial-001": (1, 1, 10),
        "trial-002": (4, 0, 20),
        "trial-003": (0, 0, 0),
    }
    assert (rows["trial-001"].doing, rows["trial-003"].reason, rows["trial-003"].score) == ("expert 2 of 2", "out of memory", None)


def test_a_trial_without_a_finite_score_is_kept_and_read_again(tmp_path: Path) -> None:
    ledger = Ledger(str(tmp_path))
    report(ledger, ledger.begin(A, (0.5,), "search"), 10, ("a1", "a2"), score=math.nan)
    (result,) = Ledger(str(tmp_path)).records["trial-001"].results
    assert math.isnan(result.score)
    assert math.isnan(result.measured["psnr_y"][0])
    (row,) = Ledger(str(tmp_path)).rows((10,), {})
    assert not row.has_score


def test_boundaries_that_were_tried_twice_are_one_finalist(tmp_path: Path, root: Path) -> None:
    ledger = Ledger(str(tmp_path / "ledger"))
    for config, boundaries, score in ((A, (0.5,), 21.0), (B, (0.25,), 19.0), (C, (0.5,), 21.0)):
        record = ledger.begin(config, boundaries, "search")
        ledger.put(replace(report(ledger, record, 10, (record.name,), score), state="done"))
    recipe = load_recipe(str(root / "pipelines/search_boundaries.yaml"), None, ["search.finalists.top=2"]).recipe
    context: Any = SimpleNamespace(recipe=recipe, results={"trials": SimpleNamespace(url=str(tmp_path))})
    assert [one.boundaries for one in contenders_of(context)][:2] == [(0.5,), (0.25,)]
