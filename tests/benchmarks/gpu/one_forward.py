"""Time of one forward of the published sizes on a GPU: eager, compiled, and each as a CUDA graph. Prints Markdown. Needs torch only.

Run: python tests/benchmarks/gpu/one_forward.py [--presets sana-600m sana-1600m] [--px 1024 2048 4096] [--peak-tflops 989]
     python tests/benchmarks/gpu/one_forward.py --device cpu --presets nano --px 256 --runs 3     (that the script works; no claim)

bf16, batch 1, `--tokens` caption tokens, keys and values of the caption prepared beforehand as in a sampler. A column's time is the
median of `--runs` after `--warmup`, by CUDA events. `TFLOP` counts multiplications and additions of every matrix product and
convolution; `share` is of `--peak-tflops`, an H200's or H100's dense bf16 peak unless given. `growth` is the time over that at the first
size, divided by the tokens over those at the first size: 1 is linear. `memory` is the peak of a forward beside weights. The outputs of
all four ways are compared with the eager one's. `diffusers` is its model of the same size beside ours, where it is installed.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from statistics import median
from time import perf_counter

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from linearsr.backbone import Backbone
from linearsr.conditioning import TextEmbedding
from linearsr.config import BACKBONES

PX_PER_TOKEN = 32
LATENT_CHANNELS = 32
LR_PX_PER_TOKEN = 8
WAYS = ("eager", "compiled", "eager graph", "compiled graph")
Forward = Callable[[], Tensor]


@dataclass(frozen=True)
class Measured:
    """One way of running one forward."""

    ms: float
    """Median."""
    memory_bytes: int
    """Peak beside what was allocated before."""
    output: Tensor


def build(preset: str, device: torch.device) -> Backbone:
    """Make a network with random weights, its last layer too, in bf16."""
    torch.manual_seed(0)
    with torch.device(device):
        shape = BACKBONES[preset]
        network = Backbone(shape, latent_channels=LATENT_CHANNELS, lr_pixels_per_token=LR_PX_PER_TOKEN, caption_encoder="text")
        nn.init.normal_(network.head.weight, std=0.02)
    return network.to(torch.bfloat16).eval()


def inputs(network: Backbone, px: int, tokens: int, caption_width: int) -> tuple[Tensor, Tensor, object]:
    """Return latent, noise level and what is prepared once an image, for a square picture of `px`."""
    device = network.embed.weight.device
    side = px // PX_PER_TOKEN
    generator = torch.Generator(device).manual_seed(1)
    z = torch.randn(1, LATENT_CHANNELS, side, side, device=device, generator=generator)
    lr = torch.randn(1, 3, side * LR_PX_PER_TOKEN, side * LR_PX_PER_TOKEN, device=device, generator=generator)
    values = torch.randn(1, tokens, caption_width, device=device, generator=generator)
    caption = TextEmbedding(values, torch.ones(1, tokens, dtype=torch.bool, device=device))
    return z, torch.tensor([0.7], device=device), network.prepare(lr, caption)


def measure(forward: Forward, device: torch.device, runs: int, warmup: int) -> Measured:
    """Time a forward."""
    for _ in range(warmup):
        output = forward()
    if device.type != "cuda":
        times = []
        for _ in range(runs):
            started = perf_counter()
            output = forward()
            times.append(1000 * (perf_counter() - started))
        return Measured(median(times), 0, output)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(runs)]
    for start, end in events:
        start.record()
        output = forward()
        end.record()
    torch.cuda.synchronize()
    return Measured(median(start.elapsed_time(end) for start, end in events), torch.cuda.max_memory_allocated() - before, output.clone())


def captured(forward: Forward) -> Forward:
    """Record a forward as a CUDA graph and return its replay."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            forward()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = forward()

    def replay() -> Tensor:
        graph.replay()
        return output

    return replay


