"""Storage against a real S3 server that answers badly: every call ends well, or says what is really wrong."""

import errno
import hashlib
import logging
import os
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from flaky_s3 import KINDS, FlakyS3, flaky_s3

from linearsr_platform import storage
from linearsr_platform.data.manifest import file_hash
from linearsr_platform.data.records import read_records, write_record
from linearsr_platform.data.sources import list_source
from linearsr_platform.data.tars import index_tar, read_part
from linearsr_platform.recipe.data_schema import SourceConfig

pytestmark = pytest.mark.server


@pytest.fixture(scope="module")
def server() -> Iterator[FlakyS3]:
    with flaky_s3() as found, pytest.MonkeyPatch.context() as patch:
        for name, value in found.environment.items():
            patch.setenv(name, value)
        yield found


@pytest.fixture
def root(server: FlakyS3) -> Iterator[str]:
    server.share, server.kinds = 0.0, KINDS
    yield server.make_bucket(f"bucket-{uuid4().hex}")
    server.share, server.kinds = 0.0, KINDS


@pytest.mark.parametrize(("share", "kinds"), [(0.1, KINDS), (0.3, KINDS), (0.3, ("cut off",)), (0.3, ("slow down",))])
def test_everything_works_on_a_bad_day(server: FlakyS3, root: str, tmp_path: Path, share: float, kinds: tuple[str, ...]) -> None:
    server.share, server.kinds = share, kinds
    before = server.faults.total()
    contents = {f"a/{i}.bin": os.urandom(40_000 * i) for i in range(4)}
    for name, content in contents.items():
        storage.write_bytes(storage.join(root, name), content)
    assert storage.list_files(root) == [storage.join(root, name) for name in contents]
    assert storage.list_folders(root) == [storage.join(root, "a")]
    assert storage.exists(storage.join(root, "a"))
    for name, content in contents.items():
        assert storage.read_bytes(storage.join(root, name)) == content
        storage.download(storage.join(root, name), tmp_path / "got")
        assert (tmp_path / "got").read_bytes() == content
        with storage.local_path(storage.join(root, name)) as path:
            assert path.read_bytes() == content
    storage.copy_tree(root, str(tmp_path / "copy"))
    assert {str(path.relative_to(tmp_path / "copy")): path.read_bytes() for path in (tmp_path / "copy").rglob("*.bin")} == contents
    storage.remove(root + "/a")
    assert storage.list_files(root) == []
    assert server.faults.total() > before


def test_preparation_and_checks_work_on_a_bad_day(server: FlakyS3, root: str, tmp_path: Path) -> None:
    pictures = {f"{number:03d}.jpg": os.urandom(9000 + number) for number in range(40)}
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name, content in pictures.items():
            (tmp_path / name).write_bytes(content)
            tar.add(tmp_path / name, name)
    url = storage.join(root, "a.tar")
    storage.write_bytes(url, (tmp_path / "a.tar").read_bytes())
    for number in range(30):
        write_record(storage.join(root, "records"), f"one-{number}", number)
    server.share = 0.3
    before = server.faults.total()
    for _ in range(4):
        assert file_hash(url) == hashlib.sha256((tmp_path / "a.tar").read_bytes()).hexdigest()
        members = index_tar(url, lambda name: name == "003.jpg")
        assert [member.name for member in members] == list(pictures)
        assert members[3].content == read_part(url, members[3].offset, members[3].size) == pictures["003.jpg"]
        assert list(list_source("mine", SourceConfig(url=root + "/*.tar"))) == ["a.tar"]
    assert read_records(storage.join(root, "records"), "one-") == {f"one-{number}": number for number in range(30)}
    assert server.faults.total() > before


def test_a_file_that_cannot_be_asked_for_is_not_taken_for_a_folder(server: FlakyS3, root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url = storage.join(root, "x.tar")
    storage.write_bytes(url, b"content")
    fs, _ = storage.filesystem(url)
    ask, asked = fs._info, iter([False, True])

    async def refuse_the_second(path: str, *arguments: object, **options: object) -> object:
        if next(asked, False):
            raise OSError(errno.EBUSY, "SlowDown")
        return await ask(path, *arguments, **options)

    # The first is whether it is there at all.
    monkeypatch.setattr(fs, "_info", refuse_the_second)
    with storage.local_path(url) as path:
        assert path.read_bytes() == b"content"


def test_what_will_not_go_away_is_not_tried_again(server: FlakyS3, root: str) -> None:
    before = server.requests.total()
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(root, "nothing"))
    assert server.requests.total() - before <= 4


def test_a_server_that_is_gone_is_given_up_in_time_and_shows_no_credentials(
    server: FlakyS3, root: str, caplog: pytest.LogCaptureFixture
) -> None:
    server.share, server.kinds = 1.0, ("slow down",)
    with caplog.at_level(logging.DEBUG, logger="linearsr_platform"), pytest.raises(OSError, match="Service Unavailable") as raised:
        storage.read_bytes(storage.join(root, "x"))
    said = [*(record.getMessage() for record in caplog.records), str(raised.value), *raised.value.__notes__]
    assert sum("failed" in line for line in said) == 5
    assert not any("do-not-show-me" in line for line in said)
