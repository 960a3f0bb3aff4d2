"""What the platform keeps for itself, when something else is found in its place: told with the file, or passed over, never a traceback."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from linearsr.bundle import BundleError, load_bundle
from linearsr_platform.errors import UserError
from linearsr_platform.registry.evaluation import Evaluation
from linearsr_platform.stages.context import StageResult
from linearsr_platform.stages.ledger import Ledger
from linearsr_platform.stages.measuring import Measured
from linearsr_platform.stages.weights_manifest import read_manifest
from linearsr_platform.tracking.journal import LINES, Journal
from linearsr_platform.tracking.operations import Operation
from linearsr_platform.train.checkpoint_store import KEYS, find, names_in

RESULT = StageResult(stage="prepare", key="k", url="/runs/a/prepare", summary="", seconds=1.0, run_id="r", data={})
DEEP = "[" * 100_000


@pytest.mark.parametrize(
    "content", [None, [], {}, "x", {**asdict(RESULT), "more": 1}, {**asdict(RESULT), "url": None}, {**asdict(RESULT), "url": []}]
)
def test_a_result_that_no_stage_wrote_is_told_with_its_file(tmp_path: Path, content: object) -> None:
    (tmp_path / "result.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"result\.json: got what no stage writes .*; fix: delete it"):
        StageResult.read(str(tmp_path))


@pytest.mark.parametrize(
    "change",
    [
        *({"results": [{}]}, {"results": None}, {"boundaries": 3}, {"more": 1}, {"name": []}),
        {"results": [{"steps": 1, "score": "x", "score_error": 0, "measured": {}, "experts": [], "order": 1}]},
    ],
)
def test_a_record_that_no_search_wrote_is_told_with_its_file(tmp_path: Path, change: dict[str, Any]) -> None:
    Ledger(str(tmp_path)).begin({"experts": 2}, (0.5,), "search")
    file = tmp_path / "trial-001.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UserError, match=r"trial-001\.json: got what no search writes .*; fix: delete it"):
        Ledger(str(tmp_path))


def test_a_copy_beside_the_checkpoints_is_none_of_them(tmp_path: Path) -> None:
    for name in ("step_00000010", "step_00000020-1", "step_00000010-before", "step_x", "step_"):
        (tmp_path / name).mkdir()
    assert names_in(str(tmp_path)) == ["step_00000020-1", "step_00000010"]


@pytest.mark.parametrize("change", [{"workers": None}, {"workers": "2"}, {"workers": 1.5}])
def test_a_checkpoint_with_a_record_of_no_worker_is_damaged(tmp_path: Path, change: dict[str, Any]) -> None:
    (tmp_path / "step_00000010").mkdir()
    record = dict.fromkeys(KEYS, 1) | change
    (tmp_path / "step_00000010/rank_0.json").write_text(json.dumps(record))
    found = find(str(tmp_path), "step_00000010")
    assert found is not None
    assert found.damage == "rank_0.json is no record of a worker"


@pytest.mark.parametrize("line", ["null", "3", '{"number": 9}', '{"number": [], "run_id": "r", "doing": ""}', '{"sent": "x"}', DEEP])
def test_a_damaged_line_costs_a_journal_no_other(tmp_path: Path, line: str) -> None:
    journal = Journal.create(tmp_path, "sqlite:///a")
    operation = Operation(run_id="r", doing="a tag", tags=(("a", "b"),))
    journal.append(operation, None, durable=False)
    journal.release()
    with (journal.folder / LINES).open("a") as file:
        file.write(f"{line}\n")
    ((again, left),) = list(Journal.orphans(tmp_path))
    assert (again.uri, left) == ("sqlite:///a", [(1, operation)])
    again.release()


@pytest.mark.parametrize(
    ("name", "read", "error"),
    [
        ("bundle.json", load_bundle, BundleError),
        ("manifest.json", read_manifest, UserError),
        ("a.json", lambda folder: Evaluation.from_json((folder / "a.json").read_text()), ValueError),
        ("a.json", lambda folder: Measured.from_json((folder / "a.json").read_text()), ValueError),
    ],
)
def test_json_that_is_nested_too_deep_is_told_as_any_other_that_is_none(
    tmp_path: Path, name: str, read: Callable[[Path], object], error: type[Exception]
) -> None:
    (tmp_path / name).write_text(DEEP)
    with pytest.raises(error):
        read(tmp_path)
