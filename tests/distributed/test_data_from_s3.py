"""Training on shards behind S3 that answers badly, through cache and loader processes, gives what training on local shards gives."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from flaky_s3 import FlakyS3, flaky_s3

from linearsr_platform import storage

pytestmark = pytest.mark.server

SCRIPT = """
import json, sys
from dataclasses import replace
from pathlib import Path
from toy_training import toy_job
from linearsr_platform.cluster.warm import train_here
from linearsr_platform.recipe.data_schema import ShardCacheConfig
folder, bucket, cache = sys.argv[1:]
jobs = [toy_job(Path(folder), "local"), toy_job(Path(folder), "remote", loader_workers=2)]
urls = tuple(f"{bucket}/{Path(path).name}" for path in jobs[1].train_shards)
jobs[1] = replace(jobs[1], train_shards=urls, validation_shards=urls, cache=ShardCacheConfig(cache, 0.001))
print(json.dumps([train_here(job).history for job in jobs]))
"""


RAY_SCRIPT = """
import json, os, sys, time
from dataclasses import replace
from pathlib import Path
from toy_training import free_cpus, toy_cluster, toy_job
from linearsr_platform.cluster.board import ProgressBoard
from linearsr_platform.cluster.experts import fit_all
from linearsr_platform.cluster.rehearsal import was_killed
from linearsr_platform.recipe.data_schema import ShardCacheConfig
from linearsr_platform.train.job import Rehearsal
def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
folder, bucket, cache = sys.argv[1:]
jobs = [toy_job(Path(folder), "local"), toy_job(Path(folder), "remote", task="WatchedToyTask", loader_workers=2, pids=True)]
urls = tuple(f"{bucket}/{Path(path).name}" for path in jobs[1].train_shards)
fed = os.path.join(folder, "fed")
jobs[1] = replace(
    jobs[1], train_shards=urls, validation_shards=urls, cache=ShardCacheConfig(cache, 0.001), rehearsal=Rehearsal(url=fed, kill=(0, 8))
)
with toy_cluster() as cluster:
    board = ProgressBoard.start()
    outcomes = fit_all(jobs, cluster, storage_url=os.path.join(folder, "ray"), board=board, on_poll=lambda _: None)
    board.close()
    free_cpus()
    pids = os.listdir(os.path.join(folder, "pids", "remote"))
    until = time.monotonic() + 15
    while (left := [pid for pid in pids if alive(pid)]) and time.monotonic() < until:
        time.sleep(0.2)
    print(json.dumps([*(outcomes[job.name].history for job in jobs), was_killed(fed), len(pids), left]))
"""


@contextmanager
def script_with_bucket(script: str, folder: Path, *, share: float) -> Iterator[tuple[Any, FlakyS3]]:
    """Give what a script, run beside a store that holds the toy's shards, prints last, and the store."""
    toy = str(Path(__file__).with_name("toy"))
    path = os.pathsep.join([toy, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    with flaky_s3(share=share) as server, pytest.MonkeyPatch.context() as patch:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            alone = {
                "RANK": "0",
                "LOCAL_RANK": "0",
                "WORLD_SIZE": "1",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(free.getsockname()[1]),
            }
        environment = {**server.environment, "PYTHONPATH": path, **(alone if script is SCRIPT else {})}
        for name, value in environment.items():
            patch.setenv(name, value)
        sys.path.insert(0, toy)
        from toy_training import write_images

        bucket = server.make_bucket("prepared")
        for shard in write_images(folder / "data"):
            storage.copy_file(shard, storage.join(bucket, Path(shard).name))
        command = [sys.executable, "-c", script, str(folder), bucket, str(folder / "cache")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        yield json.loads(done.stdout.splitlines()[-1]), server


def test_remote_shards_give_the_same_training(tmp_path: Path) -> None:
    with script_with_bucket(SCRIPT, tmp_path, share=0.3) as ((local, remote), server):
        assert len(local) == 3
        assert remote == local
        assert len(list((tmp_path / "cache").glob("*.tar"))) == 2
        assert server.faults.total() > 0


@pytest.mark.ray
def test_loader_processes_and_the_cache_work_in_rays_workers_and_end_with_them(tmp_path: Path) -> None:
    before = set(os.listdir("/dev/shm"))
    with script_with_bucket(RAY_SCRIPT, tmp_path, share=0.0) as ((local, remote, killed, processes, left), _):
        assert killed
        assert len(local) == 3
        assert remote == local
        # Two attempts of a worker and its two loaders.
        assert processes >= 6
        assert left == []
        assert len(list((tmp_path / "cache").glob("*.tar"))) == 2
    assert set(os.listdir("/dev/shm")) <= before
