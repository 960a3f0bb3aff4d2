"""How a run goes through its stages: what is done is skipped, what changed is done again, a failure is told and resumed."""

import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from prepared_photos import fill

from linearsr_platform.data.sources import list_source
from linearsr_platform.recipe.load import load_recipe
from linearsr_platform.report.model import StageRecord
from linearsr_platform.stages import pipeline, prepare
from linearsr_platform.stages.context import RecipeContext, RunContext, Stage, StageOutput, StageResult
from linearsr_platform.tracking.runs import Tracker

SMOKE = Path(__file__).parents[2] / "pipelines" / "smoke.yaml"


class Silent:
    """A display that shows nothing, and keeps what it was to say."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


@pytest.fixture(scope="module")
def tracker(tmp_path_factory: pytest.TempPathFactory) -> Tracker:
    return Tracker(f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db", "pipeline")


@pytest.fixture
def world(tmp_path: Path, tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Three stages in a row, each adding one to what it needs; `settings` and `broken` can be changed between runs."""
    world: dict[str, Any] = {"settings": {"a": 1, "b": 10, "c": 100}, "base": 0, "broken": None, "folder": tmp_path, "tracker": tracker}
    world |= {"display": Silent(), "remarks": {}}

    def stage(name: str, needs: tuple[str, ...]) -> Stage:
        def run(context: RunContext, url: str, tracked: object) -> StageOutput:
            if world["broken"] == name:
                raise ValueError(f"{name} is broken")
            before = sum(context.results[need].data["value"] for need in needs) if needs else world["base"]
            data = {"value": before + world["settings"][name], "weights": [f"{url}/knee", "s3://elsewhere/knee"]}
            return StageOutput(name, data, content=None if needs else f"made of {world['base']}")

        return Stage(needs, lambda context: world["settings"][name], run, remark=lambda context, found: world["remarks"].get(name, ""))

    monkeypatch.setattr(pipeline, "STAGES", {"a": stage("a", ()), "b": stage("b", ("a",)), "c": stage("c", ("a", "b"))})
    return world


def open_context(world: dict[str, Any]) -> RunContext:
    return RunContext(
        loaded=load_recipe(str(SMOKE)),
        storage_url=str(world["folder"]),
        tracker=world["tracker"],
        pipeline_run=world["tracker"].start_pipeline("smoke"),
        display=world["display"],
        user="tester",
        open_cluster=lambda: None,
    )


def go(world: dict[str, Any], redo_from: str | None = None) -> tuple[dict[str, str], dict[str, int]]:
    """Run and return each stage's status and value."""
    context = open_context(world)
    records: list[StageRecord] = []
    try:
        pipeline.run_pipeline(context, redo_from=redo_from, records=records)
    except ValueError:
        assert records[-1].summary == f"{world['broken']} is broken"
    status = {record.name: record.status for record in records}
    return status, {name: result.data["value"] for name, result in context.results.items()}


def test_a_second_run_skips_everything_and_has_the_same_results(world: dict[str, Any]) -> None:
    first, second = go(world), go(world)
    assert first == (dict.fromkeys("abc", "done"), {"a": 1, "b": 11, "c": 112})
    assert second == (dict.fromkeys("abc", "skipped"), first[1])


def test_what_is_to_be_known_of_a_skipped_stage_is_told(world: dict[str, Any]) -> None:
    world["remarks"] = {"b": "look"}
    go(world)
    assert world["display"].messages == []
    go(world)
    assert world["display"].messages == ["b: look"]


def test_photographs_that_changed_under_their_names_are_remarked(tmp_path: Path) -> None:
    fill(tmp_path, "0.png", "1.png")
    loaded = load_recipe(str(SMOKE), None, [f"data.sources={{mine: {{url: {tmp_path}}}}}", "data.held_out=[]"])
    context = RecipeContext(loaded=loaded, storage_url=str(tmp_path), display=Silent(), open_cluster=lambda: None)
    common: dict[str, Any] = {"stage": "prepare", "key": "", "url": "", "summary": "", "seconds": 0.0, "run_id": ""}
    found = StageResult(**common, data={prepare.SIZES: prepare._sizes(context)})
    assert prepare.remark(context, found) == ""
    (tmp_path / "0.txt").write_text("tabby")
    assert "`--from prepare` takes them anew" in prepare.remark(context, found)
    assert prepare.remark(context, StageResult(**common, data={"digest": "of an earlier version"})) == ""


