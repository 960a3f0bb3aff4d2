"""`linearsr shards`: every kind of damage to prepared data is found and named; what is whole is shown."""

import hashlib
import io
import json
import re
import tarfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from linearsr.codec_source import codec_digest
from linearsr.conditioning import TextEmbedding
from linearsr.config import CodecConfig, TextEncoderConfig
from linearsr_platform.cli.app import app
from linearsr_platform.data.extras import LatentMaker, TextCache
from linearsr_platform.data.images import encode_png
from linearsr_platform.data.manifest import SplitInfo, file_hash, load_manifest, write_manifest
from linearsr_platform.data.picture_shards import read_members, write_members
from linearsr_platform.data.prepare import prepare
from linearsr_platform.data.verify import verify_data_set
from linearsr_platform.recipe.data_schema import DataConfig

Members = dict[str, bytes]


class Encoder:
    """Embeds a prompt as its length, three channels wide."""

    width, max_tokens, digest = 3, 4, "an encoder"

    def encode(self, prompts: list[str]) -> TextEmbedding:
        values = torch.tensor([[[len(prompt)] * 3] * 2 for prompt in prompts]).float()
        return TextEmbedding(values, torch.ones(values.shape[:2], dtype=torch.bool))


def photo(seed: int, width: int = 96) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (64, width, 3), dtype=np.uint8)


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a data set with everything there can be, by path."""
    folder = tmp_path_factory.mktemp("original")
    (folder / "in").mkdir()
    for seed, name in enumerate(("a", "b", "c", "d", "secret")):
        Image.fromarray(photo(seed)).save(folder / f"in/{name}.png")
        label = {"tags": [f"tag {seed}", "all"], "licence": "CC0", "quality": "high" if name in "bd" else ""}
        (folder / f"in/{name}.json").write_text(json.dumps(label))
    Image.fromarray(photo(9)).save(folder / "in/e.jpg", quality=95)
    source = {"mine": {"url": str(folder / "in"), "halve_jpeg": False}}
    changes = {"held_out": ("secret",), "latents": True, "keep_jpeg": True, "samples_per_shard": 3}
    data = DataConfig.model_validate({"sources": source, "validation_px": 24, "min_side_px": 24, **changes})
    text = TextCache(TextEncoderConfig(folder="here", max_tokens=4, suffix="8k"), Encoder())
    latents = LatentMaker(CodecConfig(), codec_digest(CodecConfig()))
    prepare(data, recipe_folder=".", output_url=str(folder / "out"), text=text, latents=latents)
    out = folder / "out"
    return {str(path.relative_to(out)): path.read_bytes() for path in out.rglob("*") if path.is_file()}


@pytest.fixture
def out(original: dict[str, bytes], tmp_path: Path) -> Path:
    """A copy that may be damaged."""
    for name, content in original.items():
        path = tmp_path / "out" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return tmp_path / "out"


def rewrite(out: Path, split: str, change: Callable[[dict[str, Members]], object]) -> None:
    """Change the samples of a split's first shard, and the manifest with it: only the samples tell."""
    manifest = load_manifest(str(out))
    shard, *others = manifest.splits[split].shards
    path = str(out / shard.url)
    samples = {key: dict(members) for key, members in read_members(path)}
    change(samples)
    write_members(path, samples.items())
    told = replace(shard, bytes=Path(path).stat().st_size, sha256=file_hash(path), samples=len(samples))
    write_manifest(replace(manifest, splits={**manifest.splits, split: SplitInfo((told, *others))}), str(out))


def problems(out: Path) -> list[str]:
    return [f"{one.where}: {one.what}" for one in verify_data_set(load_manifest(str(out)), str(out)).problems]


def edit_json(members: Members, **changes: object) -> None:
    members["json"] = json.dumps(json.loads(members["json"]) | changes).encode()


