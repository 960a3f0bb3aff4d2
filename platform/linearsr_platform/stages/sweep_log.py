"""What a sweep says, written down: the ledger, MLflow, and the table of trials that the user sees."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from linearsr.metric_table import metric_spec
from linearsr.partition import Proposal
from linearsr_platform.cluster.board import Event
from linearsr_platform.cluster.boundary_search import boundaries_of
from linearsr_platform.cluster.trial import SCORE, TrialPlan
from linearsr_platform.report.search_model import ranked
from linearsr_platform.stages.context import RunContext
from linearsr_platform.stages.ledger import Ledger, RungResult, TrialRecord
from linearsr_platform.stages.profile import section_of
from linearsr_platform.tracking.runs import TrackedRun


class SweepLog:
    """Satisfies `cluster.sweep.SweepObserver`: writes the ledger and MLflow, and shows the table of trials."""

    def __init__(self, context: RunContext, ledger: Ledger, plan: TrialPlan, proposals: Sequence[Proposal], concurrent: int) -> None:
        """Write down the trials of a plan, of which `concurrent` run at once; a trial that begins at a proposal is named after it."""
        self._context, self._ledger, self._plan, self._concurrent = context, ledger, plan, concurrent
        self._origins = {plan.grid.offsets(one.boundaries): one.name for one in reversed(proposals)}
        self._names: dict[str, str] = {}
        self._runs: dict[str, TrackedRun] = {}
        self._doing: dict[str, str] = {}
        self._since: dict[str, float] = {}

    def on_start(self, trial: str, config: Mapping[str, Any]) -> None:
        """Open the trial's record and run: those of an interrupted attempt, or new ones."""
        if trial in self._names:
            return
        boundaries = boundaries_of(config, self._plan.grid)
        origin = self._origins.get(self._plan.grid.offsets(boundaries), "search")
        record = self._ledger.begin(config, boundaries, origin)
        self._names[trial], self._since[trial] = record.name, time.monotonic()
        self._runs[trial] = self._run(record)
        self._ledger.put(replace(record, run_id=self._runs[trial].run_id))
        self.show()

    def on_result(self, trial: str, result: Mapping[str, Any]) -> None:
        """Record a rung, once."""
        record = self._record(trial)
        if any(known.steps == result["steps"] for known in record.results):
            # Reported before its process was lost.
            return
        reported = RungResult(
            steps=result["steps"],
            score=result[SCORE],
            score_error=result["score_error"],
            measured=result["measured"],
            experts=tuple(result["experts"]),
            order=self._ledger.next_order(),
        )
        now_s = time.monotonic()
        seconds = record.seconds + now_s - self._since[trial]
        self._since[trial] = now_s
        self._ledger.put(replace(record.with_result(reported), seconds=seconds))
        means = {f"crops/{name}": sum(values) / len(values) for name, values in reported.measured.items()}
        self._runs[trial].log_metrics(reported.steps, {SCORE: reported.score, "score_error": reported.score_error, **means})
        self.show()

    def on_end(self, trial: str) -> None:
        """Close a trial: done at the last rung, stopped before it."""
        record = self._record(trial)
        last = record.last
        self._finish(trial, replace(record, state="done" if last is not None and last.steps == self._plan.rungs[-1] else "stopped"))

    def on_failure(self, trial: str, reason: str) -> None:
        """Close a trial with the reason of its failure."""
        self._finish(trial, replace(self._record(trial), state="failed", reason=reason))

    def on_poll(self, events: list[Event]) -> None:
        """Show what trials are at, and what went wrong in them and did not stop them."""
        for event in events:
            name = self._names.get(event.source)
            if name is not None and event.kind == "doing":
                self._doing[name] = event.detail["doing"]
            elif name is not None and event.kind == "message":
                self._context.display.message(f"{name}: {event.detail['text']}")
        self.show()

    def show(self) -> None:
        """Show all trials as they are."""
        section = section_of(self._context)
        higher = metric_spec(section.metric).higher_is_better
        rows = ranked(self._ledger.rows(section.rungs, self._doing), higher)
        scored = [row for row in rows if row.has_score]
        self._context.display.trials(rows, total=section.trials, left_s=self._left_s(section.trials), best=scored[0] if scored else None)

    def close(self) -> None:
        """Write what MLflow has not got yet; trials that were interrupted stay open."""
        for run in self._runs.values():
            run.flush()

    def _left_s(self, total: int) -> float | None:
        took = [record.seconds for record in self._ledger.ended if record.seconds > 0]
        if not took:
            return None
        running_s = sum(time.monotonic() - since for trial, since in self._since.items() if not self._record(trial).ended)
        left = total - len(self._ledger.ended)
        return max(0.0, left * sum(took) / len(took) - running_s) / self._concurrent

    def _record(self, trial: str) -> TrialRecord:
        return self._ledger.records[self._names[trial]]

    def _finish(self, trial: str, record: TrialRecord) -> None:
        if self._record(trial).ended:
            return
        self._ledger.put(record)
        self._doing.pop(record.name, None)
        run = self._runs[trial]
        run.set_tags({"state": record.state, **({"reason": record.reason} if record.reason else {})})
        run.finish("FAILED" if record.state == "failed" else "FINISHED")
        self.show()

    def _run(self, record: TrialRecord) -> TrackedRun:
        """Return the trial's MLflow run: its own from before an interruption, or a new one, also where its own is gone."""
        tracker, parent = self._context.tracker, self._context.pipeline_run.run_id
        if record.run_id is not None and (own := tracker.resume(record.run_id)) is not None:
            return own
        params = {"boundaries": list(record.boundaries), "experts": len(record.boundaries) + 1, "origin": record.origin}
        found = tracker.find_stage_run(parent, record.name)
        return tracker.stage_run(parent, record.name, params=params) if found is None else found
