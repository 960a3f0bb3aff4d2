"""Three trainers at once, under ZeRO 1, 2 and 3, two workers each; what a fault cost them, and what they came to."""

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file

from linearsr_platform import storage
from linearsr_platform.cluster.board import Event, ProgressBoard
from linearsr_platform.cluster.experts import TrainerFailure, fit_all
from linearsr_platform.recipe.schema import ClusterConfig
from linearsr_platform.recipe.train_schema import ZeroConfig
from linearsr_platform.train.job import TrainJob
from linearsr_platform.train.outcome import TrainOutcome

STEPS, INTERVAL = 30, 5
STAGES = (1, 2, 3)
CPUS_PER_WORKER = 2 / 6
LOSSES_FILE = os.environ.get("LINEARSR_LOSSES", "")
"""File to which what was lost is appended, a JSON line for each trainer; nothing is written if it is empty."""


def jobs_of(folder: Path, *, workers: int = 2, stages: Sequence[int] = STAGES, pause_s: float = 0.2, **train) -> list[TrainJob]:
    from toy_training import toy_job

    settings = {"max_steps": STEPS, "checkpoint_every": INTERVAL, "log_every": 1, "workers": workers, **train}
    return [toy_job(folder, f"zero-{s}", pause_s=pause_s, pids=True, zero=ZeroConfig(stage=s), **settings) for s in stages]


@dataclass
class Watch:
    """Passes events on to whoever makes trouble, and measures what the trouble cost."""

    trouble: Callable[["Watch"], None]
    steps: dict[str, list[tuple[float, int]]] = field(default_factory=dict)
    """Of each trainer: when it was seen at which step."""
    starts: dict[str, list[tuple[float, int]]] = field(default_factory=dict)
    checkpoints: dict[str, int] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    """Each begins with the trainer's name."""

    def __call__(self, events: Sequence[Event]) -> None:
        now = time.monotonic()
        for event in events:
            if event.kind == "start":
                self.starts.setdefault(event.source, []).append((now, event.step))
            elif event.kind == "metrics":
                self.steps.setdefault(event.source, []).append((now, event.step))
            elif event.kind == "checkpoint":
                self.checkpoints[event.source] = event.step
            elif event.kind == "message":
                self.messages.append(f"{event.source}: {event.detail['text']}")
        self.trouble(self)

    def step(self, name: str) -> int:
        """Return the last step that a trainer was seen at."""
        return self.steps[name][-1][1] if name in self.steps else 0

    def lost(self, name: str) -> list[tuple[int, float]]:
        """Return, for every restart, the steps that were taken again and the seconds until the trainer was back where it had been."""
        found = []
        for start, step in self.starts.get(name, [])[1:]:
            before = [(at, reached) for at, reached in self.steps[name] if at <= start]
            at, reached = before[-1]
            again = [when for when, step_then in self.steps[name] if when > start and step_then >= reached]
            found.append((reached - step, (again[0] if again else start) - at))
        return found


def train(jobs: Sequence[TrainJob], cluster: ClusterConfig, folder: Path | str, watch: Watch, *, cpus: float = CPUS_PER_WORKER) -> None:
    """Train all jobs to their ends, their checkpoints below a folder or URL, or fail."""
    board = ProgressBoard.start()
    try:
        outcomes = fit_all(jobs, cluster, storage_url=storage.join(str(folder), "ray"), board=board, on_poll=watch, cpus_per_worker=cpus)
    finally:
        board.close()
    failures = [outcome.message for outcome in outcomes.values() if isinstance(outcome, TrainerFailure)]
    assert not failures, failures
    assert {outcome.steps for outcome in outcomes.values() if isinstance(outcome, TrainOutcome)} == {STEPS}


def note(what: str, watch: Watch, names: Sequence[str]) -> None:
    """Append what was lost to the file of losses."""
    for name in names:
        note_line(what, name, watch.lost(name))


def note_line(what: str, trainer: str, lost: Sequence[tuple[int, float]]) -> None:
    """Append a line to the file of losses: steps taken again and seconds, for each restart."""
    if LOSSES_FILE:
        with open(LOSSES_FILE, "a") as file:
            file.write(json.dumps({"fault": what, "trainer": trainer, "lost": lost}) + "\n")


def pids_of(folder: Path, name: str) -> list[int]:
    """Return the workers of a trainer that live, by what they left."""
    return [int(file.name) for file in (folder / "pids" / name).glob("*") if alive(int(file.name))]


def alive(pid: int) -> bool:
    """Say whether a process runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Return a trainer's last averaged weights."""
    return load_file(folder / "out" / name / "snapshots" / f"step_{STEPS:08d}.safetensors")


def assert_equal(folder: Path, undisturbed: Path, names: Sequence[str]) -> None:
    """Compare the ends of trainings bit for bit, validations included."""
    for name in names:
        ours, theirs = weights(folder, name), weights(undisturbed, name)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours), name
        histories = [json.loads((one / "out" / name / "outcome.json").read_text())["history"] for one in (folder, undisturbed)]
        assert histories[0] == histories[1], name


def names_of(jobs: Sequence[TrainJob]) -> Iterator[str]:
    """Return the names of jobs."""
    return (job.name for job in jobs)
