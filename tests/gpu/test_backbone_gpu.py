"""The network on a GPU gives what it gives on the CPU, in float32 and, within its rounding, in bfloat16. Needs torch and pytest only."""

import pytest
import torch

from linearsr.backbone import Backbone
from linearsr.conditioning import TextEmbedding
from linearsr.config import BackboneConfig

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def network() -> Backbone:
    torch.manual_seed(0)
    shape = BackboneConfig(width=128, num_blocks=3, num_cross_heads=4, caption_width=48)
    made = Backbone(shape, latent_channels=8, lr_pixels_per_token=4, caption_encoder="text").eval()
    torch.nn.init.normal_(made.head.weight, std=0.02)
    return made


@torch.inference_mode()
def run(made: Backbone, device: str, dtype: torch.dtype, *, compiled: bool = False) -> torch.Tensor:
    made = made.to(device=device, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    z, lr, values = (torch.randn(shape, generator=generator) for shape in ((2, 8, 9, 12), (2, 3, 36, 48), (2, 7, 48)))
    mask = torch.arange(7) < torch.tensor([[3], [7]])
    captions = TextEmbedding(values.to(device), mask.to(device))
    forward = torch.compile(made, fullgraph=True) if compiled else made
    return forward(z.to(device), torch.tensor([0.2, 0.9], device=device), made.prepare(lr.to(device), captions)).float().cpu()


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-4), (torch.bfloat16, 3e-2)])
def test_a_gpu_agrees_with_the_cpu(dtype: torch.dtype, error: float, compiled: bool) -> None:
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    expected = run(network(), "cpu", torch.float32)
    assert (run(network(), "cuda", dtype, compiled=compiled) - expected).norm() / expected.norm() < error
