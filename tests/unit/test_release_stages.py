"""A finished run asks the registry again: what others did to it since is told and not undone, and what they took away comes back."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from tiny_bundle import SMALLEST, write_bundle

from linearsr_platform.recipe.load import load_recipe
from linearsr_platform.recipe.promote_schema import PromoteSection
from linearsr_platform.registry.models import aliases_of
from linearsr_platform.registry.promotion import promote, rollback
from linearsr_platform.registry.register import register
from linearsr_platform.report.model import StageRecord
from linearsr_platform.stages.context import RunContext
from linearsr_platform.stages.pipeline import STAGES, run_stages
from linearsr_platform.tracking.runs import Tracker
from linearsr_platform.tracking.store import default_artifact_root, default_uri

Go = Callable[..., dict[str, tuple[str, str]]]


@pytest.fixture(scope="module")
def tracker(tmp_path_factory: pytest.TempPathFactory) -> Tracker:
    store = str(tmp_path_factory.mktemp("storage"))
    return Tracker(default_uri(store), "smoke", artifact_root=default_artifact_root(store))


@pytest.fixture
def name(tmp_path: Path) -> str:
    """Of a registered model that no other test has."""
    return tmp_path.name


@pytest.fixture
def go(tmp_path: Path, tracker: Tracker, name: str, root: Path) -> Go:
    """A function that runs the last stages of a run whose bundle is there; returns the status and summary of each."""
    write_bundle(tmp_path, SMALLEST)
    nobody: Any = SimpleNamespace(stage_started=print, stage_finished=print, stage_skipped=print, stage_failed=print, message=print)
    before: Any = {
        "assemble": SimpleNamespace(identity="a", url=str(tmp_path)),
        "evaluate": SimpleNamespace(identity="e", data={"tables": {}}),
    }

    loaded = load_recipe(str(root / "pipelines/smoke.yaml"), None, ["promote.rules=[]", f"tracking.model_name={name}"])

    def run(*names: str) -> dict[str, tuple[str, str]]:
        context = RunContext(
            loaded=loaded,
            storage_url=str(tmp_path),
            tracker=tracker,
            pipeline_run=tracker.start_pipeline("smoke"),
            display=nobody,
            user="tester",
            open_cluster=lambda: None,
            results=dict(before),
        )
        records: list[StageRecord] = []
        run_stages(context, {name: STAGES[name] for name in names or ("register", "promote")}, redo_from=None, records=records)
        return {record.name: (record.status, record.summary) for record in records}

    return run


def test_a_champion_that_was_replaced_is_told_and_does_not_come_back_by_itself(
    go: Go, tracker: Tracker, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert [status for status, _ in go().values()] == ["done", "done"]
    assert [status for status, _ in go().values()] == ["skipped", "skipped"]

    (tmp_path / "other").mkdir()
    other, run_id = write_bundle(tmp_path / "other", SMALLEST, noise=0.1), tracker.start_pipeline("other").run_id
    register(tracker.client, other, name=name, evaluation=None, run_id=run_id)
    promote(tracker.client, name, section=PromoteSection(rules=()), by="ada")
    assert aliases_of(tracker.client, name) == {"challenger": 2, "champion": 2}
    capsys.readouterr()
    told = go()
    assert told["register"][0] == "skipped"
    assert "register: alias challenger is version 2's by now" in capsys.readouterr().out
    said = f"replaced: version 1 was the champion, and version 2 is now; `linearsr models promote {name}/1` asks again"
    assert told["promote"] == ("done", said)
    assert go()["promote"] == ("skipped", said)
    assert aliases_of(tracker.client, name) == {"challenger": 2, "champion": 2}

    rollback(tracker.client, name, by="ada")
    assert go()["promote"] == ("done", f"models:/{name}@champion is version 1: version 1 is the champion already")


def test_what_was_deleted_is_registered_and_promoted_again(go: Go, tracker: Tracker, name: str) -> None:
    go("register")
    tracker.client.delete_model_version(name, "1")
    assert go("register")["register"] == ("done", f"{name} version 2, alias challenger")
    tracker.client.delete_registered_model(name)
    assert [status for status, _ in go().values()] == ["done", "done"]
    tracker.client.delete_registered_model(name)
    tracker.client.delete_registered_model(f"{name}.history")
    assert [status for status, _ in go().values()] == ["done", "done"]
    assert aliases_of(tracker.client, name) == {"challenger": 1, "champion": 1}


def test_a_missing_alias_is_told_as_such(go: Go, tracker: Tracker, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    go("register")
    tracker.client.delete_registered_model_alias(name, "challenger")
    capsys.readouterr()
    assert go("register")["register"][0] == "skipped"
    assert "register: alias challenger is no version's by now" in capsys.readouterr().out
