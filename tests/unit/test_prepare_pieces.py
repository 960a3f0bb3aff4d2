"""Preparing at scale: in pieces that survive a crash, from tars, with JPEGs as they came and with latents."""

import errno
import gzip
import hashlib
import io
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from prepared_photos import config, everything, fill, images, photo, run

from linearsr.codec import make_codec
from linearsr.codec_source import codec_digest
from linearsr.config import CodecConfig
from linearsr_platform import storage
from linearsr_platform.data.executor import SerialExecutor
from linearsr_platform.data.extras import LatentMaker
from linearsr_platform.data.images import decode_stored
from linearsr_platform.data.manifest import Manifest, load_manifest
from linearsr_platform.data.picture_shards import read_members
from linearsr_platform.data.prepare import prepare
from linearsr_platform.errors import StageError, UserError


class Interrupted(Exception):
    """Ends a run as a crash would, at a known place."""


class Until(SerialExecutor):
    """Does some pieces and then breaks down; keeps the names of those it did."""

    def __init__(self, pieces: float = float("inf")) -> None:
        self.left, self.done = pieces, []

    def map_unordered(self, function, pieces):
        # Backwards: the order must not matter.
        for position in reversed(range(len(pieces))):
            if self.left <= 0:
                raise Interrupted
            self.left -= 1
            self.done.append(pieces[position].name)
            yield position, function(pieces[position])


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path) -> None:
    fill(tmp_path / "in", *(f"{i}.png" for i in range(6)))
    data = config(tmp_path / "in", samples_per_shard=2)
    whole = run(data, tmp_path / "fresh")
    said: list[str] = []

    def attempt(executor: Until) -> Manifest:
        return prepare(
            data,
            recipe_folder=".",
            output_url=str(tmp_path / "out"),
            choose=lambda count: executor,
            on_progress=lambda done, total, what: said.append(f"{done}/{total} {what}"),
        )

    with pytest.raises(Interrupted):
        attempt(Until(4))
    with pytest.raises(Interrupted):
        attempt(Until(2 + 3))
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").rglob("*.tar")}
    assert len(written) == 3
    assert not (tmp_path / "out/manifest.json").exists()
    said.clear()
    last = Until()
    assert attempt(last) == whole
    assert "6/6 checking photographs, resumed: 6 of 6 were checked" in said
    assert any("writing samples, resumed: 3 of 8 shards were there" in line for line in said)
    assert len(last.done) == 8 - 3
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert everything(tmp_path / "out") == everything(tmp_path / "fresh")


def test_what_changed_since_an_interruption_is_done_again(tmp_path: Path) -> None:
    fill(tmp_path / "in", *(f"{i}.png" for i in range(4)))
    data = config(tmp_path / "in", samples_per_shard=1, validation_px=0)
    # All is inspected and written, but for the last shard.
    first = Until(4 + 5)
    with pytest.raises(Interrupted):
        prepare(data, recipe_folder=".", output_url=str(tmp_path / "out"), choose=lambda count: first)
    photo(99).save(tmp_path / "in/2.png")
    (tmp_path / "in/1.txt").write_text("sky")
    cut = next((tmp_path / "out").rglob("*.tar"))
    cut.write_bytes(cut.read_bytes()[:-512])
    again = Until()
    manifest = prepare(data, recipe_folder=".", output_url=str(tmp_path / "out"), choose=lambda count: again)
    assert sum(name.startswith("images") for name in again.done) == 1
    assert 3 <= sum(name.startswith("shard") for name in again.done) < 6
    assert manifest == run(data, tmp_path / "fresh")
    assert everything(tmp_path / "out") == everything(tmp_path / "fresh")


def test_a_photograph_that_changes_in_between_is_told_and_inspected_anew(tmp_path: Path) -> None:
    fill(tmp_path / "in", "a.png", "b.png")
    data, file = config(tmp_path / "in", validation_px=0), tmp_path / "in/a.png"

    class Changing(SerialExecutor):
        def map_unordered(self, function, pieces):
            yield from super().map_unordered(function, pieces)
            if not pieces:
                return
            before = file.stat()
            photo(7).save(file)
            # No sign of it in size or time.
            file.write_bytes(file.read_bytes().ljust(before.st_size, b"\0")[: before.st_size])
            os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))

    with pytest.raises(StageError, match=r"mine/a\.png: changed while the data was prepared"):
        prepare(data, recipe_folder=".", output_url=str(tmp_path / "out"), choose=lambda count: Changing())
    assert run(data, tmp_path / "out") == run(data, tmp_path / "fresh")


