"""Which picture becomes which file: the same on this machine's disk and in a store."""

from pathlib import Path
from uuid import uuid4

import pytest

from linearsr_platform import storage
from linearsr_platform.errors import UserError
from linearsr_platform.stages.picture_work import Job, find_work

FILES = ("a.png", "deep/b.tif", "deep/er/c.jpg", "deep/notes.txt", "shard.tar")


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder with pictures."""
    root = str(tmp_path / "in") if request.param == "local" else f"memory://{uuid4().hex}/in"
    for name in FILES:
        storage.write_bytes(storage.join(root, name), b"")
    return root


def pairs(root: str, source: str, target: str) -> dict[str, str]:
    return {job.source.removeprefix(f"{root}/"): job.target.removeprefix(target) for job in find_work(source, target).jobs}


def test_a_folder_keeps_its_structure(root: str) -> None:
    out = storage.join(storage.parent(root), "out")
    assert pairs(root, root, out) == {
        "a.png": "/a.png",
        "deep/b.tif": "/deep/b.png",
        "deep/er/c.jpg": "/deep/er/c.jpg",
        "shard.tar": "/shard.tar",
    }


@pytest.mark.parametrize(
    ("pattern", "found"),
    [("**/*.jpg", {"deep/er/c.jpg"}), ("*.png", {"a.png"}), ("deep/*", {"deep/b.tif", "deep/er/c.jpg"}), ("d*p/b.*", {"deep/b.tif"})],
)
def test_a_glob_is_that_of_the_shell_wherever_the_pictures_are(root: str, pattern: str, found: set[str]) -> None:
    out = storage.join(storage.parent(root), "out")
    assert set(pairs(root, storage.join(root, pattern), out)) == found


def test_what_is_there_is_finished(root: str) -> None:
    out = storage.join(storage.parent(root), "out")
    storage.write_bytes(storage.join(out, "deep/b.png"), b"")
    work = find_work(root, out)
    assert work.finished() == {Job(storage.join(root, "deep/b.tif"), storage.join(out, "deep/b.png"))}
    one = find_work(storage.join(root, "a.png"), storage.join(out, "x.webp"))
    assert one.single
    assert one.finished() == frozenset()
    storage.write_bytes(storage.join(out, "x.webp"), b"")
    assert one.finished() == set(one.jobs)
    assert find_work(storage.join(root, "a.png"), out + "/new/").jobs[0].target == storage.join(out, "new/a.png")


def test_mistakes_are_named(root: str) -> None:
    for source, target, message in (
        (storage.join(root, "none.png"), "out.png", "no such file or folder"),
        (storage.join(root, "*.bmp"), "out", "matches no image"),
        (storage.join(root, "a.png"), storage.join(root, "a.gif"), "got suffix '.gif'"),
        (storage.join(root, "shard.tar"), storage.join(root, "a.png"), "because .*shard.tar is a shard"),
        (root, storage.join(root, "a.png"), "got a file; expected a folder"),
    ):
        with pytest.raises(UserError, match=message):
            find_work(source, target)
    storage.write_bytes(storage.join(root, "deep/b.png"), b"")
    with pytest.raises(UserError, match="expected one source for each file"):
        find_work(root, storage.join(storage.parent(root), "out"))
