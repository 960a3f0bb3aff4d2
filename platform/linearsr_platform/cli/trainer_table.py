"""What is known about trainers while they run, and the table a terminal shows of them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from linearsr_platform.report.markup import metric_label

NOT_SCORES = frozenset({"loss", "samples_per_s", "seconds", "step", "lr", "grad_norm"})
"""Values of a validation that are not shown as scores."""
AT_REST = frozenset({"queued", "starting", "done", "failed"})
"""States in which a trainer has no time left to tell."""
BAR_FROM_COLUMNS = 104
"""Terminal width from which trainers get a bar."""


@dataclass
class Trainer:
    """What is known about one trainer."""

    name: str
    step: int
    updated_s: float
    paced_from: tuple[int, float]
    """Step and time from which the pace is measured: where training began, or began again after a lost worker."""
    spent_s: float = 0.0
    total_steps: int | None = None
    max_seconds: float | None = None
    loss: float | None = None
    samples_per_s: float | None = None
    scores: dict[str, float] = field(default_factory=dict)
    rollbacks: int = 0
    state: str = "starting"

    def update(self, kind: str, step: int, values: Mapping[str, float], now_s: float) -> None:
        """Take in one event; scores stay until the next validation."""
        if kind == "trip":
            self.rollbacks += 1
        if kind in ("start", "trip") or (kind != "state" and self.state in ("queued", "starting")):
            self.state, self.paced_from = "training", (step, now_s)
        if kind != "trip":
            self.spent_s = values.get("seconds", now_s - self.paced_from[1])
        self.step, self.updated_s = step, now_s
        if kind == "metrics":
            self.loss = values.get("loss", self.loss)
            self.samples_per_s = values.get("samples_per_s", self.samples_per_s)
        elif kind == "validation":
            self.scores = {name: value for name, value in values.items() if name not in NOT_SCORES}

    @property
    def status(self) -> str:
        """What it is doing, and how often the guard took it back."""
        return self.state + (f", {self.rollbacks} rollback{'s' if self.rollbacks > 1 else ''}" if self.rollbacks else "")

    def left_s(self, now_s: float) -> float | None:
        """Return the seconds until the steps or the time budget are used up, whichever is first; None if that is not known.

        The knee may end training earlier; nobody can know when.
        """
        if self.state in AT_REST:
            return None
        bounds = []
        first_step, first_s = self.paced_from
        if self.total_steps is not None and self.step > first_step and self.updated_s > first_s:
            bounds.append((self.total_steps - self.step) * (self.updated_s - first_s) / (self.step - first_step))
        if self.max_seconds is not None:
            bounds.append(self.max_seconds - self.spent_s)
        return max(0.0, min(bounds) - (now_s - self.updated_s)) if bounds else None


def trainer_table(trainers: Iterable[Trainer], now_s: float, width: int) -> Table:
    """Return one row for each trainer, in order of name, with a bar where `width` columns have room for it; `now_s` is the time."""
    wide = width >= BAR_FROM_COLUMNS
    trainers = sorted(trainers, key=lambda trainer: trainer.name)
    scores = tuple(dict.fromkeys(name for trainer in trainers for name in trainer.scores))
    table = Table(box=None, padding=(0, 2, 0, 0), pad_edge=False, header_style="dim")
    table.add_column("", no_wrap=True)
    if wide:
        table.add_column("", width=18)
    for title in ("step", "loss", *(("samples/s",) if wide else ()), "left", *map(metric_label, scores)):
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("state", no_wrap=True)
    for trainer in trainers:
        of_all = f"/{trainer.total_steps}" if trainer.total_steps else ""
        bar = ProgressBar(total=max(trainer.total_steps or 1, 1), completed=trainer.step if trainer.total_steps else 0, width=18)
        style = "green" if trainer.state.startswith(("knee", "done")) else "red" if trainer.state == "failed" else "dim"
        table.add_row(
            Text(trainer.name),
            *((bar,) if wide else ()),
            f"{trainer.step}{of_all}",
            value_text(trainer.loss),
            *(("" if trainer.samples_per_s is None else f"{trainer.samples_per_s:.1f}",) if wide else ()),
            left_text(trainer.left_s(now_s)),
            *(value_text(trainer.scores.get(name)) for name in scores),
            Text(trainer.status, style=style),
        )
    return table


def value_text(value: float | None) -> str:
    """Write a loss or a score: two decimals from 10 on, four below; nothing if there is none."""
    return "" if value is None else f"{value:.{2 if abs(value) >= 10 else 4}f}"


def left_text(seconds: float | None) -> str:
    """Write the time left as a clock, or nothing if it is not known."""
    return "" if seconds is None else clock_time(seconds)


def clock_time(seconds: float) -> str:
    """Write seconds as `m:ss` or `h:mm:ss`."""
    minutes, rest = divmod(round(max(seconds, 0.0)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
