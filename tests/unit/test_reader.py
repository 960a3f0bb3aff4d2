"""The stream of crops: endless, mixed, the same for the same seed, and exactly resumable, whatever the number of ranks and processes."""

import json
import sys
from collections import Counter
from hashlib import sha256
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from example_crops import numbered_crop, write_numbered

from linearsr_platform.data.lanes import Lanes
from linearsr_platform.data.reader import CropReader, lanes_of, read_images
from linearsr_platform.data.shards import Sample, write_shard
from linearsr_platform.errors import StageError, UserError

IMAGES, SHARDS, CROPS = 22, 5, 3


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Five shards of four or five images; every pixel of image i is i."""
    return write_numbered(tmp_path_factory.mktemp("data") / "train", shards=SHARDS, per_shard=4)


def reader(shards: list[str], **settings: Any) -> CropReader:
    return CropReader(shards, **({"transform": numbered_crop, "batch_size": 4, "crops_per_image": CROPS, "seed": 0} | settings))


def numbers(batch: dict[str, torch.Tensor]) -> list[int]:
    return batch["image"][:, 0, 0, 0].tolist()


def crops(batch: dict[str, torch.Tensor]) -> list[tuple[int, int]]:
    return list(zip(numbers(batch), batch["draw"].tolist(), strict=True))


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Run:
    """All ranks of a run, each with its own reader."""

    def __init__(self, shards: list[str], lanes: Lanes, ranks: int, accumulation: int, batch: int, states: list[Any] | None = None) -> None:
        self.accumulation = accumulation
        size = batch // (ranks * accumulation)
        self.readers = [
            reader(shards, batch_size=size, rank=rank, world_size=ranks, accumulation=accumulation, lanes=lanes) for rank in range(ranks)
        ]
        if states is not None:
            for one in self.readers:
                one.restore(states)

    def global_batches(self, count: int) -> list[list[tuple[int, int]]]:
        found = []
        for _ in range(count):
            steps = [[crops(next(one)) for one in self.readers] for _ in range(self.accumulation)]
            found.append([crop for step in steps for part in step for crop in part])
        return found

    def states(self) -> list[Any]:
        return json.loads(json.dumps([one.state() for one in self.readers]))


def test_the_order_is_the_one_that_was_published(tmp_path: Path) -> None:
    """Recorded with the reader of one stream a rank, before there were lanes: results of finished runs must stay what they are."""
    rng_free = tmp_path / "train"
    for shard in range(5):
        keys = range(shard * 4, shard * 4 + 4 + shard % 2)
        samples = [Sample(f"image-{i}-{shard}", np.full((16, 20, 3), i, np.uint8), {"tags": [str(i), str(shard)]}) for i in keys]
        write_shard(str(rng_free), f"{shard:05d}.tar", samples)
    urls = [str(path) for path in sorted(rng_free.iterdir())]

    def crop(image: np.ndarray, tags: list[str], rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {"key": np.array([int(tag) for tag in tags]), "draw": np.array(rng.integers(2**31))}

    def digest(world_size: int, batch_size: int, per_image: int, rank: int) -> str:
        stream = CropReader(
            urls, crop, batch_size=batch_size, crops_per_image=per_image, seed=7, rank=rank, world_size=world_size, accumulation=2
        )
        drawn = [
            [*key, draw] for batch in islice(stream, 60) for key, draw in zip(batch["key"].tolist(), batch["draw"].tolist(), strict=True)
        ]
        return sha256(json.dumps(drawn).encode()).hexdigest()[:16]

    published = {
        (1, 4, 3, 0): "8a6405f50a0d048c",
        (2, 4, 3, 0): "cc6148295eb208de",
        (2, 4, 3, 1): "08b80f62781ffe34",
        (3, 2, 1, 0): "958968a75be5b379",
        (3, 2, 1, 1): "3e6b505571e117ea",
        (3, 2, 1, 2): "bd753373a659ebe3",
        (2, 9, 2, 0): "74e4bc894761bedf",
        (2, 9, 2, 1): "4330a040e0b41384",
    }
    assert {one: digest(*one) for one in published} == published


@pytest.mark.parametrize("stop", [0, 1, 11, 12, 13, 47])
def test_a_restored_reader_goes_on_as_if_never_stopped(shards: list[str], stop: int) -> None:
    """12 batches are one block of 16 images; 47 are past two epochs."""
    whole = list(islice(reader(shards), stop + 20))
    stopped = reader(shards)
    for _ in range(stop):
        next(stopped)
    state = json.loads(json.dumps(stopped.state()))
    resumed = reader(shards)
    next(resumed)
    resumed.restore(state)
    assert resumed.state() == state
    assert all(same(one, other) for one, other in zip(whole[stop:], islice(resumed, 20), strict=True))


LAYOUTS = st.sampled_from([(1, 1), (2, 1), (3, 1), (1, 2), (4, 1), (2, 2), (3, 2), (6, 1), (1, 12), (12, 1)])
"""Ranks and accumulation; they divide a batch of 12."""


@settings(max_examples=25)
@given(first=LAYOUTS.filter(lambda one: one[0] <= SHARDS), second=LAYOUTS, third=LAYOUTS, stop=st.integers(0, 12), more=st.integers(0, 8))
def test_global_batches_do_not_depend_on_interruptions_and_ranks(
    shards: list[str], first: tuple[int, int], second: tuple[int, int], third: tuple[int, int], stop: int, more: int
) -> None:
    """Started with one number of workers, interrupted twice, resumed with others each time."""
    lanes = Lanes(first[0], 12 // (first[0] * first[1]))
    whole = Run(shards, lanes, *first, 12).global_batches(stop + more + 6)
    one = Run(shards, lanes, *first, 12)
    found = one.global_batches(stop)
    two = Run(shards, lanes_of(one.states()), *second, 12, one.states())
    found += two.global_batches(more)
    three = Run(shards, lanes_of(two.states()), *third, 12, two.states())
    assert found + three.global_batches(6) == whole


def test_a_batch_that_the_lanes_do_not_divide_is_refused(shards: list[str]) -> None:
    with pytest.raises(UserError, match="a multiple of 8: 2 lanes of 4"):
        reader(shards, batch_size=3, world_size=2, lanes=Lanes(2, 4))


def test_within_an_accumulated_step_the_same_ranks_go_on_and_others_are_refused(shards: list[str]) -> None:
    layout = {"batch_size": 2, "world_size": 2, "accumulation": 3}
    whole = list(islice(reader(shards, **layout), 12))
    stopped = reader(shards, **layout)
    list(islice(stopped, 4))
    resumed = reader(shards, **layout)
    resumed.restore(stopped.state())
    assert all(same(one, other) for one, other in zip(whole[4:], islice(resumed, 8), strict=True))
    other = reader(shards, **layout, rank=1)
    list(islice(other, 4))
    with pytest.raises(UserError, match="between the micro-batches"):
        reader(shards, batch_size=12, lanes=Lanes(2, 2)).restore([stopped.state(), other.state()])


def test_what_is_skipped_is_never_decoded(shards: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a lane that four ranks share, each decodes the images of its own crops alone."""
    decoded: list[str] = []
    monkeypatch.setattr(
        "linearsr_platform.data.samples.RawSample.decode",
        lambda sample, decoder: decoded.append(sample.key) or np.full((16, 20, 3), int(sample.key.removeprefix("image-")), np.uint8),
    )
    one = reader(shards, batch_size=3, rank=2, world_size=4, lanes=Lanes(1, 12), crops_per_image=1)
    wanted = [number for batch in islice(one, 10) for number in numbers(batch)]
    # An image that a block has twice, on small data, is decoded once.
    assert set(decoded) == {f"image-{number}" for number in wanted}
    assert len(wanted) / 2 < len(decoded) <= len(wanted)


