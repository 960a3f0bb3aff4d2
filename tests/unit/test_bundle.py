"""Bundles: what is written is read back, and nothing damaged, foreign or half-written is accepted."""

import hashlib
import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file

from linearsr.bundle import BundleError, load_bundle, save_bundle
from linearsr.codec_source import codec_digest
from linearsr.config import BackboneConfig, CodecConfig, LatentStatistics, ModelConfig, SamplerConfig, TagsConfig

CONFIG = ModelConfig(
    scale=2,
    codec=CodecConfig(kind="space_to_depth", factor=4),
    backbone=BackboneConfig(width=32, num_blocks=1, head_width=16, num_cross_heads=2, caption_width=8, stem_width=4),
    tags=TagsConfig(vocabulary=("cat", "räksmörgås"), max_tags=3),
    prior="lr",
)
STATISTICS = LatentStatistics(mean=(0.1,) * 48, std=(0.3,) * 48, residual_std=(0.5,) * 48)
SAMPLER = SamplerConfig(kind="dpm++2m", num_steps=2, times=(1.0, 0.25), guidance_scale=1.5, temperature=0.5)
LINEAGE = {"recipe": "abc", "knee_steps": [100, 150], "parents": []}


@pytest.fixture
def weights(tmp_path):
    paths = [tmp_path / f"weights-{index}.safetensors" for index in range(2)]
    for index, path in enumerate(paths):
        save_file({"w": torch.full((3,), float(index))}, path)
    return paths


def save(folder, weights, **changes):
    settings = {
        "config": CONFIG,
        "statistics": STATISTICS,
        "boundaries": (0.875,),
        "sampler": SAMPLER,
        "expert_weights": weights,
        "lineage": LINEAGE,
        "precision": "bfloat16",
    }
    return save_bundle(folder, **{**settings, **changes})


@pytest.fixture
def folder(tmp_path, weights):
    save(tmp_path / "bundle", weights)
    return tmp_path / "bundle"


def rewrite(folder, change):
    """Edit bundle.json as an intruder or an older program would."""
    content = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))
    change(content)
    (folder / "bundle.json").write_text(json.dumps(content), encoding="utf-8")


def test_a_bundle_reads_back_equal(folder, weights):
    bundle = load_bundle(folder)
    assert (bundle.config, bundle.statistics, bundle.sampler) == (CONFIG, STATISTICS, SAMPLER)
    assert (bundle.boundaries, bundle.precision, bundle.lineage) == ((0.875,), "bfloat16", LINEAGE)
    assert [path.read_bytes() for path in bundle.experts] == [path.read_bytes() for path in weights]
    assert bundle.digest == hashlib.sha256((folder / "bundle.json").read_bytes()).hexdigest()
    assert sorted(path.name for path in folder.iterdir()) == ["bundle.json", "expert-1.safetensors", "expert-2.safetensors"]


def test_the_digest_names_the_content(tmp_path, weights, folder):
    assert save(tmp_path / "same", weights).digest == load_bundle(folder).digest
    assert save(tmp_path / "sampler", weights, sampler=replace(SAMPLER, temperature=0.4)).digest != load_bundle(folder).digest
    assert save(tmp_path / "order", weights[::-1]).digest != load_bundle(folder).digest


def test_kept_history_is_in_the_manifest_and_dropped_history_changes_no_digest(tmp_path, weights, folder):
    """Bundles from before there was a choice have no such key, and are what is written without one."""
    plain = json.loads((folder / "bundle.json").read_text(encoding="utf-8"))["sampler"]
    assert set(plain) == {"kind", "num_steps", "guidance_scale", "temperature", "times", "grid"}
    assert load_bundle(folder).sampler.history == "drop"
    kept = save(tmp_path / "kept", weights, sampler=replace(SAMPLER, history="keep"))
    assert kept.sampler == replace(SAMPLER, history="keep")
    assert kept.digest != load_bundle(folder).digest


