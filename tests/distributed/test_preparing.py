"""Prepare as Ray tasks: the bytes are those of one process, whatever the source, and errors name what they are about."""

import io
import json
import os
import signal
import tarfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import boto3
import numpy as np
import pytest
from moto.server import ThreadedMotoServer
from PIL import Image

from linearsr.codec_source import codec_digest
from linearsr.config import CodecConfig
from linearsr_platform import storage
from linearsr_platform.cluster import preparing
from linearsr_platform.cluster.capacity import Share
from linearsr_platform.cluster.experts import machines
from linearsr_platform.cluster.preparing import RayExecutor
from linearsr_platform.data.executor import SerialExecutor
from linearsr_platform.data.extras import LatentMaker
from linearsr_platform.data.prepare import prepare
from linearsr_platform.errors import StageError, UserError
from linearsr_platform.recipe.data_schema import DataConfig
from linearsr_platform.recipe.load import load_recipe
from linearsr_platform.stages.context import RecipeContext
from linearsr_platform.stages.prepare import run

SMOKE = Path(__file__).parents[2] / "pipelines" / "smoke.yaml"


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """The environment that reaches a bucket `photos` on a server of its own."""
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    environment = {
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "AWS_ACCESS_KEY_ID": "none",
        "AWS_SECRET_ACCESS_KEY": "none",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    boto3.client("s3").create_bucket(Bucket="photos")
    yield environment
    server.stop()


def png(seed: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (64, 96, 3), dtype=np.uint8)).save(buffer, "PNG")
    return buffer.getvalue()


