"""Training jobs: what a stage asks of its trainers, and how what they report reaches the user and MLflow.

The only file of the platform that names the method's task; a worker builds it from the picklable config.
"""

from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from linearsr.codec_source import codec_digest
from linearsr.config import CodecConfig, LatentStatistics, ModelConfig, TagsConfig
from linearsr.guard import Trip
from linearsr.knee import KneeDecision
from linearsr.metric_table import metric_spec
from linearsr.task_config import TaskConfig
from linearsr_platform import storage
from linearsr_platform.cluster.board import Event, ProgressBoard
from linearsr_platform.cluster.experts import TrainerFailure, fit_all
from linearsr_platform.errors import StageError, UserError
from linearsr_platform.recipe.data_schema import ShardCacheConfig
from linearsr_platform.recipe.train_schema import TrainConfig
from linearsr_platform.report.knee_plot import plot_knee
from linearsr_platform.stages.context import RecipeContext, RunContext
from linearsr_platform.stages.kept_weights import Policy, kept_weights
from linearsr_platform.stages.prepare import manifest_of, shards_of
from linearsr_platform.tracking.runs import TrackedRun
from linearsr_platform.train.job import TrainJob
from linearsr_platform.train.outcome import TrainOutcome

TASK = "linearsr.task:SuperResolutionTask"


def model_config(context: RecipeContext) -> ModelConfig:
    """Return the network's config: the recipe's model section, with the data's tags."""
    model = context.recipe.model
    return ModelConfig(
        scale=model.scale,
        codec=codec_of(context),
        backbone=model.resolved_backbone,
        flow=model.flow,
        prior=model.prior,
        tags=TagsConfig(
            encoder="learned" if model.text is None else "text",
            vocabulary=manifest_of(context).vocabulary,
            max_tags=model.max_tags,
            dropout=model.tag_dropout,
            from_lr=model.tags_from_lr,
        ),
    )


def codec_of(context: RecipeContext) -> CodecConfig:
    """Return the recipe's codec; see `RunContext.codec`."""
    return context.codec


def statistics_of(context: RecipeContext) -> LatentStatistics:
    """Return the latent statistics that `pretrain` measured."""
    value = context.results["pretrain"].data["statistics"]
    return LatentStatistics(**{name: tuple(numbers) for name, numbers in value.items()})


def make_job(
    context: RecipeContext,
    *,
    name: str,
    url: str,
    train: TrainConfig,
    interval: tuple[float, float],
    statistics: LatentStatistics,
    split: str = "train",
    init_weights: str | None = None,
    memory_bytes: Mapping[int, float] | None = None,
) -> TrainJob:
    """Describe one trainer: the network of `interval`, fed by `split`, writing below `url`/`name`; `memory_bytes` is `worker_bytes`'s."""
    recipe, model = context.recipe, model_config(context)
    digest = codec_digest(model.codec)
    task = TaskConfig(
        model=model,
        statistics=statistics,
        interval=interval,
        degradation=recipe.degradation,
        augmentation=recipe.augmentation,
        crop_px=train.crop_px,
        validation_steps=recipe.validation.steps,
        metrics=recipe.validation.metrics,
        metric_weights=context.metric_weights,
        codec_digest=digest,
        seed=recipe.seed,
        text=manifest_of(context).text,
    )
    return TrainJob(
        name=name,
        task=TASK,
        task_config=task,
        train=train,
        validation=recipe.validation,
        train_shards=shards_of(context, split),
        validation_shards=shards_of(context, "validation"),
        output_url=storage.join(url, name),
        init_weights=init_weights,
        codec_digest=digest,
        seed=recipe.seed,
        cache=shard_cache(context, split),
        memory_bytes=memory_bytes,
        compiled_kernels=recipe.cluster.compiled_kernels,
    )


def shard_cache(context: RecipeContext, split: str) -> ShardCacheConfig | None:
    """Return where workers keep copies of a split's shards, with their hashes; None where the shards are local."""
    data, prepared = context.recipe.data, context.results["prepare"].url
    if storage.is_local(prepared):
        return None
    hashes = {storage.join(prepared, shard.url): shard.sha256 for shard in manifest_of(context).splits[split].shards}
    return ShardCacheConfig(data.cache_folder, data.cache_gb, hashes)


def run_jobs(
    context: RunContext, jobs: Sequence[TrainJob], url: str, tracked: TrackedRun, *, cpus_per_worker: float | None = None
) -> dict[str, TrainOutcome]:
    """Train all jobs on the cluster, as many at once as fit, and log each as a run of its own.

    Raises:
        StageError: naming every trainer that failed; the others are finished and are not trained again. A `UserError` instead
            if all of them failed by a mistake of the user.
    """
    context.open_cluster()
    by_name = {job.name: job for job in jobs}
    trips: dict[str, list[Trip]] = {job.name: [] for job in jobs}
    runs: dict[str, TrackedRun] = {}

    def on_poll(events: Iterable[Event]) -> None:
        for event in events:
            show_event(context, event, by_name[event.source].train)
            prefix = "validation/" if event.kind == "validation" else "train/"
            if event.kind in ("validation", "metrics"):
                runs[event.source].log_metrics(event.step, {prefix + name: value for name, value in event.values.items()})
            elif event.kind == "trip":
                trips[event.source].append(Trip(**event.detail))
                runs[event.source].log_trips(trips[event.source])
                context.display.message(f"{event.source}: guard: {trips[event.source][-1].describe()}")

    # Whatever ends this early, Ctrl-C included, is not to leave runs that count as running for ever, without their last metrics.
    with ExitStack() as closing:
        for job in jobs:
            runs[job.name] = closing.enter_context(context.tracker.stage_run(tracked.run_id, job.name, params=_params(job)))
            context.display.trainer_event(job.name, "state", 0, {}, state="queued")
        board = ProgressBoard.start()
        closing.callback(board.close)
        outcomes = fit_all(
            jobs,
            context.recipe.cluster,
            storage_url=storage.join(url, "ray"),
            board=board,
            on_poll=on_poll,
            cpus_per_worker=cpus_per_worker,
        )
        failed = {name: outcome for name, outcome in outcomes.items() if isinstance(outcome, TrainerFailure)}
        done = {name: outcome for name, outcome in outcomes.items() if isinstance(outcome, TrainOutcome)}
        for name, run in runs.items():
            if name in done:
                _log_outcome(run, done[name], context.recipe.tracking.artifacts)
            run.finish("FINISHED" if name in done else "FAILED")
    if failed:
        raise trainers_failed(failed, done)
    return done


