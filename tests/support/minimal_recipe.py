"""The shortest recipe there is, written to a file, and what is said about one that is wrong."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from linearsr_platform.errors import RecipeErrors, RecipeProblem
from linearsr_platform.recipe.load import load_recipe

MINIMAL = """\
name: small
data:
  sources:
    photos: {url: /photos}
model: {preset: nano}
pretrain: {max_steps: 10, lr: 1e-4}
experts:
  train: {max_steps: 10}
finetune:
  train: {max_steps: 10}
"""


def write_recipe(folder: Path, text: str, name: str = "recipe.yaml") -> str:
    """Write a recipe below a folder and return its path."""
    path = folder / name
    path.write_text(text)
    return str(path)


def problems_of(path: str, profile: str | None = None, overrides: Sequence[str] = ()) -> Sequence[RecipeProblem]:
    """Load a recipe that must be refused and return everything that is wrong with it."""
    with pytest.raises(RecipeErrors) as caught:
        load_recipe(path, profile, overrides)
    return caught.value.errors