def test_states_of_different_moments_or_with_a_lane_missing_are_refused(shards: list[str]) -> None:
    ranks = [reader(shards, rank=rank, world_size=2) for rank in range(2)]
    alone = reader(shards, batch_size=8, lanes=Lanes(2, 4))
    with pytest.raises(UserError, match="states of all workers"):
        alone.restore(ranks[0].state())
    next(ranks[0])
    with pytest.raises(UserError, match="one moment"):
        alone.restore([one.state() for one in ranks])
    moved = json.loads(json.dumps(reader(shards, rank=1, world_size=2).state()))
    moved["lanes"]["0"] = ranks[0].state()["lanes"]["0"]
    with pytest.raises(UserError, match="for lane 0"):
        alone.restore([reader(shards, world_size=2).state(), moved])


@pytest.mark.parametrize("change", [{"seed": 1}, {"rank": 1}, {"world_size": 3}, {"crops_per_image": 5}])
def test_a_state_of_another_run_is_refused(shards: list[str], change: dict[str, int]) -> None:
    state = reader(shards, world_size=2).state()
    with pytest.raises(UserError, match="reader state"):
        reader(shards, **({"world_size": 2} | change)).restore(state)


@pytest.mark.parametrize(("lanes", "ranks"), [(1, 1), (2, 2), (3, 3), (5, 5), (2, 4), (3, 1), (1, 6)])
def test_an_epoch_gives_every_image_its_crops_once(shards: list[str], lanes: int, ranks: int) -> None:
    """Nothing is skipped and nothing comes twice: by the trace of all ranks, draws of one epoch are all there are, once."""
    seen: Counter[tuple[str, int, int]] = Counter()

    def trace(key: str, epoch: int, draw: int) -> None:
        seen[key, epoch, draw] += 1

    size = 12 * lanes // ranks
    for rank in range(ranks):
        own = reader(shards, batch_size=size, rank=rank, world_size=ranks, lanes=Lanes(lanes, 12), trace=trace)
        list(islice(own, 30))
    assert set(seen.values()) == {1}
    for epoch in range(2):
        assert {(key, draw) for key, when, draw in seen if when == epoch} == {
            (f"image-{i}", d) for i in range(IMAGES) for d in range(CROPS)
        }


