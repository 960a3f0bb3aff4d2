"""What a recipe may say but hardly means: told as warnings, and never a reason to refuse it."""

from linearsr.degradation_config import UNREAD_KEYS
from linearsr.schedule import unvisited_experts
from linearsr_platform.recipe.schema import Recipe


def notes_on(recipe: Recipe) -> tuple[str, ...]:
    """Return a sentence for each such setting of a valid recipe, with what would mend it."""
    missed = unvisited_experts(recipe.sampler, recipe.model.flow.shift, recipe.experts.resolved_boundaries)
    return (*(() if missed is None else (missed,)), *_unread_keys(recipe))


def _unread_keys(recipe: Recipe) -> tuple[str, ...]:
    """Say which keys came with a pasted block of Real-ESRGAN's and do nothing."""
    given = [key for key in UNREAD_KEYS if getattr(recipe.degradation, key, None) is not None]
    if not given:
        return ()
    crops = "; crop_px of each stage sets the size of crops" if "gt_size" in given else ""
    return (f"degradation: got {', '.join(given)}, which Real-ESRGAN reads and nothing here does{crops}; fix: remove them",)
