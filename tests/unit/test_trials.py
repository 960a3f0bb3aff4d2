"""How a search goes on: with experts of the same origin, wherever that is, and where its MLflow runs are gone."""

import sys
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from prepared_photos import config, fill, run

from linearsr.partition import CutGrid
from linearsr_platform.cli.execute import open_context
from linearsr_platform.recipe.load import load_recipe
from linearsr_platform.stages import trials
from linearsr_platform.stages.context import RunContext
from linearsr_platform.stages.ledger import Ledger
from linearsr_platform.stages.sweep_log import SweepLog


def test_experts_of_other_weights_or_data_in_the_same_place_are_others(tmp_path: Path, root: Path) -> None:
    """As after `--from prepare`, or a parent run that pre-trained anew: the stages keep their folders."""
    photos, data, weights = fill(tmp_path / "photos", "a.png", "b.png"), tmp_path / "data", tmp_path / "deleted.safetensors"
    run(config(photos), data)
    statistics = {"mean": (0.0,), "std": (1.0,), "residual_std": (1.0,)}
    pretrained = {"trainers": {"pretrain": {"knee_weights": str(weights)}}, "statistics": statistics}
    results: Any = {"prepare": SimpleNamespace(url=str(data)), "pretrain": SimpleNamespace(data=pretrained, run_id="first")}
    nobody: Any = None
    context = RunContext(
        loaded=load_recipe(str(root / "pipelines/search_boundaries.yaml")),
        storage_url=str(tmp_path),
        display=nobody,
        open_cluster=nobody,
        tracker=nobody,
        pipeline_run=nobody,
        user="tester",
        results=results,
    )

    def seen() -> tuple[list[str], object]:
        return [job.name for job in trials.trial_plan(context).jobs((0.5,), 10)], trials.settings(context)

    first = seen()
    assert seen() == first
    results["pretrain"].run_id = "other"
    second = seen()
    # The names of files, which are all that the key of `prepare` knows, stay.
    fill(tmp_path / "photos", "b.png", "a.png")
    run(config(photos), data)
    third = seen()
    for names in zip(first[0], second[0], third[0], strict=True):
        assert len(set(names)) == 3
    assert first[1] != second[1] != third[1]


def test_a_search_whose_mlflow_runs_are_gone_goes_on_in_new_ones(tmp_path: Path, root: Path) -> None:
    """As under another tracking.uri, or after somebody has deleted the run of an interrupted search."""
    told: list[str] = []
    display: Any = SimpleNamespace(message=told.append, trials=lambda *args, **kwargs: None)
    loaded, gone = load_recipe(str(root / "pipelines/search_boundaries.yaml"), None, [f"storage={tmp_path}"]), "0" * 32
    with ExitStack() as closing:
        context = open_context(loaded, display, closing, verbose=False, run_id=gone, kind="search")
        assert context.pipeline_run.run_id != gone
        assert gone in told[0]
        ledger, config = Ledger(str(tmp_path / "ledger")), {"experts": 1}
        before = ledger.begin(config, (), "search")
        ledger.put(replace(before, run_id=gone))
        plan: Any = SimpleNamespace(grid=CutGrid(), rungs=(1,))
        SweepLog(context, ledger, plan, [], 1).on_start("a", config)
        run = context.tracker.client.get_run(str(ledger.records[before.name].run_id))
    assert (run.info.run_name, run.data.tags["mlflow.parentRunId"]) == (before.name, context.pipeline_run.run_id)
