"""What a running pipeline shows: a live display in a terminal, plain lines of text everywhere else.

Both are a `RunDisplay`; `make_display` picks one. A stage shows tasks that are counted (images, photographs) or trainers, all at
once, or the trials of a search; a stage that ended stays above as one line.
"""

import os
import sys
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from threading import RLock
from types import TracebackType
from typing import Literal, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from linearsr_platform.cli.search_table import SearchView, levels_text, live_trials, trial_event
from linearsr_platform.cli.trainer_table import Trainer, clock_time, left_text, trainer_table, value_text
from linearsr_platform.report.markup import duration, metric_label
from linearsr_platform.report.search_model import TrialRow

Status = Literal["done", "skipped", "failed"]

PLAIN_INTERVAL_S = 15.0
"""Least time between two plain lines of one task, or of one trainer between its validations."""
TRIAL_INTERVAL_S = 60.0
"""The same of one trial of a search, between its scores: many may run at once."""
LINES_ABOVE_TRIALS = 6
"""Lines that a live display needs beside the rows of its trials: the stage, heads, what is counted, the best, and the cursor's."""
MARKS = {"done": ("\u2714", "ok", "green"), "skipped": ("\u21b7", "--", "dim"), "failed": ("\u2718", "!!", "bold red")}
"""Status -> mark, mark in ASCII, style."""


@dataclass
class Task:
    """Something that is counted: images prepared, photographs evaluated."""

    name: str
    total: int
    unit: str
    started_s: float
    done: int = 0

    def left_s(self, now_s: float) -> float | None:
        """Return the seconds left at the pace so far; None before the first."""
        return (self.total - self.done) * (now_s - self.started_s) / self.done if self.done else None


class RunDisplay(ABC):
    """Shows a run. Use it as a context manager; it never swallows an exception. Any thread may call it."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        """Show on `console`; `clock` counts seconds."""
        self.console = console
        self._clock = clock
        self._lock = RLock()
        self._trainers: dict[str, Trainer] = {}
        self._tasks: dict[str, Task] = {}
        self._search: SearchView | None = None
        self._stage: str | None = None
        self._stage_started_s = clock()

    def __enter__(self) -> Self:
        """Start showing."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Stop showing; a stage that an exception cut short is said to have failed."""
        if self._stage is not None and kind is not None:
            self.stage_failed(self._stage, "interrupted" if kind is KeyboardInterrupt else f"ended by {kind.__name__}")

    def stage_started(self, name: str) -> None:
        """Begin a stage: forget the tasks, trainers and trials of the one before."""
        with self._lock:
            self._stage, self._stage_started_s = name, self._clock()
            self._trainers, self._tasks, self._search = {}, {}, None

    def stage_finished(self, name: str, seconds: float, summary: str) -> None:
        """End a stage well."""
        self._end("done", name, duration(seconds), summary)

    def stage_skipped(self, name: str, summary: str) -> None:
        """Say that a stage was done by an earlier run and is not done again."""
        self._end("skipped", name, "skipped", summary)

    def stage_failed(self, name: str, reason: str) -> None:
        """Say that a stage failed."""
        self._end("failed", name, duration(self._clock() - self._stage_started_s) if self._stage == name else "", reason)

    def task(self, name: str, total: int, unit: str) -> None:
        """Announce something to count: `total` of `unit`."""
        with self._lock:
            self._tasks[name] = Task(name=name, total=total, unit=unit, started_s=self._clock())

    def update(self, name: str, done: int, total: int | None = None) -> None:
        """Say how much of a task is done; `total` replaces the announced one, and a task never announced appears."""
        with self._lock:
            task = self._tasks.setdefault(name, Task(name=name, total=done, unit="", started_s=self._stage_started_s))
            task.done, task.total = done, task.total if total is None else total
        self._task_moved(task)

    def trainer_event(
        self,
        name: str,
        kind: str,
        step: int,
        values: Mapping[str, float],
        total_steps: int | None = None,
        max_seconds: float | None = None,
        state: str | None = None,
    ) -> None:
        """Take in what a trainer reports.

        Args:
            name: trainer, such as `expert-1`; its first event makes it appear.
            kind: `start` when its workers begin at `step`, `metrics` with `loss` and `samples_per_s`, `validation` with scores;
                `trip` when the guard took it back to `step`; `checkpoint` and `state` bring no numbers.
            step: optimizer step it happened at.
            values: numbers by name; `seconds` is the time the training loop has used of its budget.
            total_steps: steps at most; None keeps what was said before.
            max_seconds: time budget of the training loop; None keeps what was said before.
            state: what it is doing, in a word: `queued`, `knee@120`, `done`; None keeps what was said before.
        """
        with self._lock:
            now_s = self._clock()
            trainer = self._trainers.setdefault(name, Trainer(name=name, step=step, updated_s=now_s, paced_from=(step, now_s)))
            trainer.update(kind, step, values, now_s)
            trainer.total_steps = trainer.total_steps if total_steps is None else total_steps
            trainer.max_seconds = trainer.max_seconds if max_seconds is None else max_seconds
            changed_state = state is not None and state != trainer.state
            trainer.state = trainer.state if state is None else state
        self._trainer_moved(trainer, kind, changed_state=changed_state)

    def trials(self, rows: Sequence[TrialRow], *, total: int, left_s: float | None, best: TrialRow | None) -> None:
        """Show the trials of a boundary search; may be called as often as wanted.

        Args:
            rows: every trial so far, best first.
            total: trials that are to end.
            left_s: seconds the others may take; None if that is not known.
            best: the best so far.
        """
        with self._lock:
            before = self._search
            self._search = SearchView(rows=tuple(rows), total=total, left_s=left_s, updated_s=self._clock(), best=best)
            view = self._search
        self._trials_moved(before, view)

    @abstractmethod
    def message(self, text: str) -> None:
        """Show a line of text that stays."""

    @abstractmethod
    def _show_end(self, status: Status, name: str, took: str, summary: str) -> None: ...

    @abstractmethod
    def _task_moved(self, task: Task) -> None: ...

    @abstractmethod
    def _trainer_moved(self, trainer: Trainer, kind: str, *, changed_state: bool) -> None: ...

    @abstractmethod
    def _trials_moved(self, before: SearchView | None, view: SearchView) -> None: ...

    def _end(self, status: Status, name: str, took: str, summary: str) -> None:
        with self._lock:
            self._stage, self._trainers, self._tasks, self._search = None, {}, {}, None
        self._show_end(status, name, took, summary)


