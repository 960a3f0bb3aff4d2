"""What the experts of a search are found again by: what they were made from, not where that was."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from prepared_photos import config, fill, run

from linearsr_platform.recipe.load import load_recipe
from linearsr_platform.stages import trials
from linearsr_platform.stages.context import RunContext


def test_experts_of_other_weights_or_data_in_the_same_place_are_others(tmp_path: Path, root: Path) -> None:
    """As after `--from prepare`, or a parent run that pre-trained anew: the stages keep their folders."""
    photos, data, weights = fill(tmp_path / "photos", "a.png", "b.png"), tmp_path / "data", tmp_path / "weights.safetensors"
    run(config(photos), data)
    weights.write_bytes(b"first")
    statistics = {"mean": (0.0,), "std": (1.0,), "residual_std": (1.0,)}
    results: Any = {
        "prepare": SimpleNamespace(url=str(data)),
        "pretrain": SimpleNamespace(data={"trainers": {"pretrain": {"knee_weights": str(weights)}}, "statistics": statistics}),
    }
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
    weights.write_bytes(b"other")
    second = seen()
    # The names of files, which are all that the key of `prepare` knows, stay.
    fill(tmp_path / "photos", "b.png", "a.png")
    run(config(photos), data)
    third = seen()
    for names in zip(first[0], second[0], third[0], strict=True):
        assert len(set(names)) == 3
    assert first[1] != second[1] != third[1]