def theirs(preset: str, px: int, tokens: int, device: torch.device) -> Forward | None:
    """Return a forward of diffusers' model of the same size, or None where diffusers is not installed."""
    if find_spec("diffusers") is None:
        return None
    from diffusers import SanaTransformer2DModel

    shape = BACKBONES[preset]
    with torch.device(device):
        model = SanaTransformer2DModel(
            in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, num_layers=shape.num_blocks,
            num_attention_heads=shape.width // shape.head_width, attention_head_dim=shape.head_width,
            num_cross_attention_heads=shape.num_cross_heads, cross_attention_head_dim=shape.width // shape.num_cross_heads,
            cross_attention_dim=shape.width, caption_channels=shape.caption_width, mlp_ratio=shape.ffn_ratio, patch_size=1,
        )  # fmt: skip
    model = model.to(torch.bfloat16).eval()
    side = px // PX_PER_TOKEN
    z = torch.randn(1, LATENT_CHANNELS, side, side, device=device, dtype=torch.bfloat16)
    caption = torch.randn(1, tokens, shape.caption_width, device=device, dtype=torch.bfloat16)
    time = torch.tensor([700.0], device=device)
    return lambda: model(z, encoder_hidden_states=caption, timestep=time, return_dict=False)[0]


def ways(forward: Forward, device: torch.device, *, compile_too: bool) -> dict[str, Forward]:
    """Return the ways of running a forward by name."""
    found = {"eager": forward}
    if compile_too:
        found["compiled"] = torch.compile(forward, dynamic=False, fullgraph=True)
    if device.type == "cuda":
        for name in list(found):
            found[f"{name} graph"] = captured(found[name])
    return found


@torch.inference_mode()
def row(preset: str, px: int, arguments: argparse.Namespace, first: dict[str, float]) -> bool:
    """Print one line of the table; returns whether all ways gave the same numbers."""
    device = torch.device(arguments.device)
    network = build(preset, device)
    z, t, prepared = inputs(network, px, arguments.tokens, BACKBONES[preset].caption_width)
    with FlopCounterMode(display=False) as counter:
        network(z, t, prepared)
    tflop = counter.get_total_flops() / 1e12
    tokens = (px // PX_PER_TOKEN) ** 2
    forwards = ways(lambda: network(z, t, prepared), device, compile_too=not arguments.no_compile)
    found = {name: measure(forward, device, arguments.runs, arguments.warmup) for name, forward in forwards.items()}
    best = min(found.values(), key=lambda one: one.ms)
    eager = found["eager"].output
    worst = max(float((one.output - eager).norm() / eager.norm()) for one in found.values())
    first.setdefault(preset, best.ms / tokens)
    peer = theirs(preset, px, arguments.tokens, device)
    cells = [
        *(preset, str(px), str(tokens), f"{tflop:.2f}"),
        *(f"{found[name].ms:.2f}" if name in found else "-" for name in WAYS),
        "-" if peer is None else f"{measure(peer, device, arguments.runs, arguments.warmup).ms:.2f}",
        f"{tflop / (best.ms / 1000) / arguments.peak_tflops:.0%}",
        f"{best.ms / tokens / first[preset]:.2f}",
        f"{found['eager'].memory_bytes / 1e9:.2f} GB",
        f"{worst:.0e}",
    ]
    print("| " + " | ".join(cells) + " |", flush=True)
    return worst < 2e-2


def main() -> int:
    """Measure and print; returns 1 if a way gives other numbers than the eager one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--presets", nargs="+", default=["sana-600m", "sana-1600m"], choices=list(BACKBONES))
    parser.add_argument(
        "--px", nargs="+", type=int, default=[1024, 2048, 4096], help="multiples of 32, the first one is what growth refers to"
    )
    parser.add_argument("--tokens", type=int, default=80, help="caption tokens")
    parser.add_argument("--runs", type=int, default=100)
    parser.add_argument("--warmup", type=int, default=20)
    parser.add_argument("--peak-tflops", type=float, default=989.0, help="dense bf16 peak of the device")
    parser.add_argument("--no-compile", action="store_true")
    arguments = parser.parse_args()
    if arguments.device == "cuda":
        print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    titles = ["size", "px", "tokens", "TFLOP", *(f"{name} ms" for name in WAYS), "diffusers ms", "share", "growth", "memory", "error"]
    print("| " + " | ".join(titles) + " |\n|" + "---|" * len(titles))
    first: dict[str, float] = {}
    good = [row(preset, px, arguments, first) for preset in arguments.presets for px in arguments.px]
    return int(not all(good))


if __name__ == "__main__":
    sys.exit(main())
