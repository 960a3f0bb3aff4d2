"""A disk that is full for a while: trainings end as if nothing had been, and say what was."""

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.slow]
DISK_BYTES = 2**20


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of a megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"a small disk cannot be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_that_is_full_for_a_while(undisturbed: Path, tmp_path: Path, disk: Path) -> None:
    from three_stages import STEPS, Watch, assert_equal, jobs_of, note, train
    from toy_training import toy_cluster

    # Slow, so that the last to start still trains when the first has had its trouble.
    jobs = jobs_of(tmp_path, pause_s=0.5)
    names = [job.name for job in jobs]
    ballast = disk / "ballast"
    refused: dict[str, int] = {}

    def fill_and_free(watch: Watch) -> None:
        for text in watch.messages:
            name = text.partition(":")[0]
            refused.setdefault(name, watch.step(name))
            assert "could not be written" in text
            assert "No space left on device" in text
        if refused.keys() == set(names):
            ballast.unlink(missing_ok=True)
        elif watch.starts.keys() == set(names):
            # Again and again, because old checkpoints go.
            fill(ballast)

    watch = Watch(fill_and_free)
    with toy_cluster() as cluster:
        train(jobs, cluster, disk, watch)
    assert os.listdir(disk / "ray") == []
    note("a full disk", watch, names)
    for name in names:
        assert watch.lost(name) == []
        assert refused[name] < watch.checkpoints[name] <= STEPS
    assert_equal(tmp_path, undisturbed, names)


def fill(file: Path) -> None:
    """Make a file longer until its disk is full."""
    with file.open("ab", buffering=0) as opened:
        while True:
            try:
                opened.write(bytes(4096))
            except OSError:
                return