def test_batches_have_the_shape_and_mix_images(shards: list[str]) -> None:
    batches = list(islice(reader(shards), 15))
    assert batches[0]["image"].shape == (4, 3, 4, 4)
    assert batches[0]["image"].dtype == torch.uint8
    assert np.mean([len(set(numbers(batch))) for batch in batches]) > 3


def test_ranks_get_other_shards_in_other_epochs(shards: list[str]) -> None:
    batches = islice(reader(shards, rank=1, world_size=2), 120)
    assert {number for batch in batches for number in numbers(batch)} == set(range(IMAGES))


def test_crops_do_not_depend_on_the_number_of_lanes(shards: list[str]) -> None:
    def draws(world_size: int) -> set[tuple[int, int]]:
        ranks = (reader(shards, rank=rank, world_size=world_size) for rank in range(world_size))
        return {crop for one in ranks for batch in islice(one, 60) for crop in crops(batch)}

    alone = draws(1)
    assert len(alone & draws(5)) >= IMAGES * CROPS
    # Every crop is another one: no draw comes twice.
    assert len({draw for _, draw in alone}) == 60 * 4


def test_seeds_change_order_and_crops(shards: list[str]) -> None:
    assert same(next(reader(shards)), next(reader(shards)))
    assert not same(next(reader(shards, seed=-1)), next(reader(shards)))


def test_more_ranks_than_shards_are_refused_at_the_start_of_a_run(shards: list[str]) -> None:
    with pytest.raises(UserError, match="got 5 shards for 6 workers"):
        reader(shards, world_size=6)


def test_images_larger_than_the_memory_of_a_block_still_come(shards: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("linearsr_platform.data.lanes.BLOCK_BYTES", 1)
    batches = list(islice(reader(shards, batch_size=6), 11))
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


def test_read_images_opens_no_more_shards_than_it_needs(shards: list[str]) -> None:
    first = read_images(shards, 3)
    assert [key for key, _, _ in read_images([*shards, "gone.tar"], 3)] == [key for key, _, _ in first] == ["image-0", "image-1", "image-2"]


def test_examples_that_are_not_alike_are_named(shards: list[str]) -> None:
    def ragged(image: np.ndarray, tags: list[str], rng: np.random.Generator) -> dict[str, np.ndarray]:
        return {"image": image[: 4 + int(image[0, 0, 0]) % 2]}

    with pytest.raises(StageError, match=r"sample image-\d+: got image as uint8 \([45], 20, 3\)"):
        list(islice(reader(shards, transform=ragged), 10))


def test_memory_of_batches_is_used_again_only_when_nobody_has_them(shards: list[str]) -> None:
    stream = reader(shards)
    first = next(stream)
    kept = {name: value.clone() for name, value in first.items()}
    # A view of a tensor, a numpy view of a view: all of them keep the batch.
    views = [first["image"][1:, :, 2:].numpy()[:1], first["draw"][2:]]
    expected = [views[0].copy(), views[1].clone()]
    del first
    places = {next(stream)["image"].data_ptr() for _ in range(20)}
    assert len(places) <= 2
    assert np.array_equal(views[0], expected[0])
    assert torch.equal(views[1], expected[1])
    held = list(islice(stream, 12))
    again = reader(shards)
    assert same(next(again), kept)
    assert all(same(one, other) for one, other in zip(held, islice(again, 20, None), strict=False))
    assert len({batch["image"].data_ptr() for batch in held}) == 12
