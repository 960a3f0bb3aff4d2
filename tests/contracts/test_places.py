"""What counts as the same recipe finds every finished stage again: a setting that only says where it runs is in no stage's key."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from linearsr_platform.recipe.identity import PLACES, changes
from linearsr_platform.recipe.load import LoadedRecipe, load_recipe
from linearsr_platform.stages import pipeline, search, trials
from linearsr_platform.stages.context import RunContext
from linearsr_platform.stages.ledger import Ledger, RungResult

RECIPE = f"""\
extends: {Path(__file__).parents[2] / "pipelines" / "smoke.yaml"}
search: {{experts: [3], rungs: [6, 12], score: {{crop_px: 64}}}}
"""
TRAINING = ("pretrain", "experts.train", "finetune.train")
ELSEWHERE = {
    "name": ["name=other"],
    "storage": ["storage=elsewhere"],
    "cluster": ["cluster.cpus_per_worker=0.5"],
    "tracking": ["tracking.experiment=x", "tracking.artifacts=knee"],
    "*.workers": [f"{stage}.workers=2" for stage in TRAINING],
    "*.cpus_per_worker": ["experts.cpus_per_worker=0.25"],
    "*.zero.stage": [f"{stage}.zero.stage=3" for stage in TRAINING],
    "*.max_failures": [f"{stage}.max_failures=9" for stage in TRAINING],
    "*.keep_checkpoints": [f"{stage}.keep_checkpoints=9" for stage in TRAINING],
    "*.loader_workers": [f"{stage}.loader_workers=1" for stage in TRAINING],
    "*.min_workers": [f"{stage}.{key}" for stage in TRAINING for key in ("workers=2", "min_workers=1")],
    "*.accumulation": [f"{stage}.accumulation=2" for stage in TRAINING],
    "data.parallel_from": ["data.parallel_from=7"],
    "data.cache_*": ["data.cache_gb=1", "data.cache_folder=/elsewhere"],
}
"""For every setting of `PLACES` another value of it; a model's name and registry are what `register` is about, so they stay."""


def keys(loaded: LoadedRecipe, folder: Path) -> dict[str, str]:
    """Return the keys of all stages of a run and of a search."""
    results = {name: SimpleNamespace(identity=name, url=str(folder)) for name in {**pipeline.STAGES, **search.STAGES}}
    context: Any = RunContext(
        loaded=loaded,
        storage_url=str(folder),
        tracker=SimpleNamespace(uri="sqlite:///x.db"),  # type: ignore[arg-type]
        pipeline_run=SimpleNamespace(),  # type: ignore[arg-type]
        display=SimpleNamespace(),  # type: ignore[arg-type]
        user="tester",
        open_cluster=lambda: None,
        results=results,  # type: ignore[arg-type]
    )
    return {name: pipeline.stage_key(context, name, stage) for name, stage in {**pipeline.STAGES, **search.STAGES}.items()}


@pytest.fixture
def world(tmp_path: Path) -> Path:
    """A recipe, and a trial for the finalists to be chosen from."""
    (tmp_path / "smoke.yaml").write_text(RECIPE)
    ledger = Ledger(str(tmp_path / "ledger"))
    rung = RungResult(steps=12, score=20.0, score_error=0.1, measured={}, experts=("a",), order=0)
    ledger.put(replace(ledger.begin({"experts": 3}, (0.25, 0.5), "search").with_result(rung), state="done"))
    return tmp_path


def test_every_place_is_tried() -> None:
    assert set(ELSEWHERE) == set(PLACES)


@pytest.mark.parametrize("changed", ELSEWHERE.values(), ids=ELSEWHERE)
def test_a_place_is_in_no_key(changed: list[str], world: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trials, "origin_of", lambda context: {})
    path, settings = str(world / "smoke.yaml"), ["tracking.model_name=linearsr-smoke"]
    before, after = load_recipe(path, None, settings), load_recipe(path, None, [*settings, *changed])
    assert before.recipe != after.recipe
    assert not changes(before.resolved, after.resolved, "run")
    assert keys(before, world) == keys(after, world)