@pytest.mark.parametrize("damage", ["flip", "cut", "remove", "swap"])
def test_a_changed_expert_is_refused_by_name(folder, damage):
    victim, other = folder / "expert-2.safetensors", folder / "expert-1.safetensors"
    data = bytearray(victim.read_bytes())
    if damage == "flip":
        data[-1] ^= 1
        victim.write_bytes(data)
    elif damage == "cut":
        victim.write_bytes(data[:-4])
    elif damage == "remove":
        victim.unlink()
    else:
        victim.write_bytes(other.read_bytes())
    with pytest.raises(BundleError, match=r"expert-2\.safetensors: got .*; expected .*; fix:"):
        load_bundle(folder)


CHANGES = {
    "another format": (lambda c: c.update(format="linearsr-bundle/99"), "linearsr-bundle/99"),
    "unknown key": (lambda c: c.update(extra=1), "extra"),
    "missing key": (lambda c: c.pop("sampler"), "sampler"),
    "unknown setting": (lambda c: c["config"]["codec"].update(latent=4), "latent"),
    "impossible setting": (lambda c: c["config"].update(scale=3), "model.scale"),
    "boundaries out of order": (lambda c: c.update(boundaries=[1.5]), "experts.boundaries"),
    "one boundary too many": (lambda c: c.update(boundaries=[0.5, 0.875]), "expert-3.safetensors"),
    "foreign file": (lambda c: c["files"].update({"../../secret": "0"}), "secret"),
    "unknown precision": (lambda c: c.update(precision="fp4"), "fp4"),
    "list for a mapping": (lambda c: c.update(statistics=[1]), "bundle.json"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_foreign_manifest_is_refused_with_what_is_wrong(folder, name):
    change, expected = CHANGES[name]
    rewrite(folder, change)
    with pytest.raises(BundleError, match=expected) as caught:
        load_bundle(folder)
    assert str(folder / "bundle.json") in str(caught.value)
    assert "fix:" in str(caught.value)


def test_a_bundle_from_before_codecs_were_recorded_loads(folder):
    digest = load_bundle(folder).codec_digest
    assert digest == codec_digest(CONFIG.codec)
    rewrite(folder, lambda content: (content.pop("codec"), content["config"].update(codec={"kind": "space_to_depth", "factor": 4})))
    old = load_bundle(folder)
    assert (old.config, old.codec_digest) == (CONFIG, digest)
    rewrite(folder, lambda content: content["config"].update(codec={"kind": "dc-ae", "factor": 32, "source": "gone"}))
    with pytest.raises(BundleError, match="codec: got no hash"):
        load_bundle(folder)


def test_a_bundle_of_another_version_of_the_codec_is_refused(folder):
    digest = load_bundle(folder).codec_digest
    rewrite(folder, lambda content: content.update(codec="0" * 64))
    with pytest.raises(BundleError, match=f"space_to_depth, factor 4: got SHA-256 {digest}; expected {'0' * 64}; fix:"):
        load_bundle(folder)


def test_what_is_no_bundle_is_refused(tmp_path):
    with pytest.raises(BundleError, match=r"bundle\.json"):
        load_bundle(tmp_path / "nowhere")
    for text in ("{", "[]", "\x80"):
        (tmp_path / "bundle.json").write_bytes(text.encode("latin-1"))
        with pytest.raises(BundleError, match=r"bundle\.json"):
            load_bundle(tmp_path)


def test_saving_fails_whole_and_overwrites_nothing(tmp_path, weights, folder):
    before = load_bundle(folder).digest
    with pytest.raises(BundleError, match="exists already"):
        save(folder, weights)
    with pytest.raises(BundleError, match="2 experts"):
        save(tmp_path / "few", weights, boundaries=(0.2, 0.8))
    with pytest.raises(BundleError, match=r"gone\.safetensors"):
        save(tmp_path / "absent", [weights[0], tmp_path / "gone.safetensors"])
    with pytest.raises(ValueError, match="JSON compliant"):
        save(tmp_path / "nan", weights, lineage={"score": float("nan")})
    with pytest.raises(TypeError):
        save(tmp_path / "object", weights, lineage={"score": object()})
    assert load_bundle(folder).digest == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "weights-0.safetensors", "weights-1.safetensors"]
