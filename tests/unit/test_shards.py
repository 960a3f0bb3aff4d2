"""Shards of others and of our own: any tar that WebDataset reads, any picture in it, and clear words about those that are broken."""

import errno
import io
import json
import tarfile
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image
from webdataset import ShardWriter
from webdataset.tariterators import group_by_keys, tar_file_expander

from linearsr_platform import storage
from linearsr_platform.data.cache import ShardCache
from linearsr_platform.data.picture_shards import read_members
from linearsr_platform.data.reader import CropReader, read_images, read_shard
from linearsr_platform.data.shard_files import ShardAwayError, open_shard
from linearsr_platform.errors import StageError
from linearsr_platform.remote import Patience, tried


def picture(kind: str, value: int, size: tuple[int, int] = (24, 16)) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((size[1], size[0], 3), value, np.uint8)).save(buffer, kind)
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]], **options: object) -> str:
    with tarfile.open(path, **({"mode": "w"} | options)) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size, info.mtime = len(content), 1.5
            tar.addfile(info, io.BytesIO(content))
    return str(path)


def array(shape: tuple[int, ...]) -> bytes:
    """Return the file of an array whose numbers may not all be there."""
    buffer = io.BytesIO()
    np.lib.format.write_array_header_1_0(buffer, {"descr": "<f4", "fortran_order": False, "shape": shape})
    return buffer.getvalue() + bytes(400)


def with_size(size: bytes, kind: bytes) -> bytes:
    """Return a tar's header with a size as it is written, and the right sum."""
    info = tarfile.TarInfo("a.png")
    info.type = kind
    header = bytearray(info.tobuf())
    header[124:136], header[148:156] = size.ljust(12, b"\0"), b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    return bytes(header)


def pax_header(size: bytes) -> bytes:
    """Return the extended header of a member of a size."""
    length = next(length for length in range(len(size), len(size) + 20) if length == len(str(length)) + len(b" size=\n") + len(size))
    record = b"%d size=%b\n" % (length, size)
    return with_size(b"%o" % len(record), tarfile.XHDTYPE) + record + bytes(-len(record) % 512)


def by_webdataset(path: str) -> Iterator[tuple[str, dict[str, bytes]]]:
    with open(path, "rb") as stream:
        for raw in group_by_keys(tar_file_expander([{"url": path, "stream": stream}])):
            yield raw["__key__"], {name: content for name, content in raw.items() if not name.startswith("__")}


MEMBERS = [
    ("a.jpg", b"1"),
    ("a.SEG.png", b"2"),
    ("noext", b"x"),
    ("__meta__/x.json", b"y"),
    ("folder.v1/b.jpg", b"3" * 1000),
    ("folder.v1/b.txt", b""),
    ("d" * 60 + "/" + "e" * 80 + ".png", b"4"),
    ("f" * 180 + ".png", b"5"),
    ("g\u00e9.png", b"6" * 512),
]


@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
@pytest.mark.parametrize("mode", ["w", "w:gz", "w:bz2", "w:xz"])
def test_every_tar_is_read_as_webdataset_reads_it(tmp_path: Path, form: int, mode: str) -> None:
    members = [one for one in MEMBERS if form != tarfile.USTAR_FORMAT or not one[0].startswith("fff")]
    path = write_tar(tmp_path / "a.tar", members, mode=mode, format=form)
    found = list(read_members(path))
    assert found == list(by_webdataset(path))
    assert len(found) == len(members) - 4


def test_what_webdatasets_own_writer_writes_is_read_from_anywhere(tmp_path: Path) -> None:
    with ShardWriter(str(tmp_path / "%04d.tar"), maxcount=3, verbose=0) as writer:
        for i in range(3):
            writer.write({"__key__": f"{i:03d}", "jpg": np.full((20, 30, 3), 9 * i, np.uint8), "json": {"caption": "x"}})
    local = str(tmp_path / "0000.tar")
    remote = f"memory://{uuid4().hex}/0000.tar"
    storage.copy_file(local, remote)
    for url in (local, remote):
        assert [(key, image.shape, int(image[0, 0, 0])) for key, image, _ in read_images([url])] == [
            (f"{i:03d}", (20, 30, 3), 9 * i) for i in range(3)
        ]


