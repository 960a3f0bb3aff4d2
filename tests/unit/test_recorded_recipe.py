"""The name of a run belongs to its recipe: through the command line, what is refused, with which words, and what is not."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from linearsr_platform.cli.app import app
from linearsr_platform.recipe.identity import RunKind, changes, recipe_identity
from linearsr_platform.recipe.load import LoadedRecipe, load_recipe
from linearsr_platform.recipe.recorded import record_recipe

SMOKE = Path(__file__).parents[2] / "pipelines" / "smoke.yaml"
RECIPE = f"""\
extends: {SMOKE}
name: mine
model: {{init_weights: nowhere.safetensors}}
search: {{experts: [3], trials: 7, rungs: [6, 12], score: {{crop_px: 64}}}}
"""
PASSED = "model.init_weights: got 'nowhere.safetensors'"
"""What is refused next, so that no test here has to train: everything before it was accepted."""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(RECIPE)
    return path


def load(recipe: Path, *changed: str) -> LoadedRecipe:
    return load_recipe(str(recipe), None, [f"storage={recipe.parent}", *changed])


def record(recipe: Path, *changed: str, kind: RunKind = "run") -> None:
    record_recipe(str(recipe.parent / "mine"), load(recipe, *changed), kind, "0.1.0")


def cli(recipe: Path, *changed: str, command: str = "run", options: tuple[str, ...] = ()) -> str:
    words = [word for setting in (f"storage={recipe.parent}", *changed) for word in ("--set", setting)]
    result = CliRunner().invoke(app, [command, str(recipe), *words, *options])
    assert result.exit_code == 2, result.output
    return result.output


def test_another_recipe_under_the_same_name_is_refused_with_what_changed(recipe: Path) -> None:
    record(recipe)
    said = cli(recipe, "pretrain.lr=2e-3", "experts.boundaries=[0.25, 0.75]", "data.held_out=[cat]")
    folder = recipe.parent / "mine"
    assert said == (
        f"error: name: got 'mine', and {folder} holds a run of another recipe; expected the same settings, but 3 changed (was -> now):\n"
        "  data.held_out: [] -> [\"cat\"]\n"
        "  pretrain.lr: 0.001 -> 0.002\n"
        "  experts.boundaries: bisection -> [0.25, 0.75]\n"
        "fix: --set name=OTHER to keep both, or --update to go on under this name (stages that a change concerns, and those that need "
        f"them, run again, the others are reused), or delete {folder}\n"
    )  # fmt: skip


def test_the_ways_out_are_ways_out(recipe: Path) -> None:
    record(recipe)
    assert PASSED in cli(recipe), "the same recipe"
    changed = "pretrain.lr=2e-3"
    assert PASSED in cli(recipe, changed, "name=other")
    assert PASSED in cli(recipe, changed, options=("--update",))
    record(recipe, changed)
    assert PASSED in cli(recipe, changed), "an update is the recipe from then on"
    assert "pretrain.lr: 0.002 -> 0.001" in cli(recipe)


def test_where_and_how_safely_it_runs_is_no_part_of_it(recipe: Path) -> None:
    record(recipe)
    elsewhere = ["cluster.num_cpus=4", "tracking.experiment=x", "pretrain.workers=2", "experts.train.max_failures=9"]
    elsewhere += ["finetune.train.zero.stage=3", "experts.cpus_per_worker=1"]
    assert PASSED in cli(recipe, *elsewhere)
    assert recipe_identity(load(recipe, *elsewhere).resolved, "run") == recipe_identity(load(recipe).resolved, "run")
    assert "pretrain.zero.extra" in cli(recipe, "pretrain.zero.extra={wall_clock_breakdown: true}")
    often = cli(recipe, "pretrain.checkpoint_every=7", "pretrain.log_every=7")
    assert "2 changed" in often, "the guard looks at other steps and goes back to others"


def test_a_run_and_a_search_of_one_name_each_have_their_own_recipe(recipe: Path) -> None:
    record(recipe, kind="search")
    assert PASSED in cli(recipe, "experts.boundaries=[0.25, 0.75]"), "a run may use what the search found"
    record(recipe, "experts.boundaries=[0.25, 0.75]")
    assert PASSED in cli(recipe, "search.trials=9", "finetune.train.lr=1e-5", command="search"), "a search goes on, and does not fine-tune"
    assert "a search of another recipe" in (said := cli(recipe, "search.rungs=[6, 24]", command="search"))
    assert "search.rungs: [6, 12] -> [6, 24]" in said
    assert PASSED in cli(recipe, "search.rungs=[6, 24]", "experts.boundaries=[0.25, 0.75]"), "a run does not read the search's settings"


def test_a_long_difference_is_cut_and_counted(recipe: Path) -> None:
    record(recipe)
    keys = ["lr=3e-3", "batch_size=4", "crop_px=32", "weight_decay=0.5", "clip_norm=2.0", "ema_decay=0.1", "warmup_steps=1", "max_steps=8"]
    many = [f"{stage}.{key}" for stage in ("pretrain", "experts.train", "finetune.train") for key in keys]
    lines = cli(recipe, *many).splitlines()
    assert lines[21] == "  and 4 more"
    assert len(lines) == 23
    long = cli(recipe, f"data.held_out=[{', '.join(f'photograph-{i}' for i in range(30))}]")
    assert max(len(line) for line in long.splitlines()[1:2]) < 100


def test_folders_of_older_versions_are_taken_over(recipe: Path) -> None:
    folder = recipe.parent / "mine"
    folder.mkdir()
    assert PASSED in cli(recipe), "a folder without a record"
    (folder / "recipe.json").write_text(json.dumps({"hash": "abc", **load(recipe, "pretrain.lr=2e-3").resolved}))
    assert PASSED in cli(recipe), "a record from before there were identities"
    record(recipe)
    written = json.loads((folder / "recipe.json").read_text())
    assert written["kind"] == "run"
    assert written["identity"] == recipe_identity(load(recipe).resolved, "run")
    del written["recipe"]["pretrain"]["guard"], written["recipe"]["validation"]
    (folder / "recipe.json").write_text(json.dumps(written))
    assert "validation.crops: 16 -> 2" in cli(recipe), "what a record lacks had its default"
    assert "guard" not in cli(recipe)


def test_a_setting_that_only_one_side_has_is_shown() -> None:
    found = changes({"a": {"b": 1}, "gone": [1]}, {"a": {"b": None}, "new": "x"}, "run")
    assert [str(one) for one in found] == ["a.b: 1 -> not set", "new: not set -> x", "gone: [1] -> not set"]