def test_photographs_are_listed_once_to_find_prepared_data_again(tmp_path: Path, tracker: Tracker, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a store of a million files each listing takes minutes."""
    fill(tmp_path / "photos", "0.png", "1.png")
    loaded = load_recipe(str(SMOKE), None, [f"data.sources={{mine: {{url: {tmp_path}/photos}}}}", "data.held_out=[]"])
    stages, listed = {"prepare": pipeline.STAGES["prepare"]}, []

    def listing(*args: Any) -> Any:
        listed.append(args)
        return list_source(*args)

    monkeypatch.setattr(prepare, "list_source", listing)

    def run() -> tuple[int, list[str]]:
        listed.clear()
        world: dict[str, Any] = {"folder": tmp_path, "tracker": tracker, "display": Silent()}
        context, records = replace(open_context(world), loaded=loaded), []
        pipeline.run_stages(context, stages, redo_from=None, records=records)
        return len(listed), [record.status for record in records]

    monkeypatch.setitem(
        stages, "prepare", replace(stages["prepare"], run=lambda context, *_: StageOutput("", {prepare.SIZES: prepare._sizes(context)}))
    )
    assert run() == (1, ["done"])
    assert run() == (1, ["skipped"])


def test_a_changed_setting_redoes_its_stage_and_what_needs_it_and_changing_back_finds_the_old_result(world: dict[str, Any]) -> None:
    go(world)
    world["settings"]["b"] = 20
    assert go(world) == ({"a": "skipped", "b": "done", "c": "done"}, {"a": 1, "b": 21, "c": 122})
    world["settings"]["b"] = 10
    assert go(world)[0] == dict.fromkeys("abc", "skipped")


def test_redoing_starts_at_the_named_stage(world: dict[str, Any]) -> None:
    go(world)
    assert go(world, redo_from="b")[0] == {"a": "skipped", "b": "done", "c": "done"}


def test_a_redone_run_that_ends_early_leaves_no_later_stage_made_from_the_old_ones(world: dict[str, Any]) -> None:
    go(world)
    # What a setting does not name has changed, as tags of photographs may: the keys stay the same.
    world |= {"base": 1000, "broken": "b"}
    go(world, redo_from="a")
    world["broken"] = None
    assert go(world) == ({"a": "skipped", "b": "done", "c": "done"}, {"a": 1001, "b": 1011, "c": 2112})


def test_changing_back_finds_no_result_of_what_was_made_anew_since(world: dict[str, Any]) -> None:
    """As after `--from prepare` with other photographs under the same names."""
    go(world)
    world["settings"]["b"] = 20
    go(world)
    world["base"] = 1000
    assert go(world, redo_from="a")[1] == {"a": 1001, "b": 1021, "c": 2122}
    world["settings"]["b"] = 10
    assert go(world) == ({"a": "skipped", "b": "done", "c": "done"}, {"a": 1001, "b": 1011, "c": 2112})


def test_a_result_of_an_earlier_version_keeps_the_keys_that_its_stage_gave(world: dict[str, Any]) -> None:
    result = StageResult(stage="a", key="k", url=str(world["folder"]), summary="", seconds=1, run_id="r", data={})
    result.write()
    file = world["folder"] / "result.json"
    file.write_text(file.read_text().replace('"content": null,', "").replace(',\n  "content": null', ""))
    assert "content" not in file.read_text()
    found = StageResult.read(str(world["folder"]))
    assert found == result
    assert found.identity == "k"


def test_redoing_reaches_stages_whose_settings_are_read_from_earlier_results(world: dict[str, Any]) -> None:
    stages = pipeline.STAGES
    stages["c"] = replace(stages["c"], settings=lambda context: context.results["b"].data["value"])
    go(world)
    world |= {"base": 1000, "broken": "a"}
    go(world, redo_from="a")
    assert not list((world["folder"] / "smoke").glob("?-*"))


def test_a_failure_ends_the_run_is_tracked_and_the_next_run_goes_on_there(world: dict[str, Any]) -> None:
    world["broken"] = "b"
    status, values = go(world)
    assert (status, values) == ({"a": "done", "b": "failed"}, {"a": 1})
    client = world["tracker"].client
    newest = client.search_runs([world["tracker"].experiment_id], "tags.stage = 'b'", max_results=1, order_by=["start_time DESC"])
    assert newest[0].info.status == "FAILED"
    world["broken"] = None
    assert go(world)[0] == {"a": "skipped", "b": "done", "c": "done"}


@pytest.mark.parametrize("end", [SystemExit(1), KeyboardInterrupt()])
def test_a_stage_that_is_ended_from_outside_is_recorded_as_stopped(world: dict[str, Any], end: BaseException) -> None:
    def ended(*_: object) -> StageOutput:
        raise end

    pipeline.STAGES["b"] = replace(pipeline.STAGES["b"], run=ended)
    records: list[StageRecord] = []
    with pytest.raises(type(end)):
        pipeline.run_pipeline(open_context(world), records=records)
    assert [record.summary for record in records] == ["a", "stopped; the same command goes on"]


def test_results_of_a_run_that_was_moved_name_files_where_they_are_now(world: dict[str, Any], tmp_path: Path) -> None:
    world["folder"] = tmp_path / "before"
    go(world)
    world["folder"] = world["folder"].rename(tmp_path / "after")
    context = open_context(world)
    pipeline.run_pipeline(context, records=[])
    found = context.results["b"]
    assert found.data["weights"] == [f"{found.url}/knee", "s3://elsewhere/knee"]
    assert Path(found.data["weights"][0]).is_relative_to(tmp_path / "after")


def test_a_stage_without_its_result_file_counts_as_not_done(world: dict[str, Any]) -> None:
    go(world)
    next((world["folder"] / "smoke").glob("c-*/result.json")).unlink()
    assert go(world)[0] == {"a": "skipped", "b": "skipped", "c": "done"}


def test_redoing_makes_files_anew_that_later_settings_are_read_from_and_that_are_gone(world: dict[str, Any]) -> None:
    """As a search's `trials`, whose key has a hash of the weights of `pretrain`."""
    stages, weights = pipeline.STAGES, world["folder"] / "weights"
    make = stages["a"].run

    def run(context: RunContext, url: str, tracked: Any) -> StageOutput:
        weights.write_text("weights")
        return make(context, url, tracked)

    stages["a"], stages["b"] = replace(stages["a"], run=run), replace(stages["b"], settings=lambda context: weights.read_text())
    go(world)
    weights.unlink()
    assert go(world, redo_from="a")[0] == dict.fromkeys("abc", "done")