def tar_of(*seeds: int) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for seed in seeds:
            for name, content in ((f"{seed}.png", png(seed)), (f"{seed}.json", json.dumps({"tags": [f"tag {seed}"]}).encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return buffer.getvalue()


def everything(url: str) -> dict[str, bytes]:
    return {file.removeprefix(url): storage.read_bytes(file) for file in storage.list_files(url)}


def test_ray_tasks_write_the_bytes_that_one_process_writes(cluster: object, s3: dict[str, str], tmp_path: Path) -> None:
    for seed in range(8):
        storage.write_bytes(str(tmp_path / f"folder/{seed}.png"), png(seed))
        storage.write_text(str(tmp_path / f"folder/{seed}.txt"), f"tag {seed}")
        storage.write_bytes(f"s3://photos/in/{seed}.png", png(10 + seed))
    storage.write_bytes("s3://photos/in/0.json", b'{"tags": "remote"}')
    storage.write_bytes(str(tmp_path / "tars/a.tar"), tar_of(20, 21, 3))
    storage.write_bytes("s3://photos/tars/b.tar", tar_of(22, 23, 13))
    sources = {
        "folder": str(tmp_path / "folder"),
        "glob": str(tmp_path / "folder/[0-3].png"),
        "bucket": "s3://photos/in",
        "tars": str(tmp_path / "tars"),
        "remote": "s3://photos/tars/*.tar",
    }
    data = DataConfig.model_validate(
        {"sources": {name: {"url": url} for name, url in sources.items()}, "validation_px": 24, "min_side_px": 24, "samples_per_shard": 4}
    )
    latents = LatentMaker(CodecConfig(), codec_digest(CodecConfig()))
    make = partial(prepare, data, recipe_folder=".", latents=latents)
    serial = make(output_url=str(tmp_path / "serial"), choose=lambda count: SerialExecutor())
    parallel = make(output_url="s3://photos/parallel", choose=lambda count: RayExecutor(environment=s3))
    assert serial == parallel
    assert serial.counts["duplicates"] == 4 + 1 + 1
    assert serial.counts["train"] == 8 + 8 + 2 + 2
    assert everything(str(tmp_path / "serial")) == everything("s3://photos/parallel")
    assert set(serial.vocabulary) == {*(f"tag {seed}" for seed in (*range(8), 20, 21, 22, 23)), "remote"}


@dataclass(frozen=True)
class Piece:
    name: str
    folder: str


def fail(piece: Piece) -> str:
    if piece.name == "mistake":
        raise UserError("theirs: got it wrong")
    if piece.name == "fault":
        raise ZeroDivisionError("by zero")
    marks = len(os.listdir(piece.folder))
    Path(piece.folder, f"{piece.name}-{os.getpid()}").touch()
    if piece.name == "killed" and marks == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return piece.name


def test_a_lost_task_is_done_again_and_errors_say_what_they_are_about(cluster: object, tmp_path: Path) -> None:
    piece = partial(Piece, folder=str(tmp_path))
    results = RayExecutor().map_unordered(fail, [piece("killed")])
    assert list(results) == [(0, "killed")]
    assert len(os.listdir(tmp_path)) == 2
    pieces = [piece(str(number)) for number in range(9)]
    assert sorted(RayExecutor().map_unordered(fail, pieces)) == [(number, str(number)) for number in range(9)]
    with pytest.raises(UserError, match=r"^theirs: got it wrong$"):
        list(RayExecutor().map_unordered(fail, [piece("mistake")]))
    with pytest.raises(StageError, match=r"^fault: ZeroDivisionError: by zero"):
        list(RayExecutor().map_unordered(fail, [piece("fault"), piece("1")]))


def meet(piece: Piece) -> bool:
    """Tell whether another piece is under way at the same time."""
    Path(piece.folder, piece.name).touch()
    end = time.monotonic() + 20
    while not (met := len(os.listdir(piece.folder)) > 1) and time.monotonic() < end:
        time.sleep(0.05)
    return met


def test_machines_that_come_later_get_work_while_the_first_are_busy(
    cluster: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "IN_FLIGHT", 1)
    monkeypatch.setattr(preparing, "LOOK_S", 0.2)
    come = iter([(), (Share(cpus=1.0),)])
    monkeypatch.setattr(preparing, "machines", lambda: next(come, (Share(cpus=2.0),)))
    pieces = [Piece(name, str(tmp_path)) for name in ("first", "second")]
    assert dict(RayExecutor().map_unordered(meet, pieces)) == {0: True, 1: True}


def alone(piece: Piece) -> bool:
    """Tell whether no other piece is under way at the same time."""
    mark = Path(piece.folder, piece.name)
    mark.touch()
    time.sleep(0.5)
    found = os.listdir(piece.folder) == [piece.name]
    mark.unlink()
    return found


def test_pieces_that_take_most_of_the_memory_are_done_one_after_the_other(cluster: object, tmp_path: Path) -> None:
    pieces = [Piece(name, str(tmp_path)) for name in ("first", "second", "third")]
    share = Share(cpus=1.0, memory_bytes=0.6 * max(machine.memory_bytes for machine in machines()))
    assert dict(RayExecutor(share).map_unordered(alone, pieces)) == dict.fromkeys(range(3), True)


def test_work_that_no_machine_has_room_for_says_so_and_is_taken_back(
    cluster: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparing, "LOOK_S", 0.2)
    with pytest.raises(
        StageError, match=r"^workers: got no room for one of 1 CPUs and 8 GPUs in 0\.5 s; expected room on a cluster of 2 CPUs"
    ):
        list(RayExecutor(Share(cpus=1.0, gpus=8.0), patience_s=0.5).map_unordered(alone, [Piece("never", str(tmp_path))]))
    assert os.listdir(tmp_path) == []


class Told:
    """A display that keeps what it is told."""

    def __init__(self) -> None:
        self.updates: list[tuple[str, int, int]] = []
        self.messages: list[str] = []

    def update(self, name: str, done: int, total: int) -> None:
        self.updates.append((name, done, total))

    def message(self, text: str) -> None:
        self.messages.append(text)


class Params:
    """A tracked run that keeps its parameters."""

    def log_params(self, params: dict[str, object]) -> None:
        self.params = params


def test_the_stage_takes_the_cluster_for_many_photographs_alone(cluster: object, tmp_path: Path) -> None:
    for seed in range(6):
        storage.write_bytes(str(tmp_path / f"in/{seed}.png"), png(seed))
    storage.write_bytes(str(tmp_path / "in/copy.png"), png(5))
    storage.write_bytes(str(tmp_path / "in/none.png"), b"no image")
    opened: list[str] = []

    def go(url: str, parallel_from: int) -> tuple[Told, str]:
        overrides = [f"data.sources={{mine: '{tmp_path}/in'}}", "data.validation_px=32", "data.min_side_px=32", "data.held_out=['0']"]
        loaded = load_recipe(str(SMOKE), overrides=[*overrides, "validation.crop_px=32", f"data.parallel_from={parallel_from}"])
        display, tracked = Told(), Params()
        context = RecipeContext(loaded=loaded, storage_url=str(tmp_path), display=display, open_cluster=lambda: opened.append(url))
        output = run(context, url, tracked)
        assert tracked.params["duplicates"] == 1
        return display, output.summary

    few, summary = go(str(tmp_path / "few"), 9)
    assert opened == []
    many, same = go(str(tmp_path / "many"), 8)
    assert set(opened) == {str(tmp_path / "many")}
    assert summary == same
    assert summary.endswith(", 1 quarantined, 1 duplicates")
    assert everything(str(tmp_path / "few")) == everything(str(tmp_path / "many"))
    for display in (few, many):
        assert ("checking", 8, 8) in display.updates
        assert display.updates[-1][1] == display.updates[-1][2]
        assert len(display.messages) == 2
