"""Training on shards behind S3 that answers badly, through cache and loader processes, gives what training on local shards gives."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from flaky_s3 import flaky_s3

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


def test_remote_shards_give_the_same_training(tmp_path: Path) -> None:
    toy = str(Path(__file__).with_name("toy"))
    path = os.pathsep.join([toy, os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    with flaky_s3(share=0.3) as server, pytest.MonkeyPatch.context() as patch:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            alone = {
                "RANK": "0",
                "LOCAL_RANK": "0",
                "WORLD_SIZE": "1",
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(free.getsockname()[1]),
            }
        for name, value in {**server.environment, **alone, "PYTHONPATH": path}.items():
            patch.setenv(name, value)
        sys.path.insert(0, toy)
        from toy_training import write_images

        bucket = server.make_bucket("prepared")
        for shard in write_images(tmp_path / "data"):
            storage.copy_file(shard, storage.join(bucket, Path(shard).name))
        command = [sys.executable, "-c", SCRIPT, str(tmp_path), bucket, str(tmp_path / "cache")]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
        local, remote = json.loads(done.stdout.splitlines()[-1])
        assert len(local) == 3
        assert remote == local
        assert len(list((tmp_path / "cache").glob("*.tar"))) == 2
        assert server.faults.total() > 0
