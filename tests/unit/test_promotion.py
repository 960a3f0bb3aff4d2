"""The gate's rules, the history they leave, the way back, and two promotions at once; on a real SQLite registry."""

import dataclasses
import json
import multiprocessing
from collections.abc import Callable
from typing import Any

import pytest

from linearsr_platform.errors import UserError
from linearsr_platform.recipe.promote_schema import PromoteSection
from linearsr_platform.registry.evaluation import Evaluation, ProtocolTable
from linearsr_platform.registry.gate import Contender, RuleOutcome, judge
from linearsr_platform.registry.history import History, HistoryRow, append, fold, read_history, settle
from linearsr_platform.registry.models import ModelVersion, aliases_of, list_models
from linearsr_platform.registry.paired import paired_difference
from linearsr_platform.registry.promotion import Waiting, promote, rollback
from linearsr_platform.tracking.runs import Tracker
from linearsr_platform.tracking.store import default_artifact_root, default_uri

IMAGES = [f"image-{index}" for index in range(12)]
WOBBLE = [0.0, 0.1, -0.1, 0.05, -0.05, 0.2, -0.2, 0.1, -0.1, 0.0, 0.05, -0.05]
"""Sums to nothing: what differs by chance from image to image."""


def evaluation(
    gain: float, *, wobble: float = 1.0, images: int = 12, seed: int = 0, test_set: str = "t", protocol: str = "classic", **others: float
) -> Evaluation:
    """PSNR of hard and easy images, raised by `gain` and wobbling; other metrics are the same in every image."""
    measured = {"psnr_y": {name: 20 + 2.0 * i + gain + wobble * WOBBLE[i] for i, name in enumerate(IMAGES[:images])}}
    measured |= {metric: dict.fromkeys(IMAGES[:images], value) for metric, value in others.items()}
    rows = {"one_step": {metric: sum(values.values()) / len(values) for metric, values in measured.items()}}
    table = ProtocolTable(
        protocol={"seed": seed},
        test_set=test_set,
        rows={**rows, "routed": rows["one_step"]},
        values={"one_step": measured, "routed": measured},
    )
    return Evaluation(tables={protocol: table})


def contender(number: int, numbers: Evaluation | None, *, knees: list[bool | None] | None = None) -> Contender:
    experts = [
        {"name": f"expert-{index}", "sha256": "0"} | ({} if found is None else {"knees": {"finetune": {"step": 9, "confirmed": found}}})
        for index, found in enumerate(knees or [], start=1)
    ]
    version = ModelVersion(name="m", version=number, aliases=(), created_s=0.0, run_id=None, tags={"lineage.experts": json.dumps(experts)})
    return Contender(version=version, evaluation=numbers)


def gate(*rules: dict[str, Any]) -> PromoteSection:
    return PromoteSection.model_validate_json(json.dumps({"rules": rules}))


def judged(rule: dict[str, Any], ours: Contender, theirs: Contender | None) -> tuple[RuleOutcome, ...]:
    return judge(ours, theirs, gate(rule))


BETTER = {"rule": "better", "metric": "psnr_y"}
NOT_WORSE = {"rule": "not_worse", "metrics": ["psnr_y"]}


