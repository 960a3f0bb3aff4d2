"""Many processes in one small cache, in front of a store that answers badly, and one of them killed: always the right content."""

import fcntl
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from flaky_s3 import flaky_s3

from linearsr_platform import storage
from linearsr_platform.data.cache import ShardCache

pytestmark = pytest.mark.server

PROCESSES, SHARDS, SIZE, ROOM = 4, 12, 50_000, 7
READER = """
import hashlib, random, sys, time
from linearsr_platform.data.cache import ShardCache
folder, seed, *urls = sys.argv[1:]
cache = ShardCache(folder, max_bytes={room}, room_wait_s=60)
dice = random.Random(int(seed))
print("ready", flush=True)
until = time.monotonic() + {seconds}
while time.monotonic() < until:
    number = dice.randrange(len(urls))
    cache.prefetch(dice.choice(urls))
    held = cache.open(urls[number])
    time.sleep(dice.random() / 50)
    content = held.path.read_bytes()
    assert content == random.Random(number).randbytes({size}), urls[number]
    held.close()
    print(number, flush=True)
cache.close()
"""


def test_processes_share_a_small_cache_and_one_dies(tmp_path: Path) -> None:
    folder = tmp_path / "cache"
    script = READER.format(room=ROOM * SIZE, size=SIZE, seconds=8)
    with flaky_s3(share=0.1) as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        bucket = server.make_bucket("shards")
        for number in range(SHARDS):
            storage.write_bytes(storage.join(bucket, f"{number:02d}.tar"), random.Random(number).randbytes(SIZE))
        urls = storage.list_files(bucket)
        readers = [
            subprocess.Popen([sys.executable, "-c", script, str(folder), str(seed), *urls], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
            for seed in range(PROCESSES)
        ]
        for one in readers:
            assert one.stdout is not None
            assert one.stdout.readline() == b"ready\n"
        largest, kill_at = 0, time.monotonic() + 3
        while any(one.poll() is None for one in readers):
            largest = max(largest, _bytes_in(folder))
            if kill_at is not None and time.monotonic() > kill_at:
                readers[0].send_signal(signal.SIGKILL)
                kill_at = None
            time.sleep(0.02)
        outputs = [one.communicate() for one in readers]
        assert [one.returncode for one in readers] == [-signal.SIGKILL, 0, 0, 0], outputs[1][1].decode()
        assert all(len(out.split()) > 3 for out, _ in outputs[1:])
        assert 3 * SIZE < largest <= ROOM * SIZE
        # Whatever the killed one was fetching is gone as soon as somebody makes room.
        cache = ShardCache(str(folder), max_bytes=ROOM * SIZE, room_wait_s=0)
        for url in urls:
            cache.open(url).close()
        assert not [*folder.glob("*.part"), *folder.glob("*.room")]
        cache.close()


def test_of_several_that_want_one_shard_one_fetches_it(tmp_path: Path) -> None:
    script = "import sys; from linearsr_platform.data.cache import ShardCache; ShardCache(sys.argv[1], max_bytes=10**9).open(sys.argv[2])"
    with flaky_s3() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        url = storage.join(server.make_bucket("shards"), "one.tar")
        storage.write_bytes(url, os.urandom(3_000_000))
        before = server.requests["GET"]
        readers = [subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "cache"), url]) for _ in range(3)]
        assert [one.wait() for one in readers] == [0, 0, 0]
        assert server.requests["GET"] == before + 1


def _bytes_in(folder: Path) -> int:
    """Return the size of all shards, whole and partial, at one moment: nobody makes room meanwhile, and what is renamed counts once."""
    sizes: dict[str, int] = {}
    with (folder / "space.lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for path in folder.iterdir():
            if path.suffix in (".tar", ".part"):
                try:
                    sizes[path.stem] = path.stat().st_size
                except FileNotFoundError:
                    continue
    return sum(sizes.values())