def test_a_killed_process_leaves_finished_shards_that_are_kept(tmp_path: Path) -> None:
    fill(tmp_path / "in", *(f"{i:02d}.png" for i in range(24)))
    data = config(tmp_path / "in", samples_per_shard=1)
    whole = run(data, tmp_path / "fresh")
    program = (
        "import sys, json; from linearsr_platform.data.prepare import prepare;"
        "from linearsr_platform.recipe.data_schema import DataConfig;"
        "prepare(DataConfig.model_validate_json(sys.argv[1]), recipe_folder='.', output_url=sys.argv[2])"
    )
    out = tmp_path / "out"
    process = subprocess.Popen([sys.executable, "-c", program, data.model_dump_json(), str(out)])
    while len(list(out.glob("unfinished/written-*.json"))) < 5 and process.poll() is None:
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    finished = {path: path.stat().st_mtime_ns for path in out.rglob("*.tar") if ".part-" not in path.name}
    assert 5 <= len(finished) < 60
    assert run(data, out) == whole
    # A shard whose record was not written any more is written again.
    assert sum(path.stat().st_mtime_ns != before for path, before in finished.items()) <= 1
    assert everything(out) == everything(tmp_path / "fresh")


def pack(url: object, members: dict[str, bytes]) -> None:
    with storage.atomic_file(str(url)) as path, tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def file_of(image: Image.Image, kind: str = "PNG", **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["folder", "glob", "memory"])
def test_the_photographs_of_webdataset_tars_are_sources(tmp_path: Path, kind: str) -> None:
    store = f"memory://{uuid4().hex}" if kind == "memory" else str(tmp_path / "in")
    pack(
        storage.join(store, "00.tar"),
        {
            "a.png": file_of(photo(0)),
            "a.json": b'{"tags": ["lake"], "licence": "CC0"}',
            "a.txt": b"not read",
            "a.seg.png": file_of(photo(50)),
            "deep/b.cls": b"barn",
            "deep/b.png": file_of(photo(1)),
        },
    )
    pack(storage.join(store, "01.tar"), {"c.txt": b"Sky, river", "c.png": file_of(photo(2)), "d.png": file_of(photo(0)), "e.png": b"no"})
    storage.write_bytes(storage.join(store, "f.png"), file_of(photo(3)))
    manifest = run(config(f"{store}/*.tar" if kind == "glob" else store, held_out=("c",)), tmp_path / "out")
    train = images(manifest, tmp_path / "out", "train")
    plain = set() if kind == "glob" else {"mine-f"}
    assert set(train) == {"mine-00_tar-a", "mine-00_tar-deep-b"} | plain
    assert [train[key][1]["tags"] for key in ("mine-00_tar-a", "mine-00_tar-deep-b")] == [["lake"], ["barn"]]
    assert np.array_equal(train["mine-00_tar-deep-b"][0], np.asarray(photo(1))[:, :72])
    held_out = images(manifest, tmp_path / "out", "held-out")
    assert held_out["mine-01_tar-c"][1]["tags"] == ["sky", "river"]
    reasons = {one.file: one.reason for one in manifest.quarantined}
    assert reasons["mine/01.tar/d.png"] == "the same picture as mine/00.tar/a.png"
    assert "not an image" in reasons["mine/01.tar/e.png"]
    assert (manifest.counts["duplicates"], manifest.counts["quarantined"]) == (1, 2)