def show_event(context: RecipeContext, event: Event, train: TrainConfig) -> None:
    """Pass an event on to the user, but for checkpoints: one is complete some steps after it was taken, and changes nothing to see."""
    if event.kind == "message":
        context.display.message(f"{event.source}: {event.detail['text']}")
    elif event.kind != "checkpoint":
        context.display.trainer_event(event.source, event.kind, event.step, event.values, train.max_steps, train.max_seconds, _state(event))


def trainers_failed(failed: Mapping[str, TrainerFailure], done: Mapping[str, TrainOutcome]) -> UserError | StageError:
    """Return the error that tells which trainers failed and why; tracebacks of workers go into its notes, for `--verbose`."""
    reasons = "; ".join(failure.message for failure in failed.values())
    kept = f"; {', '.join(done)} finished and will not be trained again" if done else ""
    kind = UserError if all(failure.by_user for failure in failed.values()) else StageError
    count = f"{len(failed)} of {len(failed) + len(done)} trainers failed"
    error = kind(f"{count}: {reasons}{kept}; fix the cause and run the same command again")
    for name, failure in failed.items():
        if failure.details:
            error.add_note(f"{name}:\n{failure.details}")
    return error


def _state(event: Event) -> str | None:
    """Return what the trainer is doing from now on, in a word; None if that did not change."""
    if event.kind == "end":
        return "failed" if "error" in event.detail else "done"
    if event.detail.get("state") in ("confirmed", "diverging"):
        return f"knee@{event.detail['knee_step']}"
    return None


def knee_weights(outcomes: Mapping[str, Any], name: str) -> str:
    """Return the URL of the weights at a trainer's knee, from a stage result's `trainers`."""
    return str(outcomes[name]["knee_weights"])


def as_data(outcomes: Mapping[str, TrainOutcome]) -> dict[str, Any]:
    """Return outcomes as a stage result keeps them."""
    return {name: outcome.to_json() for name, outcome in outcomes.items()}


def describe(outcomes: Mapping[str, TrainOutcome]) -> str:
    """Say in one line where each trainer's knee was."""
    return ", ".join(f"{name} {_knee(outcome)} {outcome.steps} steps{_rollbacks(outcome)}" for name, outcome in outcomes.items())


def _rollbacks(outcome: TrainOutcome) -> str:
    parts = [f"{len(outcome.trips)} rolled back"] if outcome.trips else []
    parts += [f"trouble with {len(outcome.messages)} checkpoints"] if outcome.messages else []
    return f" ({', '.join(parts)})" if parts else ""


def _knee(outcome: TrainOutcome) -> str:
    if outcome.knee_step is None:
        return "no knee in"
    kept = "knee" if outcome.decision["confirmed_at"] is not None else "best"
    return f"{kept} {outcome.knee_step} of"


def _params(job: TrainJob) -> dict[str, object]:
    config = job.task_config
    interval = config.interval if isinstance(config, TaskConfig) else None
    return {"train": job.train.model_dump(mode="json"), "interval": interval, "init_weights": job.init_weights, "seed": job.seed}


def _log_outcome(run: TrackedRun, outcome: TrainOutcome, artifacts: Policy) -> None:
    with TemporaryDirectory(prefix="linearsr-knee-") as folder:
        picture = Path(folder) / "knee.png"
        points = [(int(point["step"]), {name: point[name] for name in point if name != "step"}) for point in outcome.history]
        orientations = {name: metric_spec(name).higher_is_better for name in outcome.decision["metrics"]}
        if orientations:
            plot_knee(points, orientations, KneeDecision.from_json(outcome.decision), str(picture))
        run.log_knee(
            knee_step=outcome.knee_step,
            decision=outcome.decision,
            history=outcome.history,
            picture=picture if orientations else None,
        )
    if outcome.trips:
        # Whole: those before a restart of this process too.
        run.log_trips([Trip(**trip) for trip in outcome.trips])
    for url in kept_weights(outcome, artifacts):
        with storage.local_path(url) as path:
            run.log_artifact(path, "weights")
    run.set_tags({"stopped_by": outcome.stopped_by, "knee_weights": outcome.knee_weights})
    if outcome.messages:
        run.set_tags({"messages": "; ".join(outcome.messages)})
    run.log_params(
        {"outcome": {key: value for key, value in outcome.to_json().items() if key not in ("history", "decision", "trips", "messages")}}
    )


def statistics_data(statistics: LatentStatistics) -> dict[str, Any]:
    """Return statistics as JSON."""
    return {name: list(values) for name, values in asdict(statistics).items()}
