"""The cache of remote shards: right content, within its bound, and nothing deleted that is in use."""

import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from uuid import uuid4

import pytest

from linearsr_platform import storage
from linearsr_platform.data.cache import ShardCache
from linearsr_platform.data.shard_files import ShardFiles
from linearsr_platform.errors import StageError, UserError

SIZE = 1000


@pytest.fixture
def urls() -> list[str]:
    """Six files of 1000 bytes."""
    folder = f"memory://{uuid4().hex}"
    for i in range(6):
        storage.write_bytes(storage.join(folder, f"{i}.tar"), bytes([i]) * SIZE)
    return storage.list_files(folder)


@pytest.fixture
def cache(tmp_path: Path) -> Callable[..., ShardCache]:
    return lambda room, **more: ShardCache(str(tmp_path / "cache"), max_bytes=room * SIZE, room_wait_s=0.3, **more)


def content(cache: ShardCache, url: str) -> bytes:
    held = cache.open(url)
    try:
        return held.path.read_bytes()
    finally:
        held.close()


def kept(tmp_path: Path) -> int:
    return len(list((tmp_path / "cache").glob("*.tar")))


def test_the_ones_used_longest_ago_go_first_and_none_in_use(urls: list[str], cache: Callable[..., ShardCache], tmp_path: Path) -> None:
    one = cache(3)
    in_use = one.open(urls[0])
    for i in (1, 2, 1):
        assert content(one, urls[i]) == bytes([i]) * SIZE
        time.sleep(0.02)
    later = one.open(urls[3])
    assert kept(tmp_path) == 3
    assert in_use.path.read_bytes() == bytes(SIZE)
    # 2 went, not 1, which was used after it: to read 1 again needs no store.
    storage.remove(urls[1])
    assert content(one, urls[1]) == bytes([1]) * SIZE
    second = one.open(urls[1])
    with pytest.raises(StageError, match=r"no room for memory://.*2\.tar: all of its 3e-06 GB is in use"):
        one.open(urls[2])
    second.close()
    assert content(one, urls[2]) == bytes([2]) * SIZE
    later.close()


def test_a_disk_with_less_room_than_allowed_is_not_filled(
    urls: list[str], cache: Callable[..., ShardCache], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    one = cache(1000)
    disk = SimpleNamespace(free=0)

    def usage(folder: Path) -> SimpleNamespace:
        disk.free = 3 * SIZE - sum(file.stat().st_size for file in folder.glob("*.tar"))
        return disk

    monkeypatch.setattr(shutil, "disk_usage", usage)
    for i in (0, 1, 2, 3, 4):
        assert content(one, urls[i]) == bytes([i]) * SIZE
    assert kept(tmp_path) == 3
    held = [one.open(urls[i]) for i in (2, 3, 4)]
    with pytest.raises(StageError, match=r"or its disk is full \(0 GB free\); fix: .*data\.cache_folder on a larger disk"):
        one.open(urls[0])
    for each in held:
        each.close()


def test_a_shard_with_another_hash_or_larger_than_all_is_refused(urls: list[str], cache: Callable[..., ShardCache], tmp_path: Path) -> None:
    with pytest.raises(StageError, match=r"got sha256 [0-9a-f]{64}; expected 00"):
        cache(3, sha256={urls[0]: "00"}).open(urls[0])
    with pytest.raises(UserError, match=r"data\.cache_gb: got 5e-07"):
        cache(0.5).open(urls[0])
    assert kept(tmp_path) == 0
    assert not list((tmp_path / "cache").glob("*.part"))


def test_a_shard_that_was_written_anew_is_fetched_anew(urls: list[str], cache: Callable[..., ShardCache]) -> None:
    assert content(cache(3), urls[0]) == bytes(SIZE)
    storage.write_bytes(urls[0], b"x" * SIZE)
    assert content(cache(3), urls[0]) == b"x" * SIZE


def test_what_a_crash_left_is_deleted_and_holds_nobody_up(urls: list[str], cache: Callable[..., ShardCache], tmp_path: Path) -> None:
    one = cache(2)
    name = content(one, urls[0]) and next((tmp_path / "cache").glob("*.tar")).stem
    os.truncate(tmp_path / "cache" / f"{name}.tar", 10)
    (tmp_path / "cache" / "dead.part").write_bytes(bytes(2 * SIZE))
    (tmp_path / "cache" / "dead.lock").touch()
    assert content(one, urls[0]) == bytes(SIZE)
    assert not list((tmp_path / "cache").glob("dead*"))


def test_room_is_kept_for_what_is_only_partly_there(urls: list[str], cache: Callable[..., ShardCache], tmp_path: Path, monkeypatch) -> None:
    """While a shard is fetched, from the first byte on, another process finds no room where it will be."""
    seen: list[object] = []

    def slow(url: str, target: Path) -> None:
        with monkeypatch.context() as inner:
            inner.setattr("linearsr_platform.data.cache.storage.download", download)
            target.write_bytes(b"")
            with pytest.raises(StageError, match="no room"):
                cache(1.5).open(urls[1])
            seen.append(url)
        download(url, target)

    download = storage.download
    monkeypatch.setattr("linearsr_platform.data.cache.storage.download", slow)
    assert content(cache(1.5), urls[0]) == bytes(SIZE)
    assert seen == urls[:1]
    assert sorted(path.suffix for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock") == [".tar"]


def test_the_next_shard_comes_in_the_background(urls: list[str], cache: Callable[..., ShardCache], tmp_path: Path) -> None:
    one = cache(4)
    one.prefetch(urls[0])
    one.prefetch(urls[1])
    until = time.monotonic() + 10
    while kept(tmp_path) < 2 and time.monotonic() < until:
        time.sleep(0.01)
    assert kept(tmp_path) == 2
    one.prefetch("memory://nothing/there.tar")
    one.close()


def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(UserError, match=r"data\.cache_folder"):
        ShardCache(str(tmp_path / "open"), max_bytes=1)
    (tmp_path / "link").symlink_to(tmp_path)
    with pytest.raises(UserError, match=r"data\.cache_folder"):
        ShardCache(str(tmp_path / "link"), max_bytes=1)


def test_a_shard_in_use_is_the_same_object_and_gives_its_place_back(tmp_path: Path) -> None:
    """Lanes that stand in one shard share it; when the last lets go, its room can be taken."""
    folder = f"memory://{uuid4().hex}"
    for i in range(2):
        storage.write_bytes(storage.join(folder, f"{i}.tar"), bytes(1024))
    first, second = storage.list_files(folder)
    files = ShardFiles(ShardCache(str(tmp_path / "cache"), max_bytes=1500, room_wait_s=0.3))
    one = files.open(first)
    assert files.open(first) is one
    with pytest.raises(StageError, match="no room"):
        files.open(second)
    del one
    assert files.open(second).entries == []
