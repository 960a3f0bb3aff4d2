"""A recipe that travels to a cluster: it means the same there, or is refused with every reason at once."""

from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from linearsr_platform.errors import RecipeErrors, UserError
from linearsr_platform.recipe.document import parse_document, write_document
from linearsr_platform.recipe.load import load_recipe
from linearsr_platform.recipe.portable import RECIPE_FILE, write_portable

PIPELINES = Path(__file__).parents[2] / "pipelines"
NUMBER_LIKE = st.from_regex(r"[-+]?[0-9.eE+_:x-]{1,8}", fullmatch=True)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text() | NUMBER_LIKE
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4), max_leaves=8)


@pytest.mark.parametrize("name", ["smoke", "quickstart", "search_boundaries"])
def test_a_recipe_means_the_same_where_it_arrives(name: str, tmp_path: Path) -> None:
    loaded = load_recipe(str(PIPELINES / f"{name}.yaml"), None, ["storage=/data/runs", "data.held_out=['0801', '1e3']"])
    write_portable(loaded, tmp_path, address="auto")
    arrived = load_recipe(str(tmp_path / RECIPE_FILE))
    before, after = loaded.recipe.model_dump(mode="json"), arrived.recipe.model_dump(mode="json")
    tables = [[source.pop("table") for source in recipe["data"]["sources"].values()] for recipe in (before, after)]
    assert after == {**before, "cluster": {**before["cluster"], "address": "auto"}}
    assert {(tmp_path / table).read_text() for table in tables[1]} == {(PIPELINES / table).read_text() for table in tables[0]}
    # Sources that share a table still do: every file it names must be in one of them.
    assert len(set(tables[1])) == 1


def test_settings_that_decide_no_result_travel_too(tmp_path: Path) -> None:
    given = ["storage=/data/runs", "data.cache_gb=500", "data.cache_folder=/nvme/cache", "experts.train.loader_workers=6"]
    loaded = load_recipe(str(PIPELINES / "smoke.yaml"), None, given)
    write_portable(loaded, tmp_path, address="auto")
    arrived = load_recipe(str(tmp_path / RECIPE_FILE)).recipe
    assert (arrived.data.cache_gb, arrived.data.cache_folder) == (500, "/nvme/cache")
    assert (arrived.experts.train.loader_workers, arrived.pretrain.loader_workers) == (6, 0)


@given(VALUES)
@example({"held_out": ["0801", "08", "1e3", "no", "2024-01-01", "<<", "", "\x85"]})
def test_whatever_is_written_is_read_back(value: object) -> None:
    document = parse_document(write_document(value), "recipe.yaml")
    assert document.problems == []
    assert repr(document.value) == repr(value), "also its type"


def test_what_means_something_here_alone_is_refused(tmp_path: Path) -> None:
    settings = ["data.sources.mine=photos", "data.cache_folder=cache", "tracking.uri=http://me:secret@mlflow:5000"]
    with pytest.raises(RecipeErrors) as raised:
        write_portable(load_recipe(str(PIPELINES / "smoke.yaml"), None, settings), tmp_path, address="auto")
    assert [problem.key for problem in raised.value.errors] == ["storage", "data.cache_folder", "data.sources.mine.url", "tracking.uri"]
    assert "secret@" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_secrets_are_references_and_nothing_else() -> None:
    with pytest.raises(UserError, match=r"cluster\.secrets"):
        load_recipe(str(PIPELINES / "smoke.yaml"), None, ["cluster.secrets.AWS_SECRET_ACCESS_KEY=abc123"])
