"""DC-AEs with a factor of 32 and random weights, as diffusers saves them, and SANA's settings."""

from pathlib import Path

import torch

_STAGES = ("ResBlock",) * 3 + ("EfficientViTBlock",) * 3
SANA = {
    "encoder_block_types": _STAGES,
    "decoder_block_types": _STAGES,
    "encoder_block_out_channels": (128, 256, 512, 512, 1024, 1024),
    "decoder_block_out_channels": (128, 256, 512, 512, 1024, 1024),
    "encoder_layers_per_block": (2, 2, 2, 3, 3, 3),
    "decoder_layers_per_block": (3,) * 6,
    "downsample_block_type": "Conv",
    "upsample_block_type": "interpolate",
    "scaling_factor": 0.41407,
}
"""`config.json` of mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers, what is diffusers' default left out."""
SMALL = {
    "attention_head_dim": 8,
    "encoder_block_types": _STAGES,
    "decoder_block_types": _STAGES,
    "encoder_block_out_channels": (8, 8, 16, 16, 32, 32),
    "decoder_block_out_channels": (8, 8, 16, 16, 32, 32),
    "encoder_layers_per_block": (1,) * 6,
    "decoder_layers_per_block": (1,) * 6,
    "scaling_factor": 0.41407,
}
"""The same kinds of stages, two hundred thousand weights."""


def write_autoencoder(folder: Path, settings: dict[str, object] = SMALL) -> Path:
    """Write one to a new folder and return it."""
    from diffusers.models.autoencoders.autoencoder_dc import AutoencoderDC

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        AutoencoderDC(**settings).save_pretrained(folder)
    return folder
