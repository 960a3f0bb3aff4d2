"""`linearsr upscale --workers` and `--address`, from a store to a store: the bytes of one process, and what is there is not done again."""

import io
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import ray
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from flaky_s3 import FlakyS3, flaky_s3
from tiny_bundle import write_bundle

from linearsr_platform import storage
from linearsr_platform.data.picture_shards import write_members

pytestmark = pytest.mark.server


@pytest.fixture
def bundle(tmp_path: Path) -> Path:
    return write_bundle(tmp_path, noise=0.05)


@pytest.fixture
def store(monkeypatch: pytest.MonkeyPatch) -> Iterator[FlakyS3]:
    with flaky_s3() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        server.make_bucket("pictures")
        yield server


def write_inputs(folder: str) -> None:
    """A picture, one in a folder below, and a shard of two."""
    pictures = []
    for width, height in ((12, 9), (16, 11), (10, 10), (13, 12)):
        buffer = io.BytesIO()
        Image.radial_gradient("L").resize((width, height)).convert("RGB").save(buffer, "PNG")
        pictures.append(buffer.getvalue())
    storage.write_bytes(storage.join(folder, "a.png"), pictures[0])
    storage.write_bytes(storage.join(folder, "deeper/b.png"), pictures[1])
    write_members(storage.join(folder, "c.tar"), [("0", {"png": pictures[2]}), ("1", {"png": pictures[3]})])


def contents(url: str) -> dict[str, bytes]:
    start = len(storage.absolute(url)) + 1
    return {file[start:]: storage.read_bytes(file) for file in storage.list_files(url)}


def upscale(*arguments: object, environment: Mapping[str, str] | None = None) -> str:
    command = [sys.executable, "-m", "linearsr_platform", "upscale", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=dict(environment or os.environ), check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return " ".join(done.stdout.split())


def test_workers_write_what_one_process_writes_and_only_what_is_missing(
    cluster: object, bundle: Path, store: FlakyS3, tmp_path: Path
) -> None:
    for folder in (str(tmp_path / "in"), "s3://pictures/in"):
        write_inputs(folder)
    upscale(tmp_path / "in", tmp_path / "out", "--model", bundle, "--threads", 1)
    expected = contents(str(tmp_path / "out"))
    assert sorted(expected) == ["a.png", "c.tar", "deeper/b.png"]

    command = ("s3://pictures/in/", "s3://pictures/out/", "--model", bundle)
    assert "4 done" in upscale(*command, "--workers", 2)
    assert contents("s3://pictures/out") == expected
    puts = store.requests["PUT"]
    assert "3 skipped" in upscale(*command, "--workers", 2)
    assert store.requests["PUT"] == puts

    # Of another machine's cluster: the bundle is sent, and the store is found by references to secrets alone.
    storage.remove("s3://pictures/out/deeper/b.png")
    secrets: list[object] = []
    for name, value in store.environment.items():
        (tmp_path / name).write_text(value)
        secrets += ["--secret", f"{name}=file:{tmp_path / name}"]
    address = ray.get_runtime_context().gcs_address
    bare = {name: value for name, value in os.environ.items() if name not in store.environment} | {"RAY_AUTH_MODE": "token"}
    output = upscale(*command, "--address", address, "--workers", 1, *secrets, environment=bare)
    assert "1 done, 2 skipped" in output
    assert "s3://pictures/out/deeper/b.png 64 x 44" in output
    assert contents("s3://pictures/out") == expected
    assert store.requests["PUT"] == puts + 1
