"""Every recipe in pipelines/ is valid at every place in pipelines/profiles/, and says what it is for."""

from pathlib import Path

import pytest

from linearsr_platform.recipe.load import load_recipe
from linearsr_platform.recipe.promote_schema import NoRegressionRule

PIPELINES = Path(__file__).parents[2] / "pipelines"
RECIPES = sorted(PIPELINES.glob("*.yaml"))
PROFILES = sorted((PIPELINES / "profiles").glob("*.yaml"))


def test_there_are_recipes_and_profiles():
    assert {"quickstart", "smoke"} <= {path.stem for path in RECIPES}
    assert {"local", "gpu-node", "cluster"} <= {path.stem for path in PROFILES}


@pytest.mark.parametrize("profile", [None, *PROFILES], ids=lambda path: path.stem if path else "no-profile")
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_every_recipe_is_valid_with_every_profile(recipe, profile):
    loaded = load_recipe(str(recipe), str(profile) if profile else None)
    assert loaded.recipe.name == recipe.stem


@pytest.mark.parametrize("path", [*RECIPES, *PROFILES], ids=lambda path: path.stem)
def test_the_header_says_what_it_is_and_how_to_run_it(path):
    header = path.read_text().splitlines()
    entries = ["# What:", "# Run:", "# Needs:"] + ([] if path in PROFILES else ["# Expect:", "# Source:"])
    for entry in entries:
        assert any(line.startswith(entry) for line in header[:8]), entry
    assert any(str(path.relative_to(PIPELINES.parent)) in line for line in header[:8])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_tables_of_a_recipe_are_beside_it(recipe):
    loaded = load_recipe(str(recipe))
    for source in loaded.recipe.data.sources.values():
        assert source.table is None or Path(loaded.folder, source.table).is_file()


@pytest.mark.parametrize("name", ["quickstart", "linearsr_x4"])
def test_a_release_is_refused_for_seams_and_every_rule_names_a_protocol_that_is_measured(name):
    recipe = load_recipe(str(PIPELINES / f"{name}.yaml")).recipe
    seams = [rule for rule in recipe.gate.rules if isinstance(rule, NoRegressionRule) and "seam" in rule.of]
    assert seams
    for rule in recipe.gate.rules:
        assert getattr(rule, "protocol", recipe.evaluate.protocols[0]) in recipe.evaluate.protocols
