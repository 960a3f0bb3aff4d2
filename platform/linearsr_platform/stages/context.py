"""What every stage is given, what it returns, and who it tells about progress."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, Protocol

from linearsr.config import CodecConfig
from linearsr_platform import storage
from linearsr_platform.errors import UserError
from linearsr_platform.recipe.load import LoadedRecipe
from linearsr_platform.recipe.schema import Recipe
from linearsr_platform.report.search_model import TrialRow
from linearsr_platform.tracking.runs import TrackedRun, Tracker

EventKind = Literal["start", "metrics", "validation", "checkpoint", "trip", "message", "end", "doing", "state"]


class Display(Protocol):
    """Who shows the user what happens."""

    def stage_started(self, name: str) -> None:
        """A stage begins."""

    def stage_finished(self, name: str, seconds: float, summary: str) -> None:
        """A stage ended well."""

    def stage_skipped(self, name: str, summary: str) -> None:
        """A stage was done before and its result is taken."""

    def stage_failed(self, name: str, reason: str) -> None:
        """A stage ended in an error, which follows."""

    def task(self, name: str, total: int, unit: str) -> None:
        """A counted piece of work inside a stage begins."""

    def update(self, name: str, done: int, total: int | None = None) -> None:
        """That work got to `done` of `total`."""

    def trainer_event(
        self,
        name: str,
        kind: EventKind,
        step: int,
        values: Mapping[str, float],
        total_steps: int | None = None,
        max_seconds: float | None = None,
        state: str | None = None,
    ) -> None:
        """A trainer reported metrics, a validation, a checkpoint, a trip of the guard or a change of state."""

    def trials(self, rows: Sequence[TrialRow], *, total: int, left_s: float | None, best: TrialRow | None) -> None:
        """The trials of a search are now like this; `left_s` is about how long the rest takes."""

    def message(self, text: str) -> None:
        """Something worth a line of its own."""


@dataclass(frozen=True, kw_only=True)
class StageResult:
    """What a finished stage left behind; kept as `result.json` in its folder, written last."""

    stage: str
    key: str
    """Hash of everything that decides the result."""
    url: str
    """Folder of its artifacts."""
    summary: str
    """One line for people."""
    seconds: float
    run_id: str
    """MLflow run that made it."""
    data: dict[str, Any]
    """What later stages read, as JSON."""
    content: str | None = None
    """Hash of what later stages get, where the key does not decide it; None where it does, and in results of earlier versions."""

    @property
    def identity(self) -> str:
        """What the keys of later stages have of this one."""
        return self.key if self.content is None else f"{self.key}-{self.content}"

    def write(self) -> None:
        """Publish the result: from now on the stage counts as done."""
        storage.write_json(storage.join(self.url, "result.json"), asdict(self))

    @classmethod
    def read(cls, url: str) -> "StageResult | None":
        """Return the result in a stage's folder, or None if the stage was never finished there.

        Raises:
            UserError: if what is there is no result.
        """
        file = storage.join(url, "result.json")
        if not storage.exists(file):
            return None
        value: Any = storage.read_json(file)
        # The run's folder may have been moved since: where it is found is where it is, and so is what the result names in it.
        try:
            data = _rebased(value["data"], storage.parent(value["url"]), storage.parent(url))
            return cls(**{**value, "url": url, "data": data})
        except (AttributeError, KeyError, TypeError) as error:
            got = f"got what no stage writes ({error})"
            raise UserError(f"{file}: {got}; expected its result; fix: delete it and run the stage again") from error

    @staticmethod
    def remove(url: str) -> None:
        """Delete a stage's folder; the result goes first, so that a folder with a part of its files never counts as done."""
        storage.remove(storage.join(url, "result.json"))
        storage.remove(url)


def _rebased(value: Any, was: str, now: str) -> Any:
    """Return JSON in which the URLs of what is below one folder are below another."""
    if isinstance(value, dict):
        return {key: _rebased(item, was, now) for key, item in value.items()}
    if isinstance(value, list):
        return [_rebased(item, was, now) for item in value]
    return now + value.removeprefix(was) if isinstance(value, str) and value.startswith(f"{was}/") else value


@dataclass(frozen=True)
class StageOutput:
    """What a stage's function returns."""

    summary: str
    data: dict[str, Any] = field(default_factory=dict)
    content: str | None = None
    """See `StageResult.content`."""


@dataclass(kw_only=True)
class RecipeContext:
    """What is needed to work on a recipe's data and to describe its trainers; nothing of it is tracked."""

    loaded: LoadedRecipe
    storage_url: str
    """Absolute root of storage; runs of all recipes live under it."""
    display: Display
    open_cluster: Callable[[], None]
    """Starts or joins the Ray cluster at the first call; later calls do nothing."""
    results: dict[str, StageResult] = field(default_factory=dict)
    file_sizes: str = ""
    """Hash of the sizes of all files of the sources when they were listed last; see `prepare.settings`."""

    @property
    def recipe(self) -> Recipe:
        """The validated recipe."""
        return self.loaded.recipe

    @property
    def metric_weights(self) -> str | None:
        """Folder with the weights of learned metrics; absolute, because workers have another working directory."""
        weights = self.recipe.validation.weights
        return None if weights is None else storage.absolute(weights)

    @property
    def codec(self) -> CodecConfig:
        """The recipe's codec; a folder of weights is absolute, because workers have another working directory."""
        codec = self.recipe.model.codec
        if codec.source is None or not Path(codec.source).expanduser().is_dir():
            return codec
        return replace(codec, source=storage.absolute(codec.source))

    @property
    def run_url(self) -> str:
        """Folder of everything runs of this recipe's name write."""
        return storage.join(self.storage_url, self.recipe.name)


@dataclass(kw_only=True)
class RunContext(RecipeContext):
    """Everything a stage may use."""

    tracker: Tracker
    pipeline_run: TrackedRun
    user: str
    """Who runs this; goes into the history of promotions."""


@dataclass(frozen=True)
class Stage:
    """One step of the pipeline."""

    needs: tuple[str, ...]
    """Earlier stages whose results it reads."""
    settings: Callable[[RunContext], object]
    """What else decides its result, as JSON."""
    run: Callable[[RunContext, str, TrackedRun], StageOutput]
    """Does the work: context, folder of the stage, its MLflow run."""
    suffices: Callable[[RunContext, StageResult], bool] = lambda context, found: True
    """Tells whether a result that is there is enough; where it is not, `run` goes on in the same folder."""
    remark: Callable[[RunContext, StageResult], str] = lambda context, found: ""
    """What people should know of a result that is taken as it is; empty for nothing."""
