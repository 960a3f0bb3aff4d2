"""How much checkpoints suffer from noise on their weights: the paper's reason why fine-tuning from beyond the knee should fail.

Source: method.md 4.5 (vii); Springer et al. 2025 (2503.19206), sensitivity of parameters grows with the length of pre-training.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import torch
from real_training import Data, Probe
from safetensors.torch import load_file

from linearsr_platform.train.loop import SNAPSHOT_FOLDER

SETS = ("strips", "photographs")

RELATIVE = (1e-2, 3e-2)
"""Standard deviation of the noise on a tensor, relative to the root mean square of its weights."""
DRAWS = 4


def fragility(probe: Probe, weights: Mapping[str, torch.Tensor], which: str) -> dict[float, float]:
    """Return for each of `RELATIVE` the rise of `val_loss` under noise, averaged over `DRAWS` draws, as a share of the loss."""
    before = probe.measure(weights, which)["val_loss"]
    rises = {}
    for relative in RELATIVE:
        losses = []
        for draw in range(DRAWS):
            generator = torch.Generator().manual_seed(draw)
            losses.append(
                probe.measure({name: _shaken(weight, relative, generator) for name, weight in weights.items()}, which)["val_loss"]
            )
        rises[relative] = float(np.mean(losses)) / before - 1
    return rises


def _shaken(weight: torch.Tensor, relative: float, generator: torch.Generator) -> torch.Tensor:
    if not weight.is_floating_point():
        return weight
    scale = relative * weight.square().mean().sqrt()
    return weight + scale * torch.randn(weight.shape, generator=generator)


def comparison(data: Data, work: Path, starts: Mapping[str, Mapping[str, int]]) -> Iterator[str]:
    """Yield the lines of a table: the fragility of each run's knee and of its last checkpoint."""
    probe = Probe(data, SETS)
    yield "| run | checkpoint | " + " | ".join(f"{which}, noise {relative:g}" for which in SETS for relative in RELATIVE) + " |"
    yield "|---" * (2 + len(SETS) * len(RELATIVE)) + "|"
    for run, steps in starts.items():
        for name in ("knee", "last"):
            weights = load_file(work / run / SNAPSHOT_FOLDER / f"step_{steps[name]:08d}.safetensors")
            cells = [f"{rise:+.3%}" for which in SETS for rise in fragility(probe, weights, which).values()]
            yield f"| {run} | {name} {steps[name]} | " + " | ".join(cells) + " |"
