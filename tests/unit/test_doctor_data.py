"""What `linearsr doctor` trains on: what a run has prepared if it is whole, else its own."""

from dataclasses import replace
from pathlib import Path

import pytest

from linearsr_platform.errors import StageError, UserError
from linearsr_platform.recipe.load import load_recipe
from linearsr_platform.stages.context import RecipeContext, StageResult
from linearsr_platform.stages.doctor import prepared_data
from linearsr_platform.stages.pipeline import stage_url
from linearsr_platform.stages.prepare import shards_of

SMOKE = Path(__file__).parents[2] / "pipelines" / "smoke.yaml"


class Silence:
    """A display that shows nothing."""

    def update(self, name: str, done: int, total: int) -> None:
        pass

    def message(self, text: str) -> None:
        pass


def context(folder: Path, *overrides: str) -> RecipeContext:
    loaded = load_recipe(str(SMOKE), overrides=[f"storage={folder}", *overrides])

    def never() -> None:
        raise AssertionError("no cluster is needed for ten photographs")

    return RecipeContext(loaded=loaded, storage_url=str(folder), display=Silence(), open_cluster=never)


def test_the_data_of_a_run_are_taken_only_if_they_are_the_recipes_and_whole(tmp_path: Path) -> None:
    own = prepared_data(context(tmp_path), str(tmp_path / "doctor"))
    assert Path(own.url).is_relative_to(tmp_path / "doctor")
    assert not (tmp_path / "smoke").exists()
    # As a run leaves them.
    kept = stage_url(str(tmp_path / "smoke"), "prepare", own.key)
    Path(kept).parent.mkdir()
    Path(own.url).rename(kept)
    replace(own, url=kept).write()

    found = context(tmp_path)
    assert prepared_data(found, str(tmp_path / "second")).url == kept
    assert not (tmp_path / "second").exists()
    other = prepared_data(context(tmp_path, "data.validation_px=72", "validation.crop_px=72"), str(tmp_path / "third"))
    assert other.key != own.key
    assert Path(other.url).is_relative_to(tmp_path / "third")

    found.results["prepare"] = StageResult.read(kept)
    shard = Path(shards_of(found, "train")[0])
    shard.write_bytes(shard.read_bytes()[:-1] + b"x")
    with pytest.raises((UserError, StageError), match=shard.name):
        prepared_data(context(tmp_path), str(tmp_path / "fourth"))
