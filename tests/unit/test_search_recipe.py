"""Recipes of searches: what they extend, what a search found, and what is refused before anything starts."""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from linearsr_platform.cluster.capacity import Room, Share, trials_at_once
from linearsr_platform.errors import RecipeErrors, UserError
from linearsr_platform.recipe.load import load_recipe
from linearsr_platform.recipe.search_schema import trial_training
from linearsr_platform.stages import profile, search
from linearsr_platform.stages.context import RecipeContext

PIPELINES = Path(__file__).parents[2] / "pipelines"
SEARCH = str(PIPELINES / "search_boundaries.yaml")


def problems(path: str, *overrides: str) -> list[str]:
    with pytest.raises(RecipeErrors) as caught:
        load_recipe(path, None, overrides)
    return [str(problem) for problem in caught.value.errors]


def test_a_recipe_changes_what_it_extends_and_nothing_else() -> None:
    base, search = load_recipe(str(PIPELINES / "quickstart.yaml")), load_recipe(SEARCH)
    changed = {key for key in base.resolved if base.resolved[key] != search.resolved[key]}
    assert changed == {"name", "search"}


def test_tables_of_an_extended_recipe_are_found_from_any_folder(tmp_path: Path) -> None:
    (tmp_path / "top.yaml").write_text(f"extends: {PIPELINES / 'smoke.yaml'}\nname: top\n")
    loaded = load_recipe(str(tmp_path / "top.yaml"))
    table = loaded.recipe.data.sources["skimage"].table
    assert table is not None
    assert (tmp_path / table).resolve() == PIPELINES / "quickstart" / "photos.csv"


def test_a_mistake_in_the_extended_recipe_is_reported_there(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text((PIPELINES / "smoke.yaml").read_text().replace("crops_per_image: 2", "crops_per_image: 0"))
    (tmp_path / "top.yaml").write_text("extends: base.yaml\nname: top\n")
    (first, *_) = problems(str(tmp_path / "top.yaml"))
    assert "base.yaml:" in first
    assert "crops_per_image: got 0" in first


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("extends: nowhere.yaml\n", "there is no such file"),
        ("extends: top.yaml\n", "a recipe that does not extend this one"),
        ("extends: 3\n", "the path of a recipe, relative to this one"),
    ],
)
def test_what_cannot_be_extended_is_named(tmp_path: Path, text: str, rule: str) -> None:
    (tmp_path / "top.yaml").write_text(text)
    assert any(rule in problem for problem in problems(str(tmp_path / "top.yaml")))


@pytest.mark.parametrize(
    "key", ["data", "model", "validation", "evaluate", "experts", "pretrain", "finetune", "promote", "cluster", "search"]
)
def test_a_section_that_is_none_is_named_and_ends_no_rule(key: str) -> None:
    assert any(problem.startswith(f"--set {key}=3: {key}: got 3") for problem in problems(SEARCH, f"{key}=3"))


def test_what_a_search_found_becomes_numbers_of_the_recipe(tmp_path: Path) -> None:
    found = tmp_path / "runs" / "mine"
    found.mkdir(parents=True)
    (found / "boundaries.yaml").write_text("# Found by the search mine.\nexperts:\n  boundaries: [0.25, 0.75]\n")
    storage = f"storage={tmp_path / 'runs'}"
    loaded = load_recipe(str(PIPELINES / "quickstart.yaml"), None, [storage, "experts.boundaries=from:mine"])
    assert loaded.recipe.experts.boundaries == (0.25, 0.75)
    assert loaded.hash == load_recipe(str(PIPELINES / "quickstart.yaml"), None, [storage, "experts.boundaries=[0.25, 0.75]"]).hash
    (problem,) = problems(str(PIPELINES / "quickstart.yaml"), storage, "experts.boundaries=from:yours")
    assert f"expected from:NAME of a search that has ended under {tmp_path / 'runs'} (mine)" in problem


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("search.rungs=[200, 100]", "search.rungs: got [200, 100]; expected strictly ascending steps"),
        ("search.rungs=[2, 100]", "at least 4: one for each expert"),
        ("search.metric=fsim", 'search.metric: got "fsim"; expected one of validation.metrics'),
        ("search.min_width_log_snr=5", "at most 3.98: 4 experts share 15.93 in log-SNR"),
        ("search.experts=[7]", "a whole number >= 1 and <= 6"),
        ("search.score.crop_px=256", "at most data.validation_px, 128"),
        ("experts.train.schedule=cosine", "constant where search.rungs has several"),
        ("search.finalists.seeds=1", "a whole number >= 2"),
    ],
)
def test_what_could_not_work_is_refused_before_anything_starts(override: str, told: str) -> None:
    assert any(told in problem for problem in problems(SEARCH, override))


