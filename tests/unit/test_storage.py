"""Storage: one behaviour for local folders and object stores, and never a half-written file."""

import errno
import os
from uuid import uuid4

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem

from linearsr_platform import storage
from linearsr_platform.data.sources import list_source
from linearsr_platform.errors import UserError
from linearsr_platform.recipe.data_schema import SourceConfig


@pytest.fixture(params=["local", "memory"])
def root(request, tmp_path):
    return str(tmp_path / "root") if request.param == "local" else f"memory://{uuid4().hex}"


def test_what_is_written_is_read_back_under_the_listed_url(root):
    storage.write_json(storage.join(root, "a", "b.json"), {"name": "\u00e9", "values": [1, 2.5, None]})
    storage.write_text(storage.join(root, "a", "c", "d.txt"), "text")
    listed = storage.list_files(root)
    assert listed == [storage.join(root, "a/b.json"), storage.join(root, "a/c/d.txt")]
    assert storage.read_json(listed[0]) == {"name": "\u00e9", "values": [1, 2.5, None]}
    assert storage.read_text(listed[1]) == "text"
    assert storage.list_files(root, "*.txt") == listed[1:]
    assert storage.list_folders(storage.join(root, "a")) == [storage.join(root, "a/c")]


def test_nothing_there_is_an_empty_listing_and_a_missing_file(root):
    assert storage.list_files(root) == []
    assert storage.list_folders(root) == []
    assert not storage.exists(root)
    storage.remove(root)
    with pytest.raises(FileNotFoundError):
        storage.read_bytes(storage.join(root, "nothing.json"))
    with pytest.raises(FileNotFoundError), storage.local_path(root):
        pass


def test_a_listing_does_not_reach_into_a_folder_with_a_longer_name(root):
    storage.write_text(storage.join(root, "run", "a"), "1")
    storage.write_text(storage.join(root, "run-2", "b"), "2")
    assert storage.list_files(storage.join(root, "run")) == [storage.join(root, "run/a")]


def test_a_failed_write_leaves_the_old_file_and_nothing_else(root):
    url = storage.join(root, "file.bin")
    storage.write_bytes(url, b"old")

    def fail():
        with storage.atomic_file(url) as path:
            path.write_bytes(b"half")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fail()
    assert storage.read_bytes(url) == b"old"
    assert storage.list_files(root) == [url]
    if storage.is_local(root):
        assert os.listdir(root) == ["file.bin"]


def test_a_failed_folder_leaves_the_old_folder(root):
    url = storage.join(root, "bundle")
    storage.write_text(storage.join(url, "old"), "old")

    def fail():
        with storage.atomic_folder(url) as path:
            (path / "new").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fail()
    assert storage.list_files(root) == [storage.join(url, "old")]


def test_json_without_a_word_for_nan_is_refused_before_the_file_appears(root):
    with pytest.raises(ValueError, match="JSON"):
        storage.write_json(storage.join(root, "metrics.json"), {"psnr_y": float("nan")})
    assert not storage.exists(storage.join(root, "metrics.json"))


def test_an_unfinished_file_of_a_killed_process_is_not_listed(tmp_path):
    with storage.atomic_file(str(tmp_path / "shard.tar")) as path:
        path.write_bytes(b"half")
        assert path.suffix == ".tar"
        assert storage.list_files(str(tmp_path)) == []
    assert storage.list_files(str(tmp_path)) == [str(tmp_path / "shard.tar")]


@pytest.mark.parametrize("name", ["x" * 251 + ".png", "ä" * 125 + "x.png", "x" * 255])
def test_a_name_as_long_as_the_disk_allows_is_written(tmp_path, name):
    storage.write_bytes(str(tmp_path / name), b"1")
    assert os.listdir(tmp_path) == [name]


def test_the_root_of_all_folders_is_no_file():
    with pytest.raises(IsADirectoryError, match="'/'"):
        storage.write_text("/", "a")


def test_a_finished_file_may_be_named_a_part_of_something(tmp_path):
    names = ["pano.part-1.png", "trip.part-2/a.png", "x.part-cafe.tar"]
    for name in (*names, "b.part-0a1b2c3d.png", "c.part-0a1b2c3d/b.png", "w.mat.part-download", f"bundle.part-{uuid4().hex}/x"):
        storage.write_bytes(str(tmp_path / name), b"1")
    assert storage.list_files(str(tmp_path)) == [str(tmp_path / name) for name in names]
    assert storage.list_folders(str(tmp_path)) == [str(tmp_path / "trip.part-2")]


def test_files_behind_links_to_folders_are_listed_and_a_loop_of_links_ends(tmp_path):
    for name in ("in/a.png", "in/deeper/b.png", "other/c.png", "other/more/d.png"):
        storage.write_bytes(str(tmp_path / name), b"1")
    for link, folder in {"in/linked": "other", "in/deeper/up": "in", "other/more/round": "in", "other/self": "other"}.items():
        (tmp_path / link).symlink_to(tmp_path / folder)
    found = storage.list_files(str(tmp_path / "in"))
    assert [file.removeprefix(f"{tmp_path}/in/") for file in found] == ["a.png", "deeper/b.png", "linked/c.png", "linked/more/d.png"]