class PlainDisplay(RunDisplay):
    """Lines of text: one for each start and end of a stage and for each validation; the rest only now and then."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        """Show on `console`; every line begins with the time since now."""
        super().__init__(console, clock)
        self._started_s = clock()
        self._told_s: dict[str, float] = {}
        self._told_doing: dict[str, str] = {}

    def stage_started(self, name: str) -> None:
        """Begin a stage with a line."""
        super().stage_started(name)
        self._told_s, self._told_doing = {}, {}
        self.message(f"{name}: started")

    def message(self, text: str) -> None:
        """Write a line."""
        line = f"[{clock_time(self._clock() - self._started_s)}] {text}"
        self.console.print(line, markup=False, highlight=False, soft_wrap=True)

    def _show_end(self, status: Status, name: str, took: str, summary: str) -> None:
        said = {"done": f"done in {took}", "skipped": "skipped", "failed": f"failed after {took}" if took else "failed"}[status]
        self.message(f"{name}: {said}{f': {summary}' if summary else ''}")

    def _task_moved(self, task: Task) -> None:
        if task.done == task.total or self._is_due(task.name):
            self.message(f"{task.name}: {task.done}/{task.total} {task.unit}".rstrip())

    def _trainer_moved(self, trainer: Trainer, kind: str, *, changed_state: bool) -> None:
        told = kind in ("start", "validation", "trip") or changed_state
        if not told and (kind != "metrics" or not self._is_due(trainer.name)):
            return
        self._told_s[trainer.name] = self._clock()
        parts = [f"step {trainer.step}" + (f"/{trainer.total_steps}" if trainer.total_steps else "")]
        parts += [f"loss {value_text(trainer.loss)}"] if trainer.loss is not None else []
        if kind == "validation":
            parts += [f"{metric_label(name)} {value_text(value)}" for name, value in trainer.scores.items()]
        parts += [f"{trainer.samples_per_s:.1f} samples/s"] if trainer.samples_per_s is not None else []
        left_s = trainer.left_s(self._clock())
        parts += [f"at most {duration(left_s)} left"] if left_s is not None else []
        parts += [trainer.status] if trainer.status != "training" else []
        self.message(f"{self._owner(trainer.name)}: {', '.join(parts)}")

    def _trials_moved(self, before: SearchView | None, view: SearchView) -> None:
        if before is None and view.ended:
            # What was there at the first call ended before this attempt.
            self.message(f"{self._stage or 'search'}: goes on after {view.counted(self._clock())}")
        known = {row.name: row for row in (before or view).rows}
        for row in sorted(view.rows, key=lambda row: row.name):
            event = trial_event(row, known.get(row.name))
            if event is not None:
                self._told_s[row.name] = self._clock()
            elif row.doing not in ("", self._told_doing.get(row.name)) and self._is_due(row.name, TRIAL_INTERVAL_S):
                self._told_doing[row.name] = row.doing
                event = f"{row.doing}, {row.origin} at t {levels_text(row.boundaries)}"
            if event is not None:
                best = ", best so far" if view.best is not None and row.name == view.best.name else ""
                self.message(f"{self._owner(row.name)}: {event}{best}; {view.counted(self._clock())}")

    def _owner(self, name: str) -> str:
        return name if self._stage in (None, name) else f"{self._stage} {name}"

    def _is_due(self, name: str, interval_s: float = PLAIN_INTERVAL_S) -> bool:
        now_s = self._clock()
        if now_s - self._told_s.get(name, self._stage_started_s) < interval_s:
            return False
        self._told_s[name] = now_s
        return True


class LiveDisplay(RunDisplay):
    """A display that redraws itself in a terminal; what is printed meanwhile appears above it."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        """Show on `console`, which must be a terminal."""
        super().__init__(console, clock)
        self._ascii = not console.encoding.lower().startswith("utf")
        self._spinner = Spinner("line" if self._ascii else "dots", style="cyan")
        self._live = Live(console=console, get_renderable=self.render, refresh_per_second=4, transient=True)

    def __enter__(self) -> Self:
        """Start redrawing."""
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        """Clear the moving part and give the cursor back, whatever happened."""
        try:
            super().__exit__(kind, error, trace)
        finally:
            self._live.stop()

    def message(self, text: str) -> None:
        """Print a line above the moving part."""
        self.console.print(text, markup=False, highlight=False)

    def render(self) -> RenderableType:
        """Return what moves: the running stage with its time, its tasks, its trainers and its trials."""
        with self._lock:
            if self._stage is None:
                return Text("")
            now_s = self._clock()
            head = Table.grid(padding=(0, 1))
            head.add_row(self._spinner, Text(self._stage, style="bold"), Text(clock_time(now_s - self._stage_started_s), style="dim"))
            parts: list[RenderableType] = [head]
            if self._tasks:
                parts.append(Padding(self._task_table(now_s), (0, 0, 0, 2)))
            if self._trainers:
                parts.append(Padding(trainer_table(self._trainers.values(), now_s, self.console.width), (0, 0, 0, 2)))
            if self._search is not None:
                above = LINES_ABOVE_TRIALS + len(self._tasks) + (len(self._trainers) + 1 if self._trainers else 0)
                parts.append(Padding(live_trials(self._search, now_s, self.console, self.console.height - above), (0, 0, 0, 2)))
            return Group(*parts)

    # Nothing is printed under the lock: the redrawing thread holds the console's lock when it asks for this one.
    def _show_end(self, status: Status, name: str, took: str, summary: str) -> None:
        mark, mark_ascii, style = MARKS[status]
        line = Table.grid(padding=(0, 1))
        line.add_column(no_wrap=True)
        line.add_column(no_wrap=True, min_width=9)
        line.add_column(no_wrap=True, min_width=10, justify="right")
        line.add_column(overflow="fold")
        quiet = "red" if status == "failed" else "dim"
        line.add_row(
            Text(mark_ascii if self._ascii else mark, style=style), Text(name), Text(took, style="dim"), Text(summary, style=quiet)
        )
        self.console.print(line)

    def _task_moved(self, task: Task) -> None:
        """Nothing to do: the next redraw shows it."""

    def _trainer_moved(self, trainer: Trainer, kind: str, *, changed_state: bool) -> None:
        """Nothing to do: the next redraw shows it."""

    def _trials_moved(self, before: SearchView | None, view: SearchView) -> None:
        """Nothing to do: the next redraw shows it."""

    def _task_table(self, now_s: float) -> Table:
        table = Table.grid(padding=(0, 2, 0, 0))
        for task in self._tasks.values():
            bar = ProgressBar(total=max(task.total, 1), completed=task.done, width=24)
            table.add_row(Text(task.name), bar, Text(f"{task.done}/{task.total} {task.unit}".rstrip()), left_text(task.left_s(now_s)))
        return table


def make_display(console: Console | None = None, *, is_terminal: bool | None = None) -> RunDisplay:
    """Return the display that fits where the output goes.

    Args:
        console: where to show; standard output if not given.
        is_terminal: True for the live display, False for plain lines; None finds out: plain without a terminal and on CI.
    """
    shown_on = console if console is not None else Console()
    if is_terminal is None:
        on_ci = os.environ.get("CI", "").lower() not in ("", "0", "false")
        is_terminal = shown_on.is_terminal and not shown_on.is_dumb_terminal and not on_ci
    return LiveDisplay(shown_on) if is_terminal else PlainDisplay(shown_on)


@contextmanager
def display_beside_result(*, as_json: bool) -> Iterator[RunDisplay]:
    """Yield a display that leaves the standard output to a result where that is JSON, and has others leave it too.

    Ray writes to the standard output of every driver that something waits for a machine, asked for logs or not.
    """
    if not as_json:
        with make_display() as display:
            yield display
        return
    with redirect_stdout(sys.stderr), make_display(Console(stderr=True)) as display:
        yield display
