"""`linearsr import-sana` and `linearsr export`: from diffusers' folder to a network that trains, and back."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from linearsr.bundle import save_bundle
from linearsr.conditioning import TextEmbedding
from linearsr.config import BackboneConfig, CodecConfig, LatentStatistics, ModelConfig, SamplerConfig, TagsConfig
from linearsr.model import SuperResolver
from linearsr.sana import read_network
from linearsr_platform.cli.app import app

diffusers = pytest.importorskip("diffusers", reason="the extra `sana`")


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, list(map(str, arguments)))
    return result.exit_code, result.output


@pytest.fixture
def sana(tmp_path: Path) -> Path:
    model = diffusers.SanaTransformer2DModel(
        in_channels=3072, out_channels=3072, num_attention_heads=2, attention_head_dim=4, num_layers=1, num_cross_attention_heads=2,
        cross_attention_head_dim=4, cross_attention_dim=8, caption_channels=6,
    )  # fmt: skip
    model.save_pretrained(tmp_path / "sana")
    return tmp_path / "sana"


def config(encoder: str) -> ModelConfig:
    """Of a network with the fixture's shape, on a codec whose latents are of its 3072 channels."""
    backbone = BackboneConfig(width=8, num_blocks=1, head_width=4, num_cross_heads=2, caption_width=6, stem_width=4)
    tags = TagsConfig(vocabulary=("cat",), encoder=encoder)  # type: ignore[arg-type]
    return ModelConfig(codec=CodecConfig(factor=32), backbone=backbone, tags=tags)


STATISTICS = LatentStatistics(mean=(0.0,) * 3072, std=(1.0,) * 3072, residual_std=(0.1,) * 3072)


def test_an_imported_network_is_the_start_of_a_model_and_comes_back_bit_for_bit(tmp_path: Path, sana: Path) -> None:
    code, output = run("import-sana", sana, tmp_path / "ours", "--stem-width", 4)
    assert code == 0, output
    assert "1 blocks, 8 wide" in output
    assert read_network(tmp_path / "ours").shape == config("text").backbone

    model = SuperResolver(config("text"), STATISTICS)
    model.load_state_dict(load_file(tmp_path / "ours" / "network.safetensors"))
    text = TextEmbedding(torch.randn(1, 3, 6), torch.ones(1, 3, dtype=torch.bool))
    assert model(torch.randn(1, 3072, 1, 1), torch.tensor([0.5]), torch.rand(1, 3, 8, 8), text).shape == (1, 3072, 1, 1)

    code, output = run("export", tmp_path / "ours", tmp_path / "back")
    assert code == 0, output
    name = "diffusion_pytorch_model.safetensors"
    before, after = load_file(sana / name), load_file(tmp_path / "back" / name)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_an_expert_of_a_bundle_is_exported_with_what_diffusers_has_no_place_for(tmp_path: Path) -> None:
    experts = [SuperResolver(config("learned"), STATISTICS) for _ in range(2)]
    paths = [tmp_path / f"{index}.safetensors" for index in range(2)]
    for expert, path in zip(experts, paths, strict=True):
        save_file(expert.state_dict(), path)
    save_bundle(
        tmp_path / "bundle", config=config("learned"), statistics=STATISTICS, boundaries=(0.5,), sampler=SamplerConfig(),
        expert_weights=paths, lineage={},
    )  # fmt: skip
    code, output = run("export", tmp_path / "bundle", tmp_path / "out", "--expert", 2)
    assert code == 0, output
    assert "stem, tags" in output
    model = diffusers.SanaTransformer2DModel.from_pretrained(tmp_path / "out")
    assert torch.equal(model.proj_out.weight, experts[1].network.head.weight)
    assert model.config.in_channels == 3072 + 4


def test_mistakes_are_told_in_one_sentence(tmp_path: Path, sana: Path) -> None:
    for arguments, message in [
        (("import-sana", tmp_path / "nowhere", tmp_path / "x"), "expected JSON"),
        (("import-sana", sana, sana), "exists already"),
        (("import-sana", sana, tmp_path / "x", "--scale", 3), "--scale: got 3"),
        (("export", sana, tmp_path / "x", "--format", "onnx"), "--format: got 'onnx'"),
        (("export", sana, tmp_path / "x"), "bundle.json"),
    ]:
        code, output = run(*arguments)
        assert code == 2, output
        assert message in output
        assert not (tmp_path / "x").exists()


def test_a_recipe_is_refused_before_it_starts_when_the_weights_to_start_from_are_not_there(tmp_path: Path) -> None:
    smoke = Path(__file__).parents[2] / "pipelines" / "smoke.yaml"
    code, output = run("run", smoke, "--set", f"storage={tmp_path}", "--set", f"model.init_weights={tmp_path}/network.safetensors")
    assert code == 2
    assert "expected a safetensors file; fix: write one with `linearsr import-sana`" in " ".join(output.split())
    assert not (tmp_path / "smoke").exists()