@pytest.mark.parametrize(("stage", "taken"), [(0, 0), (2, 2), (3, 2)])
def test_a_trial_trains_on_one_worker_with_the_same_batches(stage: int, taken: int) -> None:
    """Not with ZeRO 3, of which DeepSpeed keeps every engine in the process that trains one expert after the other."""
    train = load_recipe(SEARCH, None, [f"experts.train.zero.stage={stage}", "experts.train.workers=2"]).recipe.experts.train
    trial = trial_training(train)
    assert (trial.workers, trial.micro_batch_size, trial.zero.stage) == (1, train.micro_batch_size, taken)
    assert not trial.knee.stop


def test_trials_at_once_are_counted_from_the_cluster_and_one_too_many_is_refused_with_the_arithmetic() -> None:
    machines = (Share(cpus=4, gpus=1), Share(cpus=2))
    assert trials_at_once(Share(cpus=2), Room(nodes=machines), wanted=None) == 3
    assert trials_at_once(Share(cpus=2), Room(nodes=machines), wanted=2) == 2
    assert trials_at_once(Share(cpus=1, gpus=1), Room(nodes=machines), wanted=None) == 1
    assert trials_at_once(Share(cpus=1), Room(nodes=machines), wanted=None) == 6
    # Ray puts a fraction on one GPU: with four of them it was seen to place so many of each.
    gpus = Room(nodes=(Share(cpus=64, gpus=4),))
    placed = {1.0: 4, 2.0: 2, 3.0: 1, 0.75: 4, 0.6: 4, 0.5: 8, 0.3: 12, 0.25: 16, 0.1: 40}
    assert {share: gpus.workers(Share(cpus=1, gpus=share)) for share in placed} == placed
    with_memory = tuple(replace(machine, memory_bytes=2e9) for machine in machines)
    assert trials_at_once(Share(cpus=1, memory_bytes=1.5e9), Room(nodes=with_memory), wanted=None) == 2
    with pytest.raises(
        UserError, match=r"a trial, which takes 5 CPUs on one machine, .* machines have 4 CPUs and 1 GPUs; 2 CPUs; .* fix: lower"
    ):
        trials_at_once(Share(cpus=5), Room(nodes=machines), wanted=None)


def test_a_search_starts_on_a_cluster_that_grows_from_nothing_and_not_on_a_local_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nothing = Room(nodes=(Share(cpus=0),))
    for stage in (search, profile):
        monkeypatch.setattr(stage, "room_now", lambda: nothing)

    def check(*overrides: str) -> None:
        loaded = load_recipe(SEARCH, None, overrides)
        context: Any = RecipeContext(loaded=loaded, storage_url=str(tmp_path), display=cast("Any", None), open_cluster=lambda: None)
        search.check_room(context)

    check("cluster.address=head:6379")
    with pytest.raises(UserError, match="got no room for a trial"):
        check()
    assert trials_at_once(Share(cpus=1, gpus=1), nothing, wanted=None, may_grow=True) == 1
    assert trials_at_once(Share(cpus=2), Room(nodes=(Share(cpus=8),)), wanted=3, may_grow=True) == 3
    # Machines come for those that are wanted; without a number nobody knows how many that would be.
    assert trials_at_once(Share(cpus=2), Room(nodes=(Share(cpus=8),)), wanted=6, may_grow=True) == 6
    assert trials_at_once(Share(cpus=2), Room(nodes=(Share(cpus=8),)), wanted=None, may_grow=True) == 4
