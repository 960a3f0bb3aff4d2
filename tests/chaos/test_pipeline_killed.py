"""The driver of a pipeline is killed inside a stage and between stages: run again, it ends with the same model, and leaves nothing."""

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from hashlib import sha256
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.slow]
SMOKE = Path(__file__).parents[2] / "pipelines" / "smoke.yaml"
STEPS, CHECKPOINT = 30, 10
GONE_S = 180.0
"""Two agents of Ray wait for its dead control store for 80 to 110 s before they give up; all else is gone in a few seconds."""
STAGES = {"pretrain": 1, "experts.train": 2, "finetune.train": 3}
"""Which ZeRO stage each trains under."""


def settings(folder: Path) -> list[str]:
    changed = [
        f"storage={folder}/runs",
        "cluster.num_cpus=2",
        "cluster.object_store_mb=100",
        "experts.boundaries=[]",
        "evaluate.step_sweep=[1]",
    ]
    changed += [
        f"pretrain.max_steps={STEPS}",
        f"pretrain.checkpoint_every={CHECKPOINT}",
        "pretrain.log_every=1",
        "pretrain.knee.stop=false",
    ]
    return [*changed, *(f"{name}.zero.stage={stage}" for name, stage in STAGES.items())]


class Driver:
    """`linearsr run` as a process, and everything that it left."""

    def __init__(self, folder: Path) -> None:
        command = [str(Path(sys.executable).with_name("linearsr")), "run", str(SMOKE)]
        command += [word for setting in settings(folder) for word in ("--set", setting)]
        self.folder, self.log = folder, folder / f"driver-{time.monotonic_ns()}.log"
        with self.log.open("w") as output:
            self.process = psutil.Popen(command, stdout=output, stderr=output, env={**os.environ, "COLUMNS": "200", "TMPDIR": "/tmp"})
        self.children: set[psutil.Process] = set()
        self.shared: set[str] = set()
        self.folders: set[str] = set()

    @property
    def said(self) -> str:
        return self.log.read_text()

    def look(self) -> None:
        """Note which processes, shared memory and temporary folders it has."""
        if not self.process.is_running():
            return
        self.children |= set(self.process.children(recursive=True))
        for child in [self.process, *self.children]:
            try:
                opened = [str(Path(link).readlink()) for link in Path(f"/proc/{child.pid}/fd").iterdir()]
            except OSError:
                continue
            self.shared |= {path for path in opened if path.startswith("/dev/shm/") and not path.endswith("(deleted)")}
            self.folders |= {"/".join(path.split("/")[:3]) for path in opened if path.startswith("/tmp/linearsr-")}

    def wait_for(self, condition: Callable[[], bool], limit_s: float = 300.0) -> None:
        end, next_look = time.monotonic() + limit_s, 0.0
        while not condition():
            assert self.process.poll() is None, self.said[-4000:]
            assert time.monotonic() < end, self.said[-4000:]
            if time.monotonic() >= next_look:
                self.look()
                # A look takes time from what it looks at.
                next_look = time.monotonic() + 2
            time.sleep(0.2)

    def kill(self) -> None:
        self.look()
        self.process.send_signal(signal.SIGKILL)
        self.process.wait(30)

    def left(self) -> list[str]:
        """Return what of it is still there, once nothing is or the time is over."""
        end = time.monotonic() + GONE_S
        while True:
            left = [
                f"{child.pid} {child.name()}" for child in self.children if child.is_running() and child.status() != psutil.STATUS_ZOMBIE
            ]
            left += [path for path in self.shared | self.folders if Path(path).exists()]
            if not left or time.monotonic() > end:
                return left
            time.sleep(0.5)


def released(folder: Path) -> dict[str, str]:
    """Return the hash of each file of weights that was released."""
    found = sorted(folder.glob("runs/smoke/assemble-*/**/*.safetensors"))
    return {file.name: sha256(file.read_bytes()).hexdigest() for file in found}


@pytest.fixture
def run() -> Iterator[Callable[[Path], Driver]]:
    """Start drivers, none of which outlives the test."""
    drivers: list[Driver] = []

    def start(folder: Path) -> Driver:
        folder.mkdir(exist_ok=True)
        drivers.append(Driver(folder))
        return drivers[-1]

    yield start
    for driver in drivers:
        if driver.process.is_running():
            driver.process.kill()
            driver.process.wait(30)


def test_a_killed_driver_costs_time_only(run: Callable[[Path], Driver], tmp_path: Path) -> None:
    from three_stages import note_line

    whole, killed = tmp_path / "whole", tmp_path / "killed"
    first = run(killed)
    first.wait_for(lambda: any(killed.glob(f"runs/smoke/pretrain-*/ray/*/checkpoints/step_{CHECKPOINT:08d}/rank_0.json")))
    first.kill()

    second, started = run(killed), time.monotonic()
    second.wait_for(lambda: any(killed.glob(f"runs/smoke/pretrain-*/ray/*/checkpoints/step_{2 * CHECKPOINT:08d}/rank_0.json")))
    note_line("the driver of a pipeline, until its next checkpoint", "pretrain", [(CHECKPOINT, time.monotonic() - started)])
    second.wait_for(lambda: "experts: done" in second.said)
    second.kill()

    for last in (run(killed), run(whole)):
        last.process.wait(300)
        assert last.process.returncode == 0, last.said[-4000:]
    third = Path(sorted(killed.glob("driver-*.log"))[-1]).read_text()
    assert "prepare: skipped" in second.said
    assert "pretrain: skipped" not in second.said
    assert all(f"{stage}: skipped" in third for stage in ("prepare", "pretrain", "experts"))
    assert "finetune: skipped" not in third
    assert len(released(whole)) == 1
    assert released(killed) == released(whole)
    assert [first.left(), second.left()] == [[], []]