def test_a_tar_that_is_cut_off_or_compressed_is_the_users_mistake(tmp_path: Path) -> None:
    pack(tmp_path / "in/a.tar", {"a.png": file_of(photo(0)), "b.png": file_of(photo(1))})
    whole = (tmp_path / "in/a.tar").read_bytes()
    with tarfile.open(tmp_path / "in/a.tar") as tar:
        second = tar.getmember("b.png").offset
        end = tar.offset
    sparse = tarfile.TarInfo("a.png")
    sparse.type, sparse.size = tarfile.GNUTYPE_SPARSE, 512
    for broken in (
        *(whole[:5000], gzip.compress(whole), b""),
        # Nothing but what is missing tells that these are not whole.
        *(whole[:second], whole[: second + 100], whole[:end]),
        *(whole[:second] + b"B" + whole[second + 1 :], whole[:second] + sparse.tobuf(tarfile.GNU_FORMAT) + bytes(1536)),
    ):
        (tmp_path / "in/a.tar").write_bytes(broken)
        with pytest.raises(UserError, match=r"a\.tar: got a tar that cannot be read"):
            run(config(tmp_path / "in"), tmp_path / "out")


def test_reading_a_member_of_a_remote_tar_reads_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = f"memory://{uuid4().hex}"
    pictures = {f"{i}.png": file_of(photo(i)) for i in range(5)}
    pack(f"{store}/a.tar", pictures)
    read: list[int] = []
    fs, _ = storage.filesystem(store)
    whole = type(fs).cat_file

    def counted(self, path, start=None, end=None, **options):
        content = whole(self, path, start, end, **options)
        if path.endswith(".tar"):
            read.append(len(content))
        return content

    monkeypatch.setattr(type(fs), "cat_file", counted)
    run(config(store, validation_px=0), tmp_path / "out")
    assert sorted(set(read)) == sorted({len(content) for content in pictures.values()})


def test_a_server_that_sends_no_parts_is_told_and_no_picture_lost(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = f"memory://{uuid4().hex}"
    pack(f"{store}/a.tar", {"0.png": file_of(photo(0))})
    fs, _ = storage.filesystem(store)
    whole = type(fs).cat_file
    monkeypatch.setattr(type(fs), "cat_file", lambda self, path, start=None, end=None, **options: whole(self, path, **options))
    with pytest.raises(StageError, match="this server sends no parts of files; fix: copy the tars"):
        run(config(store), tmp_path / "out")


@pytest.mark.parametrize("error", [OSError(errno.EBUSY, "Please slow down."), PermissionError("The provided token has expired.")])
@pytest.mark.parametrize("reads", [1, 4])
def test_a_store_that_refuses_for_now_costs_no_photograph_and_no_finished_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, reads: int
) -> None:
    """Three photographs are read to inspect them, and again to write them."""
    store, left = f"memory://{uuid4().hex}", [reads]
    for number in range(3):
        storage.write_bytes(f"{store}/{number}.png", file_of(photo(number)))
    usual = storage.read_bytes

    def failing(url: str) -> bytes:
        left[0] -= url.endswith(".png")
        if left[0] < 0:
            raise error
        return usual(url)

    monkeypatch.setattr(storage, "read_bytes", failing)
    with pytest.raises(StageError, match=r"cannot be fetched: .*; fix: the store or the credentials, and run the stage again"):
        run(config(store, samples_per_shard=1), tmp_path / "out")
    records = len(list((tmp_path / "out").rglob("*written-*")))
    monkeypatch.setattr(storage, "read_bytes", usual)
    assert records == max(0, reads - 3)
    assert run(config(store, samples_per_shard=1), tmp_path / "out").quarantined == ()


@pytest.mark.parametrize("error", [OSError(errno.EBUSY, "Please slow down."), PermissionError("The provided token has expired.")])
def test_a_store_that_refuses_a_side_file_for_now_costs_no_photograph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError
) -> None:
    store = f"memory://{uuid4().hex}"
    storage.write_bytes(f"{store}/a.png", file_of(photo(0)))
    storage.write_bytes(f"{store}/a.json", b"{}")
    usual = storage.read_bytes

    def failing(url: str) -> bytes:
        if url.endswith("a.json"):
            raise error
        return usual(url)

    monkeypatch.setattr(storage, "read_bytes", failing)
    with pytest.raises(StageError, match=r"a\.json: cannot be fetched: .*; fix: the store or the credentials, and run the stage again"):
        run(config(store), tmp_path / "out")


