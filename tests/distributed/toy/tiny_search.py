"""A search so small that a trial takes seconds, and its stages up to the trials."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from linearsr_platform.cli.execute import open_context
from linearsr_platform.recipe.load import load_recipe
from linearsr_platform.stages.context import RunContext
from linearsr_platform.stages.pipeline import run_stages
from linearsr_platform.stages.search import STAGES

SMOKE = Path(__file__).parents[3] / "pipelines" / "smoke.yaml"
RECIPE = f"""\
extends: {SMOKE}
name: tiny
cluster: {{num_cpus: 2, object_store_mb: 100}}
pretrain: {{max_steps: 4}}
search:
  experts: [3]
  trials: 7
  rungs: [6, 12]
  profile: {{levels: 8, samples: 4, crops: 1}}
  score: {{crops: 2, crop_px: 64, batch_size: 2, steps: 3}}
  finalists: {{top: 1, seeds: 2}}
"""
BEFORE_FINAL = tuple(name for name in STAGES if name != "finalists")


class Silent:
    """A display that shows nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **kwargs: None


@contextmanager
def tiny_search(folder: Path, overrides: Mapping[str, object] | None = None, run_id: str | None = None) -> Iterator[RunContext]:
    """Be in a search below `folder`, of which nothing has run yet in this process."""
    path = folder / "tiny.yaml"
    path.write_text(RECIPE)
    settings = [f"storage={folder / 'runs'}", *(f"{key}={value}" for key, value in (overrides or {}).items())]
    with ExitStack() as closing:
        context = open_context(load_recipe(str(path), None, settings), Silent(), closing, verbose=False, run_id=run_id)
        with context.pipeline_run:
            yield context


def run_to(context: RunContext, last: str) -> None:
    """Run the stages up to one of them; those that are done are skipped."""
    names = BEFORE_FINAL[: BEFORE_FINAL.index(last) + 1]
    run_stages(context, {name: STAGES[name] for name in names}, redo_from=None, records=[])
