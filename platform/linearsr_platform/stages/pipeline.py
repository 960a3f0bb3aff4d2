"""The pipeline: which stages there are, what each needs, and how a run goes through them.

A stage's key is a hash of its settings and of the keys of the stages it needs, with the content of what they made from files that may
change. Its artifacts live in a folder named by that key, so a finished stage is found again, and a changed setting makes a new folder and
leaves the old one alone.
"""

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import replace

from linearsr_platform import storage
from linearsr_platform.data.manifest import load_manifest
from linearsr_platform.errors import UserError
from linearsr_platform.recipe.identity import stable_hash
from linearsr_platform.report.model import StageRecord
from linearsr_platform.stages import assemble, evaluate, experts, finetune, prepare, pretrain, promote, register
from linearsr_platform.stages.context import RunContext, Stage, StageOutput, StageResult
from linearsr_platform.tracking.runs import TrackedRun

FORMAT = 1
"""Raised when the artifacts of an older version can no longer be read."""

STOPPED = "stopped; the same command goes on"
"""What is said of a stage that was ended from outside."""

TRAINED = ("prepare", "pretrain", "experts", "finetune")


def _prepare(context: RunContext, url: str, tracked: TrackedRun) -> StageOutput:
    """Prepare, and refuse what the evaluation would, days of training later."""
    output = prepare.run(context, url, tracked)
    evaluate.check_held_out(context, load_manifest(url))
    return output


STAGES: dict[str, Stage] = {
    "prepare": Stage((), prepare.settings, _prepare, remark=prepare.remark),
    "pretrain": Stage(("prepare",), pretrain.settings, pretrain.run),
    "experts": Stage(("prepare", "pretrain"), experts.settings, experts.run),
    "finetune": Stage(("prepare", "pretrain", "experts"), finetune.settings, finetune.run),
    "assemble": Stage(TRAINED, assemble.settings, assemble.run),
    "evaluate": Stage(("prepare", "assemble"), evaluate.settings, evaluate.run),
    "register": Stage(("assemble", "evaluate"), register.settings, register.run, register.suffices, register.remark),
    "promote": Stage(("register",), promote.settings, promote.run, promote.suffices),
}
"""Every stage, in order."""


def run_pipeline(context: RunContext, *, redo_from: str | None = None, records: list[StageRecord]) -> None:
    """Run every stage of a recipe; see `run_stages`."""
    run_stages(context, STAGES, redo_from=redo_from, records=records)


def run_stages(
    context: RunContext,
    stages: Mapping[str, Stage],
    *,
    redo_from: str | None,
    records: list[StageRecord],
    before_work: Callable[[], None] = lambda: None,
) -> None:
    """Run every stage that is not done, in order; what happened is appended to `records` as it happens.

    Args:
        context: the run.
        stages: by name; those that they need are among them, or have results in the context.
        redo_from: name of the first stage to do again even if it is done.
        records: filled also when a stage fails.
        before_work: called once before the first stage that is not done, to refuse what can never work.
    """
    if redo_from is not None:
        _forget(context, stages, redo_from)
    redoing, working = False, False
    for name, stage in stages.items():
        redoing = redoing or name == redo_from
        key = stage_key(context, name, stage)
        url = stage_url(context.run_url, name, key)
        if redoing:
            StageResult.remove(url)
        found = StageResult.read(url)
        if found is not None and stage.suffices(context, found):
            context.results[name] = found
            records.append(StageRecord(name=name, status="skipped", seconds=0.0, summary=found.summary))
            context.pipeline_run.mark_skipped(name, f"done in run {found.run_id}")
            context.display.stage_skipped(name, found.summary)
            if remark := stage.remark(context, found):
                context.display.message(f"{name}: {remark}")
            continue
        if not working:
            before_work()
            working = True
        _run_stage(context, name, stage, key, url, records)


def _forget(context: RunContext, stages: Mapping[str, Stage], redo_from: str) -> None:
    """Delete what there is of a stage and of all after it, the last first.

    Whatever ends the run early, no later stage is left that was made from what is made anew. As far as there are results: a stage's
    settings may be read from those of the stages before it, and from their files.
    """
    known, urls = replace(context, results=dict(context.results)), []
    for name, stage in stages.items():
        try:
            key = stage_key(known, name, stage)
        except (OSError, UserError):
            # The files are gone or broken, which may be why they are to be made anew; what cannot be is told on the way there.
            break
        urls.append(stage_url(context.run_url, name, key))
        found = StageResult.read(urls[-1])
        if found is None:
            break
        known.results[name] = found
    for url in reversed(urls[list(stages).index(redo_from) :]):
        StageResult.remove(url)


def stage_url(run_url: str, name: str, key: str) -> str:
    """Return the folder of a stage's artifacts inside a run's."""
    return storage.join(run_url, f"{name}-{key[:12]}")


def stage_key(context: RunContext, name: str, stage: Stage) -> str:
    """Return the hash that names a stage's result."""
    needs = {need: context.results[need].identity for need in stage.needs}
    return key_of(name, stage.settings(context), needs)


def key_of(name: str, settings: object, needs: Mapping[str, str]) -> str:
    """Return the hash that names a stage's result, given its settings as JSON and the identities of the stages it needs."""
    return stable_hash({"format": FORMAT, "stage": name, "settings": settings, "needs": dict(needs)})


def _run_stage(context: RunContext, name: str, stage: Stage, key: str, url: str, records: list[StageRecord]) -> None:
    context.display.stage_started(name)
    started = time.monotonic()
    tracked: TrackedRun = context.tracker.stage_run(context.pipeline_run.run_id, name)
    output: StageOutput | None = None
    try:
        with tracked:
            output = stage.run(context, url, tracked)
            tracked.set_tags({"key": key, "summary": output.summary})
    finally:
        # Interrupts too: the display must say which stage they hit, and the record goes into the report.
        seconds = time.monotonic() - started
        if output is None:
            error = sys.exception()
            # Ray makes SystemExit of SIGTERM; what it carries is no reason.
            stopped = isinstance(error, (KeyboardInterrupt, SystemExit))
            reason = STOPPED if stopped else str(error) or type(error).__name__
            records.append(StageRecord(name=name, status="failed", seconds=seconds, summary=reason))
            context.display.stage_failed(name, reason)
    result = StageResult(
        stage=name,
        key=key,
        url=url,
        summary=output.summary,
        seconds=seconds,
        run_id=tracked.run_id,
        data=output.data,
        content=output.content,
    )
    result.write()
    context.results[name] = result
    records.append(StageRecord(name=name, status="done", seconds=seconds, summary=output.summary))
    context.display.stage_finished(name, seconds, output.summary)