def test_plain_tars_without_json_can_be_trained_on(tmp_path: Path) -> None:
    kinds = [("jpg", "JPEG"), ("jpeg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")]
    members = [(f"{i:02d}.{kinds[i % 4][0]}", picture(kinds[i % 4][1], 10 * i)) for i in range(8)]
    url = write_tar(tmp_path / "plain.tar", members)

    def crop(image: np.ndarray, tags: list[str], rng: np.random.Generator) -> dict[str, np.ndarray]:
        assert tags == []
        assert image.shape == (16, 24, 3)
        return {"value": image[0, 0, :1]}

    # A block holds these eight images of two epochs.
    batches = islice(CropReader([url], crop, batch_size=4, crops_per_image=1, seed=0), 4)
    values = sorted(int(value) for batch in batches for value in batch["value"][:, 0])
    assert np.allclose(values[::2], range(0, 80, 10), atol=2)
    assert values[::2] == values[1::2]
    assert [sample.size_px for sample in read_shard(url)] == [(24, 16)] * 8


def test_a_box_is_all_that_is_seen_of_a_jpeg(tmp_path: Path) -> None:
    image = np.zeros((40, 60, 3), np.uint8)
    image[8:32, 16:48] = 200
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=95, subsampling=0)
    meta = {"box": [16, 8, 48, 32], "width_px": 32, "height_px": 24, "tags": ["a"]}
    good = write_tar(tmp_path / "good.tar", [("a.jpg", buffer.getvalue()), ("a.json", json.dumps(meta).encode())])
    ((key, pixels, found),) = read_images([good])
    assert (key, pixels.shape, found["tags"]) == ("a", (24, 32, 3), ["a"])
    assert pixels.min() > 180
    assert next(read_shard(good)).decoded_bytes == 3 * 24 * 32
    bad = write_tar(tmp_path / "bad.tar", [("a.jpg", buffer.getvalue()), ("a.json", json.dumps(meta | {"box": [16, 8, 48, 99]}).encode())])
    with pytest.raises(StageError, match=r"bad\.tar: sample a: box: got \[16, 8, 48, 99\] in a picture of 60 x 40 px"):
        read_images([bad])


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda raw: b"", "the file is empty"),
        (lambda raw: raw[:1024], "cut off at 1024 bytes"),
        (lambda raw: raw[:1640], "cut off at 1640 bytes, inside a member of 400 bytes"),
        (lambda raw: raw[:100] + b"\x01" + raw[101:], "no header at byte 0"),
        (lambda raw: b"PK" + raw, "no header at byte 0"),
        (lambda raw: b"\x1f\x8b" + raw[:50], "cannot be unpacked"),
        (lambda raw: with_size(b"-0001000", tarfile.DIRTYPE) + raw, "a member of size b'-0001000'"),
        (lambda raw: pax_header(b"-1024") + raw, "a member of size '-1024'"),
        (lambda raw: pax_header(b"many") + raw, "a member of size 'many'"),
        (lambda raw: pax_header(b"9" * 5000) + raw, "a member of size '9{20}'"),
    ],
)
def test_broken_tars_are_named_with_the_reason(tmp_path: Path, spoil: object, reason: str) -> None:
    path = Path(write_tar(tmp_path / "a.tar", [("a.png", b"x" * 400), ("b.png", b"y" * 400)], format=tarfile.GNU_FORMAT))
    path.write_bytes(spoil(path.read_bytes()))
    with pytest.raises(StageError, match=rf"shard .*a\.tar: cannot be read: BadTarError: .*{reason}"):
        list(read_shard(str(path)))


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (ConnectionResetError("the line is dead"), ShardAwayError, "its store does not answer: ConnectionResetError: the line is dead"),
        (OSError(errno.EBUSY, "Slow down"), ShardAwayError, "its store does not answer: OSError: .*Slow down"),
        (TimeoutError(), ShardAwayError, "its store does not answer: TimeoutError"),
        (FileNotFoundError("a.tar"), StageError, "cannot be read: FileNotFoundError: .*a.tar.*; fix: write it again"),
        (PermissionError("a.tar"), StageError, "cannot be read: PermissionError: a.tar"),
    ],
)
@pytest.mark.parametrize("cached", [False, True])
def test_a_store_that_does_not_answer_says_nothing_against_its_shards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: OSError, kind: type[Exception], said: str, cached: bool
) -> None:
    """What passes does not end a training for good, as a `StageError` does."""
    url = f"memory://{uuid4().hex}/a.tar"
    storage.copy_file(write_tar(tmp_path / "a.tar", [("a.png", b"x")]), url)
    calls: list[str] = []

    def fail(fs: MemoryFileSystem, path: str, **_: object) -> None:
        calls.append(path)
        raise error

    cache = ShardCache(str(tmp_path / "cache"), max_bytes=10**6) if cached else None
    monkeypatch.setattr("linearsr_platform.storage.tried", partial(tried, patience=Patience(tries=3, first_wait_s=0)))
    with monkeypatch.context() as away:
        away.setattr(MemoryFileSystem, "info", fail)
        with pytest.raises(kind, match=rf"^shard {url}: {said}") as raised:
            open_shard(url, cache)
    assert isinstance(raised.value, StageError) is (kind is StageError)
    assert len(calls) == (3 if kind is ShardAwayError else 1)
    assert len(open_shard(url, cache).entries) == 1


