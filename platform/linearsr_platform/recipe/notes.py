"""What a recipe may say but hardly means: told as warnings, and never a reason to refuse it."""

from linearsr.schedule import unvisited_experts
from linearsr_platform.recipe.schema import Recipe


def notes_on(recipe: Recipe) -> tuple[str, ...]:
    """Return a sentence for each such setting of a valid recipe, with what would mend it."""
    missed = unvisited_experts(recipe.sampler, recipe.model.flow.shift, recipe.experts.resolved_boundaries)
    return () if missed is None else (missed,)
