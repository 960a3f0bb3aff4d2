"""A bundle of two experts that enlarges in milliseconds."""

from pathlib import Path

import torch
from safetensors.torch import save_file

from linearsr.bundle import save_bundle
from linearsr.config import BackboneConfig, CodecConfig, LatentStatistics, ModelConfig, SamplerConfig, TextSource
from linearsr.model import SuperResolver

TINY = ModelConfig(backbone=BackboneConfig(width=32, num_blocks=1, caption_width=8), prior="lr")
SMALLEST = ModelConfig(
    scale=2,
    codec=CodecConfig(factor=2),
    backbone=BackboneConfig(width=8, num_blocks=1, head_width=8, num_cross_heads=1, caption_width=4, stem_width=4),
    prior="lr",
)


def write_bundle(folder: Path, config: ModelConfig = TINY, *, noise: float = 0.0, text: TextSource | None = None) -> Path:
    """Write one below a folder and return where; without noise in its weights a network adds nothing to the prior."""
    ones = (1.0,) * config.codec.latent_channels
    statistics = LatentStatistics(mean=(0.0,) * len(ones), std=ones, residual_std=(0.1,) * len(ones))
    torch.manual_seed(0)
    weights = SuperResolver(config, statistics).state_dict()
    save_file(
        {name: value + noise * torch.randn_like(value) if noise else value for name, value in weights.items()}, folder / "w.safetensors"
    )
    save_bundle(
        folder / "bundle",
        config=config,
        statistics=statistics,
        boundaries=(0.5,),
        sampler=SamplerConfig(num_steps=2, times=(1.0, 0.4)),
        expert_weights=[folder / "w.safetensors"] * 2,
        lineage={},
        text=text,
    )
    return folder / "bundle"
