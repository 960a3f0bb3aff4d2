"""What a DC-AE is said to take, against SANA's blocks counted by hand and against bytes that were counted while real tiles were coded."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from autoencoders import SANA, SMALL, write_autoencoder

from linearsr.codec import make_codec
from linearsr.codec_memory import CodecMemory
from linearsr.config import CodecConfig
from linearsr.live_bytes import LiveBytes

NARROW = {
    **SMALL,
    # Narrow where a pixel is a pixel: the widest points lie in the attention of the stages below.
    "encoder_block_out_channels": (4, 16, 64, 256, 512, 512),
    "decoder_block_out_channels": (4, 16, 64, 256, 512, 512),
    "encoder_qkv_multiscales": ((), (), (), (3, 5), (5,), (5,)),
    "decoder_qkv_multiscales": ((), (), (), (3, 5), (5,), (5,)),
}
IMAGENET = {
    **SMALL,
    # As dc-ae-f32c32-in-1.0: the first stage has no blocks, the upper ones have other norms.
    "encoder_layers_per_block": (0, 2, 2, 1, 1, 1),
    "decoder_layers_per_block": (0, 2, 3, 1, 1, 1),
    "decoder_norm_types": ("batch_norm",) * 3 + ("rms_norm",) * 3,
    "decoder_act_fns": ("relu",) * 3 + ("silu",) * 3,
}
RESAMPLED = {**SMALL, "downsample_block_type": "Conv", "upsample_block_type": "interpolate", "decoder_layers_per_block": (2,) * 6}


def test_live_bytes_are_those_of_tensors_made_inside_that_are_not_yet_gone() -> None:
    outside = torch.zeros(1000)
    with LiveBytes() as counted:
        first = outside + 1
        view = first.view(10, 100)[2:]
        assert counted.live == 4000
        outside.add_(1)
        second = torch.cat([first, first]).double()
        assert (counted.live, counted.peak) == (4000 + 16000, 4000 + 8000 + 16000)
        del first
        assert counted.live == 20000
        del view
        assert counted.live == 16000
        del second
    assert (counted.live, counted.peak) == (0, 28000)


def test_sanas_is_what_its_blocks_take_counted_by_hand() -> None:
    memory = CodecMemory.counted(SANA, 32)
    pixels = 32**2 * 4
    # The last norm of a residual block: its input, what it norms, two steps of the norm, of 128 channels each, and two numbers of a
    # pixel's variance; beside it the stage's own input, 256 channels at half the side in the decoder, 128 at full side in the encoder.
    assert memory.decode_bytes == pytest.approx((4 * 128 + 256 / 4 + 2) * pixels, rel=0.005)
    assert memory.encode_bytes == pytest.approx((5 * 128 + 2) * pixels, rel=0.005)
    # The file on the hub has 1.25 GB.
    assert memory.weight_bytes == 312_250_275 * 4
    assert memory.decode((32, 32)) == 1024 * memory.decode_bytes
    # 64 positions a side are three tiles of 27, put into a picture of 2048 px.
    assert memory.decode((64, 64)) == 27**2 * memory.decode_bytes + 2048**2 * 3 * 4
    assert memory.encode((64, 20)) == 27 * 20 * memory.encode_bytes


@pytest.mark.parametrize("settings", [SMALL, NARROW, IMAGENET, RESAMPLED], ids=["small", "narrow", "imagenet", "resampled"])
@pytest.mark.parametrize("grid", [(8, 8), (5, 7), (11, 6)], ids=str)
def test_a_real_tile_takes_what_it_is_said_to(tmp_path, settings, grid) -> None:
    config = CodecConfig(kind="dc-ae", factor=32, source=str(write_autoencoder(tmp_path / "dcae", settings)), tile=8)
    memory, codec = CodecMemory.of(config), make_codec(config)
    pixels, latent = torch.rand(1, 3, 32 * grid[0], 32 * grid[1]), torch.rand(1, 32, *grid)
    with LiveBytes() as loaded:
        codec.decode(latent[..., :1, :1])
    assert memory.weight_bytes == pytest.approx(loaded.live, rel=0.001)
    with torch.inference_mode(), LiveBytes() as decoded:
        codec.decode(latent)
    with torch.inference_mode(), LiveBytes() as encoded:
        codec.encode(pixels)
    assert memory.decode(grid) == pytest.approx(decoded.peak, rel=0.02)
    assert memory.encode(grid) == pytest.approx(encoded.peak, rel=0.02)


def test_an_embedded_codec_takes_nothing() -> None:
    assert CodecMemory.of(CodecConfig(factor=8)) is None
