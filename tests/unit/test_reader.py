"""The stream of crops: endless, mixed, the same for the same seed, and exactly resumable."""

import json
from collections import Counter
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

from linearsr_platform.data.reader import CropReader, read_images
from linearsr_platform.data.shards import Sample, write_shard
from linearsr_platform.errors import StageError, UserError

IMAGES, PER_SHARD, CROPS = 20, 4, 3


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Five shards of four images; every pixel of image i is i."""
    folder = tmp_path_factory.mktemp("data") / "train"
    for shard in range(IMAGES // PER_SHARD):
        numbers = range(shard * PER_SHARD, (shard + 1) * PER_SHARD)
        samples = [Sample(f"image-{i}", np.full((16, 20, 3), i, dtype=np.uint8), {"tags": [f"tag-{i}"]}) for i in numbers]
        write_shard(str(folder), f"{shard:05d}.tar", samples)
    return [str(path) for path in sorted(folder.iterdir())]


def crop(image: np.ndarray, tags: list[str], rng: np.random.Generator) -> dict[str, np.ndarray]:
    assert tags == [f"tag-{image[0, 0, 0]}"]
    top = rng.integers(0, 12)
    return {"image": image[top : top + 4, :4].transpose(2, 0, 1), "draw": np.array(rng.integers(2**62))}


def reader(shards: list[str], *, rank: int = 0, world_size: int = 1, seed: int = 0, batch_size: int = 4) -> CropReader:
    return CropReader(shards, crop, batch_size=batch_size, crops_per_image=CROPS, seed=seed, rank=rank, world_size=world_size)


def numbers(batch: dict[str, torch.Tensor]) -> list[int]:
    return batch["image"][:, 0, 0, 0].tolist()


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_batches_have_the_shape_and_mix_images(shards: list[str]) -> None:
    batches = list(islice(reader(shards), 15))
    assert batches[0]["image"].shape == (4, 3, 4, 4)
    assert batches[0]["image"].dtype == torch.uint8
    assert np.mean([len(set(numbers(batch))) for batch in batches]) > 3


@pytest.mark.parametrize("stop", [0, 1, 11, 12, 13, 47])
def test_a_restored_reader_goes_on_as_if_never_stopped(shards: list[str], stop: int) -> None:
    """12 batches are one block of 16 images; 47 are past three epochs."""
    whole = list(islice(reader(shards), stop + 20))
    stopped = reader(shards)
    for _ in range(stop):
        next(stopped)
    state = json.loads(json.dumps(stopped.state()))
    resumed = reader(shards)
    next(resumed)
    resumed.restore([state])
    assert resumed.state() == state
    assert all(same(one, other) for one, other in zip(whole[stop:], islice(resumed, 20), strict=True))


def test_every_rank_resumes_by_itself(shards: list[str]) -> None:
    for rank in range(2):
        first = reader(shards, rank=rank, world_size=2)
        for _ in range(9):
            next(first)
        resumed = reader(shards, rank=rank, world_size=2)
        resumed.restore([first.state()] * 2)
        assert all(same(next(first), next(resumed)) for _ in range(30))


@pytest.mark.parametrize("change", [{"seed": 1}, {"rank": 1}, {"world_size": 3}])
def test_a_state_of_another_run_is_refused(shards: list[str], change: dict[str, int]) -> None:
    state = reader(shards, world_size=2).state()
    with pytest.raises(UserError, match="reader state"):
        reader(shards, **({"world_size": 2} | change)).restore([state, state])


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_ranks_share_an_epoch_without_overlap(shards: list[str], world_size: int) -> None:
    seen = Counter[int]()
    for rank in range(world_size):
        own = len(range(rank, len(shards), world_size)) * PER_SHARD
        # Blocks run on into the next epoch, so ask the stream of samples itself.
        stream = reader(shards, rank=rank, world_size=world_size)._stream
        epochs = [(place.epoch, int(sample.decode()[0, 0, 0])) for place, sample in islice(stream, own + 1)]
        assert [epoch for epoch, _ in epochs] == [0] * own + [1]
        seen.update(number for _, number in epochs[:own])
    assert seen == Counter(range(IMAGES))


def test_every_image_gives_the_same_number_of_crops(shards: list[str]) -> None:
    """80 images are four epochs and five blocks."""
    batches = islice(reader(shards), 80 * CROPS // 4)
    assert Counter(number for batch in batches for number in numbers(batch)) == dict.fromkeys(range(IMAGES), 4 * CROPS)


def test_ranks_get_other_shards_in_other_epochs(shards: list[str]) -> None:
    batches = islice(reader(shards, rank=1, world_size=2), 120)
    assert {number for batch in batches for number in numbers(batch)} == set(range(IMAGES))


def test_crops_do_not_depend_on_the_number_of_ranks(shards: list[str]) -> None:
    def draws(world_size: int) -> set[tuple[int, int]]:
        found = set()
        for rank in range(world_size):
            for batch in islice(reader(shards, rank=rank, world_size=world_size), 60):
                found |= set(zip(numbers(batch), batch["draw"].tolist(), strict=True))
        return found

    alone = draws(1)
    assert len(alone & draws(5)) >= IMAGES * CROPS
    # Every crop is another one: no draw comes twice.
    assert len({draw for _, draw in alone}) == 60 * 4


def test_seeds_change_order_and_crops(shards: list[str]) -> None:
    assert same(next(reader(shards)), next(reader(shards)))
    assert not same(next(reader(shards, seed=-1)), next(reader(shards)))


def test_more_ranks_than_shards_are_refused(shards: list[str]) -> None:
    with pytest.raises(UserError, match="got 5 shards for 6 workers"):
        reader(shards, world_size=6)


def test_images_larger_than_the_memory_of_a_block_still_come(shards: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("linearsr_platform.data.reader.BLOCK_BYTES", 1)
    batches = list(islice(reader(shards), 15))
    assert Counter(number for batch in batches for number in numbers(batch)) == dict.fromkeys(range(IMAGES), CROPS)


def test_broken_shards_are_named(shards: list[str], tmp_path: Path) -> None:
    cut = tmp_path / "cut.tar"
    cut.write_bytes(Path(shards[0]).read_bytes()[:700])
    with pytest.raises(StageError, match=r"cut\.tar"):
        read_images([str(cut)])
    with pytest.raises(StageError, match=r"gone\.tar"):
        next(reader([str(tmp_path / "gone.tar")]))
    empty = tmp_path / "empty.tar"
    empty.write_bytes(b"\0" * 10240)
    with pytest.raises(StageError, match=r"empty\.tar"):
        next(reader([str(empty)]))


def test_read_images_gives_all_of_them_in_order(shards: list[str]) -> None:
    found = read_images(shards)
    assert [key for key, _, _ in found] == [f"image-{i}" for i in range(IMAGES)]
    assert found[7][1].shape == (16, 20, 3)
    assert found[7][2]["tags"] == ["tag-7"]