def test_samples_that_cannot_be_used_are_named(tmp_path: Path) -> None:
    twice = write_tar(tmp_path / "twice.tar", [("a.png", b"x"), ("a.PNG", b"y")])
    with pytest.raises(StageError, match="sample a has two members png"):
        list(read_shard(twice))
    for members, reason in (
        ([("a.txt", b"x")], "got txt; expected one of png, jpg, jpeg, webp"),
        ([("a.jpg", b"no picture")], "not an image that can be decoded"),
        ([("a.png", picture("PNG", 1)), ("a.json", b"[1]")], "got list; expected a JSON object"),
        ([("a.png", picture("PNG", 1)), ("a.json", b"{")], "a.json: "),
        ([("a.png", picture("PNG", 1)), ("a.json", b'{"a": ' + b"[" * 100_000)], "a.json: .*too deep"),
        ([("a.png", picture("PNG", 1)), ("a.json", rb'{"tags": ["\ud83d"]}')], "a.json: .*surrogates"),
        ([("a.png", picture("PNG", 1)), ("a.latent.npy", b"PK\x03\x04")], "a.latent.npy: this is no array"),
        ([("a.png", picture("PNG", 1)), ("a.latent.npy", array((9, 9, 9))[:300])], "a.latent.npy: "),
        ([("a.png", picture("PNG", 1)), ("a.latent.npy", array((10**14,)))], "a.latent.npy: this is a broken array"),
        ([("a.png", picture("PNG", 1)), ("a.latent.npy", b"\x93NUMPY\1\0v\0" + b"((((".ljust(118))], "a.latent.npy: this is a broken"),
    ):
        url = write_tar(tmp_path / "bad.tar", members)
        with pytest.raises(StageError, match=rf"bad\.tar: sample a: .*{reason}"):
            read_images([url])


@pytest.mark.parametrize("size", ['"24"', "NaN", "null", "1e400"])
def test_a_size_that_is_no_number_is_named(tmp_path: Path, size: str) -> None:
    facts = f'{{"width_px": {size}, "height_px": 16}}'.encode()
    sample = next(read_shard(write_tar(tmp_path / "a.tar", [("a.png", picture("PNG", 1)), ("a.json", facts)])))
    with pytest.raises(StageError, match=r"a\.tar: sample a: a\.json: got width_px .*; expected whole numbers"):
        _ = sample.decoded_bytes


def test_a_shard_deleted_or_replaced_while_it_is_read_stays_what_it_was(tmp_path: Path) -> None:
    url = write_tar(tmp_path / "a.tar", [(f"{i}.png", picture("PNG", i)) for i in range(3)])
    samples = read_shard(url)
    next(samples)
    Path(url).unlink()
    assert [sample.key for sample in samples] == ["1", "2"]
