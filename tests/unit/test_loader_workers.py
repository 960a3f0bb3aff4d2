"""Processes that make crops ahead: the same batches as without them, and nothing left of them however they or their reader end."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from example_crops import disconnected_crop, failing_crop, killing_crop, numbered_crop, write_numbered

from linearsr.config import AugmentationConfig, BackboneConfig, DegradationConfig, LatentStatistics, ModelConfig, TagsConfig
from linearsr.task import SuperResolutionTask
from linearsr.task_config import TaskConfig
from linearsr_platform.data.reader import CropReader
from linearsr_platform.data.shards import Sample, write_shard
from linearsr_platform.errors import StageError, UserError


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return write_numbered(tmp_path_factory.mktemp("data") / "train", shards=5, per_shard=4)


def reader(shards: list[str], workers: int, **settings: Any) -> CropReader:
    return CropReader(
        shards, **({"transform": numbered_crop, "batch_size": 6, "crops_per_image": 3, "seed": 0} | settings), workers=workers
    )


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return list(one) == list(other) and all(torch.equal(one[name], other[name]) for name in one)


def ended(process_id: int, within_s: float = 15.0) -> bool:
    """Tell whether a process ends in time; one that ended unwatched counts too."""
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        try:
            state = Path(f"/proc/{process_id}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_do_not_depend_on_processes_and_resume_exactly_with_any_number(shards: list[str], workers: int) -> None:
    whole = list(islice(reader(shards, 0), 40))
    one = reader(shards, workers)
    assert all(same(a, b) for a, b in zip(whole[:17], islice(one, 17), strict=True))
    # Four batches are made ahead; the state is of what was handed out.
    state = one.state()
    assert all(same(a, b) for a, b in zip(whole[17:], islice(one, 23), strict=True))
    one.restore(state)
    assert all(same(a, b) for a, b in zip(whole[17:25], islice(one, 8), strict=True))
    processes = list(one.process_ids)
    one.close()
    assert all(ended(process, 0.5) for process in processes)
    without = reader(shards, 0)
    without.restore(state)
    assert same(next(without), whole[17])
    again = reader(shards, 2)
    again.restore(without.state())
    assert same(next(again), whole[18])
    again.close()


def test_a_batch_that_somebody_holds_is_never_written_into(shards: list[str]) -> None:
    """They lie in memory shared with the processes, which use it again."""
    whole = list(islice(reader(shards, 0), 40))
    one, held = reader(shards, 2), dict[int, torch.Tensor]()
    for number in range(40):
        # Of some only a part, and now and then more than there is room for.
        held[number] = next(one)["image"][2:]
        if number == 11:
            one.restore(one.state())
        held = {i: part for i, part in held.items() if i % 9 == 0 or i > number - 3}
        assert all(torch.equal(part, whole[i]["image"][2:]) for i, part in held.items())
    one.close()
    assert all(torch.equal(part, whole[i]["image"][2:]) for i, part in held.items())


def test_several_lanes_with_accumulation_come_out_of_processes_too(shards: list[str]) -> None:
    layout = {"rank": 1, "world_size": 2, "accumulation": 2, "batch_size": 3}
    whole = list(islice(reader(shards, 0, **layout), 12))
    one = reader(shards, 2, **layout)
    assert all(same(a, b) for a, b in zip(whole, islice(one, 12), strict=True))
    one.close()


def test_the_methods_own_examples_come_out_of_processes_as_they_are(root: Path) -> None:
    """With torch in each process, on photographs."""
    model = ModelConfig(backbone=BackboneConfig(width=32, num_blocks=1, caption_width=8), tags=TagsConfig(vocabulary=("cat",), max_tags=2))
    task = SuperResolutionTask(
        TaskConfig(
            model=model,
            statistics=LatentStatistics(mean=(0.0,) * 48, std=(0.5,) * 48, residual_std=(0.4,) * 48),
            interval=(0.0, 1.0),
            degradation=DegradationConfig(),
            augmentation=AugmentationConfig(),
            crop_px=64,
            validation_steps=1,
            metrics=("psnr_y",),
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        with Image.open(root / "pipelines/quickstart/example.jpg") as image:
            pixels = np.asarray(image.convert("RGB"))
        parts = [Sample(f"{i}", pixels[10 * i : 10 * i + 120, 30 * i : 30 * i + 120], {"tags": ["cat"]}) for i in range(4)]
        write_shard(folder, "a.tar", parts)
        found = []
        for workers in (0, 2):
            one = reader([f"{folder}/a.tar"], workers, transform=task.transform)
            found.append(list(islice(one, 6)))
            one.close()
    assert all(same(one, other) for one, other in zip(*found, strict=True))


def test_an_error_in_a_process_comes_up_with_sample_and_traceback(shards: list[str]) -> None:
    one = reader(shards, 2, transform=failing_crop)
    with pytest.raises(StageError, match=r"00001\.tar: sample image-7: loader worker \d failed: ZeroDivisionError: seven") as raised:
        list(islice(one, 40))
    assert "in failing_crop" in raised.value.__notes__[0]
    assert not one.process_ids


def test_a_lost_connection_in_a_process_stays_one_and_is_not_taken_for_the_parents(shards: list[str]) -> None:
    """Ray Train starts a worker again after it, and not after a `StageError`."""
    one = reader(shards, 2, transform=disconnected_crop)
    with pytest.raises(ConnectionError, match=r"tar: sample image-7: loader worker \d failed: ConnectionResetError: the line is dead"):
        list(islice(one, 40))
    assert not one.process_ids


def test_a_killed_process_is_an_error_and_not_a_hang(shards: list[str]) -> None:
    one = reader(shards, 2, transform=killing_crop)
    next(one)
    processes = list(one.process_ids)
    # No StageError: a training whose loader was killed is started again.
    with pytest.raises(ChildProcessError, match=r"loader worker \d \(process \d+\) was killed by signal 9"):
        list(islice(one, 40))
    assert all(ended(process) for process in processes)


def test_a_transform_that_no_other_process_can_import_is_said(shards: list[str]) -> None:
    with pytest.raises(UserError, match=r"train\.loader_workers"):
        next(reader(shards, 1, transform=lambda image, tags, rng: {"image": image}))


def test_memory_of_this_process_is_refused() -> None:
    with pytest.raises(UserError, match="memory://"):
        reader(["memory://bucket/a.tar"], 1)


PARENT = """
import os, sys, time
sys.path[:0] = [{support!r}]
from example_crops import numbered_crop
from linearsr.config import AugmentationConfig, BackboneConfig, DegradationConfig, LatentStatistics, ModelConfig, TagsConfig
from linearsr.task import SuperResolutionTask
from linearsr.task_config import TaskConfig
from linearsr_platform.data.reader import CropReader
from linearsr_platform.data.shards import Sample, write_shard
reader = CropReader({shards!r}, numbered_crop, batch_size=6, crops_per_image=3, seed=0, workers=2)
next(reader)
print(*reader.process_ids, flush=True)
time.sleep(60)
"""


def test_nothing_is_left_when_the_parent_is_killed(shards: list[str]) -> None:
    before = set(os.listdir("/dev/shm"))
    script = PARENT.format(support=str(Path(__file__).parents[1] / "support"), shards=shards)
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        processes = [int(word) for word in parent.stdout.readline().split()]
        assert len(processes) == 2
        parent.send_signal(signal.SIGKILL)
        parent.wait()
        assert all(ended(process) for process in processes)
    assert set(os.listdir("/dev/shm")) <= before
