"""How fast stages are: as given, or as the last run of the same name was."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from linearsr_platform import storage
from linearsr_platform.recipe.schema import STAGE_NAMES, Recipe
from linearsr_platform.recipe.train_schema import TrainConfig
from linearsr_platform.stages.context import StageResult
from linearsr_platform.train.outcome import TrainOutcome

RAY_START_S = 6.0
"""From the start of a trainer to its first step, as far as it is waiting: for Ray's controller, placement and process group."""
TRAINER_CPU_S = 5.5
"""CPU time of a trainer's own processes until then, mostly imports."""
WORKER_CPU_S = 8.5
"""The same of each worker: torch, DeepSpeed, metrics, engine."""


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How fast a stage is."""

    samples_per_s: float | None
    """Training crops a second of one trainer; None for a stage that does not train, or if nobody knows."""
    validation_s: float = 0.0
    """Of one validation, with what is saved beside it."""
    stage_s: float | None = None
    """Of a stage that does not train."""
    source: str
    """Where this is known from."""


def start_seconds(trainers: int, workers: int, cpus: float) -> float:
    """Return how long trainers that start together take to their first step, on so many CPUs."""
    return RAY_START_S + trainers * (TRAINER_CPU_S + workers * WORKER_CPU_S) / max(1.0, cpus)


def paces(recipe: Recipe, given: Mapping[str, float], *, earlier: bool = True) -> dict[str, Pace]:
    """Return the pace of each stage that is known, by name.

    Args:
        recipe: its run's folder is looked into.
        given: crops a second of one trainer by stage; go before what was measured.
        earlier: whether to look there; without, what is given is all that is known.
    """
    run_url = storage.join(storage.absolute(recipe.storage), recipe.name)
    found: dict[str, Pace] = {}
    for result in _results(run_url) if earlier else []:
        outcomes = {name: TrainOutcome.from_json(value) for name, value in result.data.get("trainers", {}).items()}
        if outcomes:
            found[result.stage] = _measured(outcomes, _training(recipe, result.stage))
        else:
            found[result.stage] = Pace(samples_per_s=None, stage_s=result.seconds, source="last run")
    for stage, rate in given.items():
        known = found.get(stage)
        found[stage] = Pace(samples_per_s=rate, validation_s=known.validation_s if known else 0.0, source="given")
    return found


def train_seconds(train: TrainConfig, pace: Pace) -> float | None:
    """Return how long a trainer's loop takes at most, its knee not counted; None if nobody knows."""
    limit = train.max_seconds
    if not pace.samples_per_s:
        return limit
    validations = train.max_steps // train.validate_every + 1
    whole = train.max_steps * train.batch_size / pace.samples_per_s + validations * pace.validation_s
    return whole if limit is None else min(whole, limit)


def _results(run_url: str) -> list[StageResult]:
    """Return the finished stages of earlier runs, the newest of each stage last; a search of this name has others beside them."""
    files = storage.list_files(run_url, "*/result.json")
    finished = sorted((file for file in files if file.removeprefix(run_url).strip("/").count("/") == 1), key=_written_s)
    results = [StageResult.read(storage.parent(file)) for file in finished]
    return [result for result in results if result is not None and result.stage in STAGE_NAMES]


def _written_s(file: str) -> float:
    """Return when a file was written, seconds since the epoch."""
    return storage.call(file, lambda fs, path: float(fs.modified(path).timestamp()))


def _measured(outcomes: Mapping[str, TrainOutcome], train: TrainConfig) -> Pace:
    """Average over a stage's trainers."""
    count = len(outcomes)
    rate = sum(outcome.samples_per_s for outcome in outcomes.values()) / count
    spent = sum(_beside_steps(outcome, train) for outcome in outcomes.values())
    return Pace(samples_per_s=rate, validation_s=spent / sum(len(outcome.history) for outcome in outcomes.values()), source="last run")


def _beside_steps(outcome: TrainOutcome, train: TrainConfig) -> float:
    """Return the seconds of a trainer's loop that went into validations and what is saved."""
    return max(0.0, outcome.seconds - outcome.steps * train.batch_size / max(outcome.samples_per_s, 1e-9))


def _training(recipe: Recipe, stage: str) -> TrainConfig:
    section: Any = recipe.pretrain if stage == "pretrain" else getattr(recipe, stage).train
    assert isinstance(section, TrainConfig)  # noqa: S101 (stages with trainers are those that have one)
    return section