@pytest.mark.parametrize(
    ("rule", "ours", "theirs", "passed"),
    [
        # A tenth of a decibel in every image is certain although the images are 22 dB apart; the same beside a wobble is not.
        (BETTER, evaluation(0.1, wobble=0), evaluation(0, wobble=0), True),
        (BETTER, evaluation(0.02), evaluation(0, wobble=0), False),
        (BETTER, evaluation(0, wobble=0), evaluation(0, wobble=0), False),
        (BETTER | {"at_least": 0.05}, evaluation(0.1, wobble=0), evaluation(0, wobble=0), True),
        (BETTER | {"at_least": 0.2}, evaluation(0.1, wobble=0), evaluation(0, wobble=0), False),
        (BETTER | {"metric": "lpips"}, evaluation(0, lpips=0.1), evaluation(0, lpips=0.2), True),
        (BETTER | {"metric": "lpips"}, evaluation(0, lpips=0.3), evaluation(0, lpips=0.2), False),
        (NOT_WORSE, evaluation(-0.1), evaluation(0), False),
        (NOT_WORSE | {"by": 0.15}, evaluation(-0.1), evaluation(0), True),
        # The mean is not worse, but with these images it might be.
        (NOT_WORSE, evaluation(0.01), evaluation(0, wobble=0), True),
        (NOT_WORSE | {"confidence": 0.95}, evaluation(0.01), evaluation(0, wobble=0), False),
        (NOT_WORSE | {"confidence": 0.95, "by": 0.1}, evaluation(0.01), evaluation(0, wobble=0), True),
        ({"rule": "no_regression"}, evaluation(0, seam=1.0, colour_shift=2.0), evaluation(0, seam=1.0, colour_shift=2.0), True),
        ({"rule": "no_regression", "of": ["seam"]}, evaluation(0, seam=1.1), evaluation(0, seam=1.0), False),
        ({"rule": "no_regression", "of": ["seam"], "by": 0.2}, evaluation(0, seam=1.1), evaluation(0, seam=1.0), True),
        ({"rule": "same_protocol"}, evaluation(0), evaluation(1), True),
        ({"rule": "same_protocol"}, evaluation(0, seed=1), evaluation(0), False),
        ({"rule": "same_protocol"}, evaluation(0, protocol="seesr"), evaluation(0), False),
        ({"rule": "same_protocol"}, evaluation(0), None, False),
    ],
)
def test_a_rule_passes_exactly_when_its_numbers_do(rule: dict[str, Any], ours: Evaluation, theirs: Evaluation | None, passed: bool) -> None:
    outcomes = judged(rule, contender(2, ours), contender(1, theirs))
    assert [outcome.passed for outcome in outcomes] == [passed] * len(outcomes)
    # The first version passes whatever compares.
    assert all(outcome.passed for outcome in judged(rule, contender(2, ours), None))


@pytest.mark.parametrize(
    ("rule", "ours", "theirs", "said"),
    [
        (BETTER, evaluation(9, test_set="u"), evaluation(0), "test sets differ, u and t"),
        (BETTER, evaluation(9, seed=1), evaluation(0), "protocols differ: seed 1 and 0"),
        (BETTER, evaluation(9, images=11), evaluation(0), "not in both: image-11"),
        (BETTER, evaluation(float("nan")), evaluation(0), "evaluate it again"),
        (BETTER, evaluation(9), evaluation(float("nan")), "champion's was not measured"),
        (BETTER, None, evaluation(0), "challenger has no evaluation"),
        (BETTER, evaluation(9), None, "champion has no evaluation"),
        (BETTER | {"metric": "vsi"}, evaluation(9), None, "champion has no evaluation"),
        (BETTER | {"protocol": "seesr"}, evaluation(9), evaluation(0), "was measured under classic, not seesr"),
        ({"rule": "no_regression", "of": ["seam"]}, evaluation(9), evaluation(0), "not measured"),
        ({"rule": "not_worse"}, evaluation(9), evaluation(0, lpips=0.1), "challenger's was not measured"),
    ],
)
def test_what_cannot_be_compared_fails_and_says_why(
    rule: dict[str, Any], ours: Evaluation | None, theirs: Evaluation | None, said: str
) -> None:
    failed = [outcome for outcome in judged(rule, contender(2, ours), contender(1, theirs)) if not outcome.passed]
    assert [said in outcome.note for outcome in failed] == [True], failed
    json.dumps(dataclasses.asdict(failed[0]), allow_nan=False)


def test_without_values_per_image_means_decide_and_intervals_fail() -> None:
    table = dataclasses.replace(evaluation(0).tables["classic"], values={})
    old = contender(1, Evaluation(tables={"classic": table}))
    (means,) = judged(NOT_WORSE, contender(2, evaluation(0.1)), old)
    (interval,) = judged(BETTER, contender(2, evaluation(9)), old)
    assert (means.passed, interval.passed) == (True, False)
    assert "no values per image" in interval.note


def test_a_value_of_the_whole_set_is_compared_as_it_is() -> None:
    def with_fid(value: float) -> Evaluation:
        table = evaluation(0).tables["classic"]
        return Evaluation(tables={"classic": dataclasses.replace(table, rows={"one_step": {**table.rows["one_step"], "fid": value}})})

    rule = NOT_WORSE | {"metrics": ["fid"], "by": 1.0}
    for theirs, passed in ((20.0, True), (18.0, False)):
        (outcome,) = judged(rule, contender(2, with_fid(20.5)), contender(1, with_fid(theirs)))
        assert (outcome.passed, outcome.interval) == (passed, None)
        assert "whole set" in outcome.note