def test_a_folder_that_cannot_be_read_is_not_an_empty_one(tmp_path, monkeypatch):
    for name in ("a/b.png", "locked/c.png", "a/lost+found/d.png"):
        storage.write_text(str(tmp_path / name), "x")
    scan = os.scandir

    def refuse(path):
        # Not by its mode, which root may read whatever it is.
        if str(path).endswith(("locked", "lost+found")):
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(PermissionError, match="locked"):
        storage.list_files(str(tmp_path))
    with pytest.raises(UserError, match=r"expected something readable: .*locked"):
        list_source("mine", SourceConfig(url=str(tmp_path)))
    assert storage.list_files(str(tmp_path / "nowhere")) == []
    assert storage.list_files(str(tmp_path / "a")) == [str(tmp_path / "a/b.png")]


def test_a_name_that_looks_like_a_chain_of_file_systems_is_a_name(tmp_path):
    url = str(tmp_path / "zip::b" / "take 1::2.png")
    storage.write_bytes(url, b"1")
    assert (storage.read_bytes(f"file://{url}"), storage.list_files(str(tmp_path))) == (b"1", [url])


def test_a_full_disk_is_told_with_the_file_that_found_no_room(root):
    url = storage.join(root, "file.bin")

    def fill():
        with storage.atomic_file(url), open("/dev/full", "wb", buffering=0) as full:
            full.write(b"1")

    with pytest.raises(OSError, match=r"No space left on device: .*file\.bin" if storage.is_local(root) else "No space") as caught:
        fill()
    assert caught.value.errno == errno.ENOSPC


def test_copying_a_tree_there_and_back_replaces_what_was_there(root, tmp_path):
    source, back = tmp_path / "source", tmp_path / "back"
    (source / "deep").mkdir(parents=True)
    (source / "deep" / "a.bin").write_bytes(b"a")
    (source / "b.bin").write_bytes(b"b")
    target = storage.join(root, "copy")
    storage.write_text(storage.join(target, "stale"), "stale")
    storage.write_text(str(back / "stale"), "stale")
    storage.copy_tree(str(source), target)
    storage.copy_tree(target, str(back))
    assert storage.list_files(str(back)) == [str(back / "b.bin"), str(back / "deep" / "a.bin")]
    assert (back / "deep" / "a.bin").read_bytes() == b"a"
    assert storage.list_files(root) == [storage.join(target, "b.bin"), storage.join(target, "deep/a.bin")]


def test_copying_one_file_between_places(root, tmp_path):
    storage.write_bytes(storage.join(root, "knee.safetensors"), b"weights")
    storage.copy_file(storage.join(root, "knee.safetensors"), str(tmp_path / "new" / "expert-1.safetensors"))
    assert (tmp_path / "new" / "expert-1.safetensors").read_bytes() == b"weights"


def test_a_remote_file_is_on_this_machine_only_inside_the_block():
    url = f"memory://{uuid4().hex}/x.bin"
    storage.write_bytes(url, b"x")
    with storage.local_path(url) as path:
        assert path.read_bytes() == b"x"
        assert path.name == "x.bin"
    assert not path.exists()


def test_local_paths_become_absolute_and_urls_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert storage.join("runs", "a") == str(tmp_path / "runs" / "a")
    assert storage.absolute("file:///data/x") == "/data/x"
    assert storage.absolute("photos.csv", "s3://bucket/recipes") == "s3://bucket/recipes/photos.csv"
    assert storage.absolute("photos.csv", str(tmp_path)) == str(tmp_path / "photos.csv")
    assert storage.join("s3://bucket/a/", "/b") == "s3://bucket/a/b"
    assert storage.parent("s3://bucket/a/b.yaml") == "s3://bucket/a"
    assert storage.parent("a.yaml") == str(tmp_path)


@pytest.mark.parametrize("url", ["~nobody-of-that-name/a", "a\0b", "file:///a\0b", "a\ud83d", "http://[::1/a"])
def test_what_can_be_the_name_of_no_file_is_the_users_mistake(url):
    with pytest.raises(UserError, match="storage: got "):
        storage.exists(url)


def test_an_unknown_scheme_is_the_users_mistake_and_names_the_url():
    with pytest.raises(UserError, match="s33://bucket"):
        storage.exists("s33://bucket/x")


class DeniedFileSystem(MemoryFileSystem):
    """A store that refuses to say what is there."""

    protocol = "denied"

    def info(self, path, **kwargs):
        raise PermissionError(13, "Forbidden", path)


def test_a_store_that_refuses_to_answer_is_not_one_where_nothing_is():
    fsspec.register_implementation("denied", DeniedFileSystem, clobber=True)
    for ask in (storage.exists, storage.list_folders, storage.remove):
        with pytest.raises(PermissionError):
            ask("denied://folder")
    with pytest.raises(UserError, match="Forbidden"):
        list_source("mine", SourceConfig(url="denied://folder/*.png"))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b"[" * 100_000, b"9" * 5000])
def test_what_is_no_json_is_told_with_its_file(root, content):
    storage.write_bytes(storage.join(root, "a.json"), content)
    with pytest.raises(UserError, match=r"a\.json: expected a JSON file"):
        storage.read_json(storage.join(root, "a.json"))
