"""Storage that fails now and then, and a disk that is full for a while: trainings end as if nothing had been, and say what was."""

import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.slow]
FAILING, DISK_BYTES = 0.1, 2**20


@pytest.mark.server
def test_storage_that_fails_a_tenth_of_its_calls(undisturbed: Path, tmp_path: Path) -> None:
    """Shards, checkpoints and results are on S3; each worker of each trainer has its own connections."""
    from flaky_s3 import flaky_s3
    from three_stages import INTERVAL, Watch, assert_equal, jobs_of, note, train
    from toy_training import toy_cluster

    from linearsr_platform import storage
    from linearsr_platform.recipe.data_schema import ShardCacheConfig

    jobs = jobs_of(tmp_path, pause_s=0.0)
    names = [job.name for job in jobs]
    with flaky_s3(seed=7) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        bucket = server.make_bucket("chaos")
        for shard in jobs[0].train_shards:
            storage.copy_file(shard, storage.join(bucket, "data", storage.name_of(shard)))
        shards = tuple(storage.join(bucket, "data", storage.name_of(shard)) for shard in jobs[0].train_shards)
        cache = ShardCacheConfig(str(tmp_path / "cache"), 0.001)
        remote = {"train_shards": shards, "validation_shards": shards, "cache": cache}
        jobs = [replace(job, output_url=storage.join(bucket, "out", job.name), **remote) for job in jobs]
        server.share = FAILING
        watch = Watch(lambda watch: None)
        with toy_cluster() as cluster:
            train(jobs, cluster, bucket, watch)
        server.share = 0.0
        storage.copy_tree(storage.join(bucket, "out"), str(tmp_path / "out"))
        # Ray Train makes an empty object that stands for the folder.
        left = [file for file in storage.list_files(storage.join(bucket, "ray")) if not file.endswith("/")]
        assert left == [], "checkpoints go when a job is done"
        faults, requests = server.faults.total(), server.requests.total()
    assert faults > 0.05 * requests > 10
    assert set(watch.checkpoints) == set(names)
    assert all(step >= INTERVAL for step in watch.checkpoints.values())
    note("storage that fails a tenth of its calls", watch, names)
    assert [watch.lost(name) for name in names] == [[], [], []]
    assert_equal(tmp_path, undisturbed, names)


@pytest.mark.server
@pytest.mark.nightly
def test_storage_that_is_away_for_longer_than_anybody_waits(tmp_path: Path) -> None:
    """The loader gives up, and its worker with it; Ray Train starts another, which goes on from the checkpoint."""
    from flaky_s3 import flaky_s3
    from three_stages import INTERVAL, STEPS, Watch, alive, note, pids_of, train, weights
    from toy_training import toy_cluster, toy_job

    settings = {"max_steps": STEPS, "checkpoint_every": INTERVAL, "log_every": 1, "crops_per_image": 1}
    local = toy_job(tmp_path, "local", **settings)
    remote = toy_job(tmp_path, "remote", pause_s=0.2, pids=True, loader_workers=1, **settings)
    with flaky_s3(kinds=("dropped",)) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        bucket = server.make_bucket("chaos")
        # One each four steps, and no cache: the store is needed to the end.
        shards = write_shards(tmp_path / "many", bucket, count=STEPS // 4 + 1, images=16)
        local, remote = replace(local, train_shards=shards[str(tmp_path / "many")]), replace(remote, train_shards=shards[bucket])
        first: list[int] = []

        def away_until_they_have_given_up(watch: Watch) -> None:
            if not first and watch.checkpoints.get("remote", 0) >= INTERVAL:
                first.extend(pids_of(tmp_path, "remote"))
                server.share = 1.0
            elif first and not any(map(alive, first)):
                server.share = 0.0

        watch = Watch(away_until_they_have_given_up)
        with toy_cluster() as cluster:
            train([local, remote], cluster, tmp_path, watch)
    assert server.faults["dropped"] > 6, "more than one call tries"
    assert [len(watch.starts[name]) for name in ("local", "remote")] == [1, 2]
    note("storage that is away for longer than anybody waits", watch, ["remote"])
    assert all(0 <= steps < 2 * INTERVAL for steps, _ in watch.lost("remote"))
    ours, theirs = weights(tmp_path, "remote"), weights(tmp_path, "local")
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def write_shards(*places: Path | str, count: int, images: int) -> dict[str, tuple[str, ...]]:
    """Write the same shards to several places and return the URLs by place."""
    from linearsr_platform import storage
    from linearsr_platform.data.shards import Sample, write_shard

    rng = np.random.default_rng(0)
    found: dict[str, tuple[str, ...]] = {str(place): () for place in places}
    for shard in range(count):
        pictures = [rng.integers(0, 256, size=(32, 32, 3), dtype=np.uint8) for _ in range(images)]
        samples = [Sample(f"{shard}-{i}", picture, {"tags": []}) for i, picture in enumerate(pictures)]
        for place in found:
            write_shard(place, f"{shard}.tar", samples)
            found[place] += (storage.join(place, f"{shard}.tar"),)
    return found


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


@pytest.mark.parametrize("stages", [(2,), pytest.param((1, 3), marks=pytest.mark.nightly)])
def test_a_disk_that_is_full_for_a_while(undisturbed: Path, tmp_path: Path, disk: Path, stages: tuple[int, ...]) -> None:
    from three_stages import STEPS, Watch, assert_equal, jobs_of, note, train
    from toy_training import toy_cluster

    # Slow, so that the last to start still trains when the first has had its trouble.
    jobs = jobs_of(tmp_path, stages=stages, pause_s=0.5)
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
