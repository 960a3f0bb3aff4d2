"""Where the time of `linearsr upscale` goes, what residency and tiles cost, and what fits into memory by the plan.

    python tests/benchmarks/upscale.py --rounds 5

The network has the quickstart's size and random weights: time does not depend on them. Variants are interleaved, one thread;
each number is CPU time, the median over the rounds.
"""

import argparse
import statistics
import sys
import tempfile
from pathlib import Path
from time import process_time

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from autoencoders import SANA

from linearsr.backbone import Backbone
from linearsr.bundle import Bundle, save_bundle
from linearsr.codec_memory import CodecMemory
from linearsr.config import BACKBONES, BackboneConfig, CodecConfig, LatentStatistics, ModelConfig, SamplerConfig
from linearsr.enlarge import Enlargement
from linearsr.experts import bisect_boundaries
from linearsr.memory import MemoryModel
from linearsr.model import SuperResolver
from linearsr.timing import Stopwatch
from linearsr_platform.stages.picture_work import Job
from linearsr_platform.stages.upscaling import Machine, UpscaleRun

TIMES = (1.0, 0.93, 0.87, 0.05)
VARIANTS = {
    "whole, all experts": {},
    "whole, one expert": {"residency": "one"},
    "tiles of 128, all experts": {"tile": 128},
    "whole, all experts, wavelet": {"colour_fix": "wavelet"},
}


def make_bundle(folder: Path) -> Bundle:
    backbone = BackboneConfig(width=64, num_blocks=2, ffn_ratio=2.0, caption_width=32, num_cross_heads=4)
    config = ModelConfig(backbone=backbone, prior="lr")
    statistics_ = LatentStatistics(mean=(0.0,) * 48, std=(0.5,) * 48, residual_std=(0.1,) * 48)
    paths = []
    for index in range(4):
        torch.manual_seed(index)
        paths.append(folder / f"{index}.safetensors")
        save_file(SuperResolver(config, statistics_).state_dict(), paths[-1])
    return save_bundle(
        folder / "bundle",
        config=config,
        statistics=statistics_,
        boundaries=bisect_boundaries(),
        sampler=SamplerConfig(num_steps=len(TIMES), times=TIMES),
        expert_weights=paths,
        lineage={},
    )


def measure(bundle: Bundle, job: Job, settings: dict) -> dict[str, tuple[int, float]]:
    """Return count and CPU milliseconds of every part of the second picture: the first warms up."""
    settings = dict(settings)
    request = Enlargement(colour_fix=settings.pop("colour_fix", "none"))
    watch = Stopwatch(clock=process_time)
    run = UpscaleRun(bundle, request, Machine(torch.device("cpu"), 10**11, settings.get("residency", "all"), settings.get("tile")), watch)
    run.enlarge(job)
    before, _ = watch.report()
    start = {one.name: (one.count, one.seconds) for one in before}
    run.enlarge(job)
    after, _ = watch.report()
    parts = {one.name: (one.count - start[one.name][0], 1000 * (one.seconds - start[one.name][1])) for one in after}
    parts["other"] = (1, parts["other"][1])
    return {name: part for name, part in parts.items() if name != "load"}


def time_table(bundle: Bundle, folder: Path, rounds: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).resize((256, 256), Image.Resampling.BICUBIC).save(folder / "in.png")
    job = Job(str(folder / "in.png"), str(folder / "out.png"))
    measured: dict[str, list[dict[str, tuple[int, float]]]] = {name: [] for name in VARIANTS}
    for _ in range(rounds):
        for name, settings in VARIANTS.items():
            measured[name].append(measure(bundle, job, settings))
    rows = list(dict.fromkeys(part for runs in measured.values() for part in runs[0]))
    print("| part | count |" + "".join(f" {name}, ms |" for name in VARIANTS))
    print("|---|---|" + "---|" * len(VARIANTS))
    for part in rows:
        values = [statistics.median(run[part][1] for run in runs) for runs in measured.values()]
        count = measured["whole, all experts"][0][part][0]
        print(f"| {part} | {count} |" + "".join(f" {value:.1f} |" for value in values))
    totals = [statistics.median(sum(ms for _, ms in run.values()) for run in runs) for runs in measured.values()]
    print("| total | |" + "".join(f" {value:.1f} |" for value in totals))


def memory_table() -> None:
    print("\n| network | latent | weights, GB | 8 GB | 16 GB | 24 GB | 80 GB |")
    print("|---|---|---|---|---|---|---|")
    sana = CodecConfig(kind="dc-ae", factor=32, source="dc-ae")
    for name, codec in (
        ("nano", CodecConfig(factor=4)),
        ("tiny", CodecConfig(factor=8)),
        ("sana-600m", CodecConfig(factor=32)),
        ("sana-1600m", CodecConfig(factor=32)),
        ("sana-600m", sana),
        ("sana-1600m", sana),
    ):
        config = ModelConfig(backbone=BACKBONES[name], codec=codec, prior="lr")
        with torch.device("meta"):
            network = Backbone(
                config.backbone, latent_channels=codec.latent_channels, lr_pixels_per_token=config.lr_pixels_per_token, num_tags=0
            )
        model = MemoryModel(
            config=config,
            num_experts=4,
            expert_parameters=sum(one.numel() for one in network.parameters()),
            dtype_bytes=2,
            device_type="cuda",
            codec=CodecMemory.counted(SANA, codec.tile) if codec.kind == "dc-ae" else None,
        )
        cells = [f"{model.largest_whole_px(int(gb * 1e9))} / {model.largest_whole_px(int(gb * 1e9), 'one')}" for gb in (8, 16, 24, 80)]
        weights = f"{model.weights('all') / 1e9:.2f} / {model.weights('one') / 1e9:.2f}"
        latent = f"f{codec.factor}, {codec.latent_channels} channels" + (", DC-AE" if codec.kind == "dc-ae" else "")
        print(f"| {name} | {latent} | {weights} | {' | '.join(cells)} |")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name:
        time_table(make_bundle(Path(name)), Path(name), parser.parse_args().rounds)
    memory_table()