def test_names_that_are_no_text_and_folders_that_are_links(tmp_path: Path) -> None:
    folder = fill(tmp_path / "in", "a.png")
    (tmp_path / "elsewhere").mkdir()
    for place, number in ((os.fsencode(folder) + b"/caf\xe9.png", 1), (os.fsencode(tmp_path) + b"/elsewhere/b.png", 2)):
        with open(place, "wb") as file:
            file.write(file_of(photo(number)))
    with open(os.fsencode(folder) + b"/junk\xff.png", "wb") as file:
        file.write(b"no picture")
    (folder / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere/up").symlink_to(tmp_path / "in")
    manifest = run(config(folder), tmp_path / "out")
    files = {meta["file"] for _, meta in images(manifest, tmp_path / "out", "train").values()}
    assert files == {"mine/a.png", "mine/caf\\xe9.png", "mine/linked/b.png"}
    assert [refused.file for refused in manifest.quarantined] == ["mine/junk\\xff.png"]


def test_a_jpeg_is_kept_where_its_pixels_are_its_own(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    turned = Image.Exif()
    turned[0x0112] = 6
    files = {
        "kept.jpg": file_of(photo(0), "JPEG"),
        "turned.jpg": file_of(photo(1), "JPEG", exif=turned),
        "cmyk.jpg": file_of(photo(2).convert("CMYK"), "JPEG"),
        "grey.jpg": file_of(photo(3).convert("L"), "JPEG"),
        "p.png": file_of(photo(4)),
    }
    for name, content in files.items():
        (folder / name).write_bytes(content)
    source = {"mine": {"url": str(folder), "halve_jpeg": False}}
    run(config(sources=source, keep_jpeg=True), tmp_path / "kept")
    plain = run(config(sources=source), tmp_path / "plain")
    for split in ("train", "validation"):
        expected = images(plain, tmp_path / "plain", split)
        members = dict(read_members(str(tmp_path / "kept" / split / "00000.tar")))
        assert {key for key, files in members.items() if "jpg" in files} == {"mine-kept", "mine-grey"}
        for key, sample in members.items():
            meta = json.loads(sample["json"])
            pixels = decode_stored(sample.get("jpg") or sample["png"], meta.get("box"))
            assert np.array_equal(pixels, expected[key][0])
            assert (meta["height_px"], meta["width_px"]) == pixels.shape[:2]
            assert ("box" in meta) == ("jpg" in sample)
        assert members["mine-kept"]["jpg"] == files["kept.jpg"]
        assert json.loads(members["mine-kept"]["json"])["sha256"] == hashlib.sha256(files["kept.jpg"]).hexdigest()
    run(config(folder, keep_jpeg=True), tmp_path / "halved")
    assert not any("jpg" in sample for _, sample in read_members(str(tmp_path / "halved/train/00000.tar")))


def test_latents_are_those_of_the_sample_as_it_is_stored(tmp_path: Path) -> None:
    fill(tmp_path / "in", "a.png")
    photo(1, 90, 67).save(tmp_path / "in/odd.png")
    codec = CodecConfig()
    maker = LatentMaker(codec, codec_digest(codec))
    manifest = prepare(config(tmp_path / "in", latents=True), recipe_folder=".", output_url=str(tmp_path / "out"), latents=maker)
    assert manifest.latents == load_manifest(str(tmp_path / "out")).latents
    assert (manifest.latents.codec, manifest.latents.channels, manifest.latents.factor) == (codec_digest(codec), 48, 4)
    for key, sample in read_members(manifest.shard_urls(str(tmp_path / "out"), "train")[0]):
        pixels, meta = decode_stored(sample["png"]), json.loads(sample["json"])
        latent = np.load(io.BytesIO(sample["latent.npy"]))
        height, width = (side // 4 * 4 for side in pixels.shape[:2])
        assert (latent.dtype, latent.shape) == (np.float16, (48, height // 4, width // 4)), key
        assert meta["latent_codec"] == codec_digest(codec)
        decoded = make_codec(codec).decode(torch.from_numpy(latent).float()[None])[0].permute(1, 2, 0)
        assert np.abs((decoded.numpy() + 1) * 127.5 - pixels[:height, :width]).max() < 1
