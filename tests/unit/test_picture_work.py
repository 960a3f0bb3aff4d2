"""Which file becomes which: folders, globs and shards, on this machine and in a store, and what of it is done already."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from linearsr_platform import storage
from linearsr_platform.errors import UserError
from linearsr_platform.stages.picture_work import Job, find_work

FILES = ("a.png", "b.TIF", "c.txt", "deeper/d.jpg", "deeper/still/e.webp", "deeper/f.tar", "other/g.png")
STORE = "memory://picture-work"


@pytest.fixture(params=["local", "relative", "file", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A place with the files in `in`."""
    monkeypatch.chdir(tmp_path)
    place = {"local": str(tmp_path), "relative": "data", "file": f"file://{tmp_path}", "memory": STORE}[request.param]
    for name in FILES:
        storage.write_bytes(storage.join(place, "in", name), b"x")
    yield place
    storage.remove(STORE)


def pairs(root: str, source: str, target: str = "out") -> dict[str, str]:
    """Return target by source, both below the place."""
    start = len(storage.absolute(root)) + 1
    jobs = [job.absolute() for job in find_work(f"{root}/{source}", f"{root}/{target}").jobs]
    return {job.source[start:]: job.target[start:] for job in jobs}


def test_a_folder_keeps_its_structure_and_what_cannot_be_written_becomes_png(root: str) -> None:
    expected = {
        "in/a.png": "out/a.png",
        "in/b.TIF": "out/b.png",
        "in/deeper/d.jpg": "out/deeper/d.jpg",
        "in/deeper/f.tar": "out/deeper/f.tar",
        "in/deeper/still/e.webp": "out/deeper/still/e.webp",
        "in/other/g.png": "out/other/g.png",
    }
    assert pairs(root, "in") == expected
    assert pairs(root, "in/") == expected


@pytest.mark.parametrize(
    ("pattern", "found"),
    [
        ("in/*.png", {"in/a.png": "out/a.png"}),
        ("in/**/*.png", {"in/a.png": "out/a.png", "in/other/g.png": "out/other/g.png"}),
        ("in/*/[df].*", {"in/deeper/d.jpg": "out/deeper/d.jpg", "in/deeper/f.tar": "out/deeper/f.tar"}),
        ("in/deeper/s*", {"in/deeper/still/e.webp": "out/still/e.webp"}),
        ("in/?.T*", {"in/b.TIF": "out/b.png"}),
    ],
)
def test_a_glob_means_the_same_wherever_the_files_are(root: str, pattern: str, found: dict[str, str]) -> None:
    assert pairs(root, pattern) == found


def test_what_lies_in_a_target_below_the_source_is_not_enlarged_again(root: str) -> None:
    first = pairs(root, "in", "in/large")
    assert first["in/a.png"] == "in/large/a.png"
    storage.write_bytes(storage.join(root, "in/large/a.png"), b"large")
    storage.write_bytes(storage.join(root, "in/larger.png"), b"x")
    assert pairs(root, "in", "in/large") == {**first, "in/larger.png": "in/large/larger.png"}
    assert pairs(root, "in/**/*.png", "in/large") == {
        name: target for name, target in pairs(root, "in", "in/large").items() if name.endswith(".png")
    }
    assert pairs(root, "in", "in")["in/large/a.png"] == "in/large/a.png"


def test_one_file_goes_into_a_folder_or_to_a_name(root: str) -> None:
    assert pairs(root, "in/b.TIF", "large.jpg") == {"in/b.TIF": "large.jpg"}
    assert pairs(root, "in/b.TIF", "in/other") == {"in/b.TIF": "in/other/b.png"}
    assert pairs(root, "in/b.TIF", "new/") == {"in/b.TIF": "new/b.png"}
    assert pairs(root, "in/deeper/f.tar", "new/") == {"in/deeper/f.tar": "new/f.tar"}
    assert find_work(f"{root}/in/a.png", None).jobs[0].absolute().target == storage.join(root, "in/a-enlarged.png")


def test_what_is_finished_is_known(root: str) -> None:
    work = find_work(f"{root}/in", f"{root}/out")
    assert work.finished() == frozenset()
    storage.write_bytes(storage.join(root, "out/deeper/d.jpg"), b"y")
    assert [Path(job.source).name for job in work.finished()] == ["d.jpg"]
    one = find_work(f"{root}/in/a.png", f"{root}/one.png")
    assert (one.single, one.finished()) == (True, frozenset())
    storage.write_bytes(storage.join(root, "one.png"), b"y")
    assert one.finished() == frozenset(one.jobs)


@pytest.mark.parametrize(
    ("source", "target", "said"),
    [
        ("in/absent.png", "out.png", "no such file or folder"),
        ("in/*.bmp", "out", "matches no image"),
        ("in/a.png", "out.tiff", "expected one of .png"),
        ("in/deeper/f.tar", "out.png", "is a shard"),
        ("in", "in/a.png", "got a file; expected a folder"),
        ("in", "out.png", "got suffix '.png'; expected a folder"),
        ("in/*.png", "out.tar", "got suffix '.tar'; expected a folder"),
    ],
)
def test_mistakes_are_named(root: str, source: str, target: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        find_work(f"{root}/{source}", f"{root}/{target}")


def test_a_folder_may_be_named_like_a_picture_and_nothing_may_be_named_by_nothing(root: str) -> None:
    assert pairs(root, "in/*.png", "out.png/") == {"in/a.png": "out.png/a.png"}
    storage.write_bytes(storage.join(root, "out.png/b.png"), b"x")
    assert pairs(root, "in/*.png", "out.png") == {"in/a.png": "out.png/a.png"}
    for source, target in (("", f"{root}/out"), (f"{root}/in", "")):
        with pytest.raises(UserError, match="got an empty text"):
            find_work(source, target)


def test_a_link_to_the_target_is_no_source(tmp_path: Path) -> None:
    storage.write_bytes(str(tmp_path / "in/a.png"), b"x")
    storage.write_bytes(str(tmp_path / "out/a.png"), b"x")
    (tmp_path / "in/large").symlink_to(tmp_path / "out")
    for source in ("in", "in/*"):
        assert pairs(str(tmp_path), source, "out") == {"in/a.png": "out/a.png"}


def test_two_sources_of_one_target_are_refused(root: str) -> None:
    storage.write_bytes(storage.join(root, "in/b.png"), b"x")
    with pytest.raises(UserError, match=r"expected one source for each file"):
        find_work(f"{root}/in", f"{root}/out")


def test_a_job_shows_no_password() -> None:
    assert Job("ftp://me:secret@host/a.png", "b.png").name == "ftp://***@host/a.png"