def test_several_protocols_need_a_name() -> None:
    both = Evaluation(tables={**evaluation(1).tables, **evaluation(1, protocol="seesr").tables})
    (outcome,) = judged(BETTER, contender(2, both), contender(1, evaluation(0)))
    assert "name one" in outcome.note
    (outcome,) = judged(BETTER | {"protocol": "classic"}, contender(2, both), contender(1, evaluation(0, wobble=1)))
    assert outcome.passed
    assert outcome.rule == "better psnr_y (one_step, classic)"


@pytest.mark.parametrize(
    ("knees", "passed", "shown"),
    [([True, True], True, "2 of 2"), ([True, False], False, "1 of 2"), ([True, None], False, "1 of 2"), ([], False, "0 of 0")],
)
def test_a_knee_must_be_confirmed_in_every_expert(knees: list[bool | None], passed: bool, shown: str) -> None:
    (outcome,) = judged({"rule": "knee_found"}, contender(2, None, knees=knees), None)
    assert (outcome.passed, outcome.challenger) == (passed, shown)


def test_the_interval_covers_the_truth_as_often_as_it_says_and_few_images_are_weak() -> None:
    import numpy as np

    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(200):
        differences = rng.normal(0.3, 1.0, 40)
        ours, theirs = {str(i): 50.0 * i + value for i, value in enumerate(differences)}, {str(i): 50.0 * i for i in range(40)}
        found = paired_difference(ours, theirs, confidence=0.9, seed=1, resamples=1000)
        covered += found.low <= 0.3 <= found.high
    # 90 % of 200 are 180; four standard deviations of a count are 17.
    assert 163 <= covered <= 197
    assert not found.weak
    assert paired_difference(ours, theirs, confidence=0.9, seed=1, resamples=1000) == found
    assert paired_difference({"a": 1.0}, {"a": 0.0}, confidence=0.9, seed=1, resamples=1000).weak


@pytest.fixture(scope="module")
def tracker(tmp_path_factory: pytest.TempPathFactory) -> Tracker:
    store = str(tmp_path_factory.mktemp("storage"))
    return Tracker(default_uri(store), "nano", artifact_root=default_artifact_root(store))


def add_version(tracker: Tracker, name: str, gain: float) -> int:
    """A version with means and no files, which the gate needs none of."""
    client = tracker.client
    if name not in {found.name for found in list_models(client)}:
        client.create_registered_model(name)
    tags = {"evaluation": evaluation(gain).to_json(with_values=False)}
    version = int(client.create_model_version(name, f"file:///nowhere/{name}", tags=tags, await_creation_for=0).version)
    client.set_registered_model_alias(name, "challenger", str(version))
    return version


def waiting(at_s: float) -> Waiting:
    times = iter([at_s + 10 * index for index in range(100)])
    return Waiting(clock=lambda: next(times), sleep=lambda seconds: None, patience_s=5.0)


def test_the_champion_moves_by_the_rules_by_force_and_back_and_all_of_it_is_in_the_history(tracker: Tracker) -> None:
    client = tracker.client

    def challenge(gain: float, at_s: float, **how: Any) -> tuple[str, int | None]:
        add_version(tracker, "gate", gain)
        decision = promote(client, "gate", section=gate(NOT_WORSE), by="ada", waiting=waiting(at_s), **how)
        return decision.state, aliases_of(client, "gate").get("champion")

    assert challenge(0.0, 100) == ("promoted", 1)
    assert challenge(-1.0, 200) == ("refused", 1)
    assert challenge(1.0, 300) == ("promoted", 3)
    assert promote(client, "gate", section=gate(NOT_WORSE), by="ada").state == "champion already"
    assert challenge(-2.0, 400, force_reason="the demo is today") == ("promoted", 4)
    with pytest.raises(UserError, match="--reason"):
        promote(client, "gate", section=gate(NOT_WORSE), by="ada", version=1, force_reason=" ")
    assert rollback(client, "gate", by="bob", reason="demo over", waiting=waiting(500)).to_version == 3
    assert rollback(client, "gate", by="bob", waiting=waiting(600)).to_version == 1
    assert aliases_of(client, "gate")["champion"] == 1
    with pytest.raises(UserError, match="version 1 is the first"):
        rollback(client, "gate", by="bob")

    rows = [
        (row.action, row.by, row.from_version, row.to_version, row.forced, row.reason, row.holds)
        for row in read_history(client, "gate").rows
    ]
    assert rows == [
        ("promote", "ada", None, 1, False, "", True),
        ("promote", "ada", 1, 3, False, "", True),
        ("promote", "ada", 3, 4, True, "the demo is today", True),
        ("rollback", "bob", 4, 3, False, "demo over", True),
        ("rollback", "bob", 3, 1, False, "", True),
    ]
    first, second, forced = read_history(client, "gate").rows[:3]
    assert first.at == "1970-01-01T00:01:50.000+00:00"
    (rule,) = second.rules
    assert (rule.challenger, rule.champion, rule.passed) == (pytest.approx(32.0), pytest.approx(31.0), True)
    assert not forced.rules[0].passed
    assert "gate.history" not in {found.name for found in list_models(client)}