def array(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def replace_picture(members: Members, pixels: np.ndarray) -> None:
    members["png"] = encode_png(pixels)
    edit_json(members, sha256=hashlib.sha256(members["png"]).hexdigest(), height_px=len(pixels), width_px=pixels.shape[1])
    members["latent.npy"] = array(np.zeros((48, len(pixels) // 4, pixels.shape[1] // 4), np.float16))


def test_what_prepare_wrote_has_no_problem(out: Path) -> None:
    result = verify_data_set(load_manifest(str(out)), str(out))
    assert result.problems == []
    assert result.shards == 2 + 2 + 1 + 1
    assert result.samples == 5 + 5 + 2 + 1


NAN = np.full((48, 16, 18), np.nan, np.float16)
DAMAGE: dict[str, tuple[Callable[[Members], object], str]] = {
    "picture": (lambda one: one.update(png=one["png"][:-20] + b"\0" * 20), "got sha256"),
    "no json": (lambda one: one.pop("json"), "got no readable json"),
    "json": (lambda one: one.update(json=b"[1"), "got no readable json"),
    "tag": (lambda one: edit_json(one, tags=["unheard"]), "got tags unheard; expected words of the manifest's vocabulary"),
    "tags": (lambda one: edit_json(one, tags="all"), "got tags 'all'; expected a list"),
    "size": (lambda one: edit_json(one, width_px=71), "got 72x64 px; expected 71x64"),
    "box": (lambda one: edit_json(one, box=[0, 0, 73, 64]), r"box \[0, 0, 73, 64\] does not lie inside 72x64"),
    "latent shape": (lambda one: one.update({"latent.npy": array(NAN[:, :15])}), r"got an array latent of shape \(48, 15, 18\)"),
    "latent": (lambda one: one.update({"latent.npy": array(NAN)}), "got an array latent with NaN"),
    "no latent": (lambda one: one.pop("latent.npy"), "array latent: got none; expected one"),
    "codec": (lambda one: edit_json(one, latent_codec="another"), "got latent_codec another; expected"),
    "text shape": (lambda one: one.update({"text.npy": array(np.zeros((5, 3), np.float16))}), r"got an array text of shape \(5, 3\)"),
    "text": (lambda one: one.update({"text.npy": b"no array"}), "got an array text that cannot be read"),
    "encoder": (lambda one: edit_json(one, text_encoder="another"), "got text_encoder another; expected an encoder"),
    "suffix": (lambda one: edit_json(one, text_suffix="8k"), "got text_suffix '8k'; expected ''"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_to_a_sample_is_found_and_nothing_else(out: Path, name: str) -> None:
    damage, message = DAMAGE[name]
    rewrite(out, "validation", lambda samples: None)
    assert problems(out) == []
    rewrite(out, "train", lambda samples: damage(samples["mine-a"]))
    found = problems(out)
    # A picture with another hash is also one that its decoder may refuse.
    assert len(found) == 1 or name == "picture", found
    assert all(line.startswith("train/00000.tar:mine-a: ") for line in found)
    assert re.search(message, found[0])


def test_held_out_pictures_in_train_are_found_by_file_and_by_pixels(out: Path) -> None:
    def leak(samples: dict[str, Members]) -> None:
        first, second, *_ = (members for members in samples.values() if "png" in members)
        # As prepare would cut it.
        replace_picture(first, photo(4)[:, :72])
        edit_json(second, file="mine/secret.png")

    rewrite(out, "train", leak)
    found = [line for line in problems(out) if line.startswith("held-out/")]
    assert len(found) == 2
    assert "got the file mine/secret.png, which is in train/00000.tar:" in found[0]
    assert "got a picture that is trained on as train/00000.tar:" in found[1]


def test_keys_are_unique_and_high_quality_is_a_part_of_train(out: Path) -> None:
    extra = dict(read_members(str(out / "train/00001.tar")))
    key = next(iter(extra))
    rewrite(out, "train", lambda samples: samples.update({key: dict(extra[key])}))
    rewrite(out, "high-quality", lambda samples: samples.update({"stranger": dict(extra[key])}))
    assert sorted(problems(out)) == [
        "high-quality/00000.tar:stranger: got a sample that is not in train as it is; expected a part of train",
        f"train/00001.tar:{key}: got a key that another sample of 'train' has; expected one of its own",
    ]


def test_every_damaged_shard_is_named_by_the_command(out: Path) -> None:
    run = CliRunner().invoke
    assert run(app, ["shards", "verify", str(out)]).exit_code == 0
    (out / "validation/00001.tar").unlink()
    whole = (out / "train/00000.tar").read_bytes()
    (out / "train/00000.tar").write_bytes(whole[:6000])
    (out / "train/00001.tar").write_bytes(whole)
    failed = run(app, ["shards", "verify", str(out)])
    assert failed.exit_code == 1
    for shard in ("train/00000.tar: got 6000 bytes", "train/00001.tar: got", "validation/00001.tar: got no such file"):
        assert shard in failed.output
    told = json.loads(run(app, ["shards", "verify", str(out), "--json"]).stdout)
    assert told["ok"] is False
    assert {"where": "validation/00001.tar", "what": "got no such file; expected it, as the manifest names it"} in told["problems"]
    for other in ("train", "train/00000.tar"):
        refused = run(app, ["shards", "verify", str(out / other)])
        assert (refused.exit_code, "expected the manifest" in " ".join(refused.output.split())) == (2, True), refused.output


def test_show_tells_what_is_there_and_draws_it(out: Path, tmp_path: Path) -> None:
    shown = CliRunner().invoke(app, ["shards", "show", str(out), "--sheet", str(tmp_path / "sheet.png"), "--limit", "4"])
    assert shown.exit_code == 0, shown.output
    for text in ("train", "72x64", "CC0 5", "not given 1", "all 4", "48 channels", "an encoder", "4 pictures on"):
        assert text in shown.output
    with Image.open(tmp_path / "sheet.png") as sheet:
        # Four thumbnails side by side, full of noise, over names.
        pixels = np.asarray(sheet.convert("L")).astype(float)
    assert pixels.shape[1] > 4 * 150
    columns = pixels[:200].std(axis=0) > 20
    assert np.count_nonzero(np.diff(columns.astype(int)) == 1) == 4
    missing = CliRunner().invoke(app, ["shards", "show", str(out), "--split", "best"])
    assert missing.exit_code == 2
    assert "expected one with samples: train" in missing.output


def test_show_takes_any_webdataset_tar(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "x.tar", "w") as tar:
        for name, content in (("a.png", encode_png(photo(1))), ("a.cls", b"3"), ("b.png", encode_png(photo(2))), ("b.cls", b"4")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    for url in (tmp_path / "x.tar", tmp_path):
        shown = CliRunner().invoke(app, ["shards", "show", str(url), "--sheet", str(tmp_path / "sheet.png")])
        assert shown.exit_code == 0, shown.output
        for text in ("KEY.png", "KEY.cls", "2 samples in 1 tars", "2 pictures on"):
            assert text in shown.output