def test_an_alias_that_somebody_moved_is_noted_and_taken_as_it_is(tracker: Tracker) -> None:
    client = tracker.client
    for gain in (0.0, 1.0):
        add_version(tracker, "moved", gain)
        promote(client, "moved", section=gate(NOT_WORSE), by="ada")
    client.set_registered_model_alias("moved", "champion", "1")
    add_version(tracker, "moved", 0.5)
    decision = promote(client, "moved", section=gate(NOT_WORSE), by="bob", waiting=waiting(0))
    assert (decision.state, decision.champion_version) == ("promoted", 1), "compared with what is in use, not with version 2"
    actions = [(row.action, row.from_version, row.to_version) for row in read_history(client, "moved").rows]
    assert actions[2:] == [("moved outside", 2, 1), ("promote", 1, 3)]


def test_of_two_promotions_from_the_same_champion_the_first_row_holds_and_the_second_is_told(
    tracker: Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = tracker.client
    for gain in (0.0, 1.0, 2.0):
        add_version(tracker, "race", gain)
    promote(client, "race", section=gate(NOT_WORSE), by="ada", version=1)

    def judge_while_another_promotes(*arguments: Any) -> tuple[RuleOutcome, ...]:
        monkeypatch.undo()
        assert promote(client, "race", section=gate(NOT_WORSE), by="eve", version=3).promoted
        return judge(*arguments)

    monkeypatch.setattr("linearsr_platform.registry.promotion.judge", judge_while_another_promotes)
    late = promote(client, "race", section=gate(NOT_WORSE), by="ada", version=2)
    assert (late.state, late.promoted) == ("too late", False)
    assert "eve made version 3 the champion first" in late.reason
    assert aliases_of(client, "race")["champion"] == 3
    assert [(row.by, row.to_version, row.holds) for row in read_history(client, "race").rows] == [
        ("ada", 1, True),
        ("eve", 3, True),
        ("ada", 2, False),
    ]


def test_a_row_that_was_sent_twice_counts_once_and_a_late_alias_is_put_right(tracker: Tracker) -> None:
    client = tracker.client
    for gain in (0.0, 1.0):
        add_version(tracker, "twice", gain)
    promote(client, "twice", section=gate(NOT_WORSE), by="ada", version=1)
    row = HistoryRow(action="promote", at="", by="ada", from_version=1, to_version=2, attempt="a")
    append(client, "twice", row)
    history = append(client, "twice", row)
    assert [one.holds for one in history.rows] == [True, True, False]
    # Nobody moved the alias after the row: as if the process had been killed there.
    assert aliases_of(client, "twice")["champion"] == 1
    assert settle(client, "twice").champion == 2
    assert aliases_of(client, "twice")["champion"] == 2


def hang_before_the_alias(monkeypatch: pytest.MonkeyPatch, meanwhile: Callable[[], object]) -> None:
    """Let something happen between the next promotion's row and its alias, as if that call hung."""

    def hung(client: Any, name: str) -> History:
        monkeypatch.undo()
        meanwhile()
        return settle(client, name)

    monkeypatch.setattr("linearsr_platform.registry.promotion.settle", hung)


def test_a_promotion_whose_alias_hung_until_another_went_on_is_told(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    client = tracker.client
    for gain in (0.0, 1.0, -1.0):
        add_version(tracker, "hung", gain)
    promote(client, "hung", section=gate(NOT_WORSE), by="ada", version=1, waiting=waiting(0))
    answers = []

    def meanwhile() -> None:
        answers.append(promote(client, "hung", section=gate(NOT_WORSE), by="eve", version=3, waiting=waiting(1000)))

    hang_before_the_alias(monkeypatch, meanwhile)
    hung = promote(client, "hung", section=gate(NOT_WORSE), by="bob", version=2, waiting=waiting(100))
    assert [(answer.state, answer.champion_version) for answer in answers] == [("refused", 1)]
    assert (hung.state, hung.promoted) == ("too late", False)
    assert "eve made version 1 the champion before the alias had moved (moved outside, 1970-" in hung.reason
    assert aliases_of(client, "hung")["champion"] == read_history(client, "hung").champion == 1

    assert promote(client, "hung", section=gate(NOT_WORSE), by="bob", version=2, waiting=waiting(2000)).promoted
    hang_before_the_alias(monkeypatch, lambda: promote(client, "hung", section=gate(), by="eve", version=2, waiting=waiting(4000)))
    with pytest.raises(UserError, match=r"^rollback: eve made version 2 the champion before the alias had moved \(moved outside"):
        rollback(client, "hung", by="bob", waiting=waiting(3000))


def test_an_alias_that_lags_behind_a_fresh_row_is_waited_for(tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    client = tracker.client
    for gain in (0.0, 1.0, 0.5):
        add_version(tracker, "slow", gain)
    promote(client, "slow", section=gate(NOT_WORSE), by="ada", version=1, waiting=waiting(0))
    answers, sleeps = [], []

    def arrive(seconds: float) -> None:
        sleeps.append(seconds)
        if len(sleeps) == 3:
            settle(client, "slow")

    def meanwhile() -> None:
        # Twenty seconds after the row, and thirty more until the alias arrives.
        late = dataclasses.replace(waiting(120), sleep=arrive)
        answers.append(promote(client, "slow", section=gate(NOT_WORSE), by="eve", version=3, waiting=late))

    hang_before_the_alias(monkeypatch, meanwhile)
    assert promote(client, "slow", section=gate(NOT_WORSE), by="bob", version=2, waiting=waiting(100)).state == "promoted"
    assert [(answer.state, answer.champion_version) for answer in answers] == [("refused", 2)]
    assert [row.action for row in read_history(client, "slow").rows] == ["promote", "promote"]
    assert aliases_of(client, "slow")["champion"] == 2


def test_rows_hold_in_their_order_and_a_rollback_only_to_the_one_before() -> None:
    def row(number: int, action: Any, before: int | None, after: int) -> HistoryRow:
        return HistoryRow(action=action, at="", by="", from_version=before, to_version=after, number=number, attempt=str(number))

    rows = [row(3, "rollback", 2, 7), row(1, "promote", 1, 2), row(4, "rollback", 2, 1), row(2, "promote", 1, 3), row(5, "promote", 2, 3)]
    history = fold(rows)
    assert [(one.number, one.holds) for one in history.rows] == [(1, True), (2, False), (3, False), (4, True), (5, False)]
    assert history.champions == (1,)


def promote_in_a_process(uri: str, name: str, version: int, all_have_read: Any, answers: Any) -> None:
    """Promote one version; what the champion is has been read by all before any of them decides."""
    from unittest.mock import patch

    def judge_together(*arguments: Any) -> tuple[RuleOutcome, ...]:
        all_have_read.wait(60)
        return judge(*arguments)

    with patch("linearsr_platform.registry.promotion.judge", judge_together):
        decision = promote(Tracker(uri, "nano").client, name, section=gate(), by=f"process {version}", version=version)
    answers.put((version, decision.state))


def test_of_processes_that_promote_at_once_on_sqlite_one_wins_and_the_others_are_told(tracker: Tracker) -> None:
    for gain in (0.0, 1.0, 2.0, 3.0):
        add_version(tracker, "rush", gain)
    promote(tracker.client, "rush", section=gate(), by="ada", version=1)
    context = multiprocessing.get_context("spawn")
    barrier, answers = context.Barrier(3), context.Queue()
    arguments = [(tracker.uri, "rush", version, barrier, answers) for version in (2, 3, 4)]
    processes = [context.Process(target=promote_in_a_process, args=each) for each in arguments]
    for process in processes:
        process.start()
    told = dict(answers.get(timeout=120) for _ in processes)
    for process in processes:
        process.join()
    history = read_history(tracker.client, "rush")
    assert sorted(told.values()) == ["promoted", "too late", "too late"]
    assert {row.to_version: "promoted" if row.holds else "too late" for row in history.rows[1:]} == told
    assert told[history.champion] == "promoted"
    assert aliases_of(tracker.client, "rush")["champion"] == history.champion
