"""The real network under ZeRO 3: weights are only whole inside of a call, and workers whose captions differ read them in different ways.

The file is also the worker: `python test_sharded_network.py FOLDER RANK WORLD_SIZE STAGE`.
"""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from process_group import be_worker, run_group

from linearsr.attention import CrossAttention, KeyValue
from linearsr.config import BackboneConfig, LatentStatistics, ModelConfig, TagsConfig
from linearsr.model import SuperResolver

STEPS, GLOBAL_BATCH, LONGEST = 3, 4, 24


class NetworkTask:
    """Fits the network to random targets; noise levels and targets come with the batch."""

    def build(self) -> nn.Module:
        torch.manual_seed(5)
        tags = TagsConfig(vocabulary=tuple(f"tag{index}" for index in range(LONGEST)), max_tags=LONGEST)
        config = ModelConfig(backbone=BackboneConfig(width=32, num_blocks=2, caption_width=8, num_cross_heads=4), tags=tags)
        channels = (0.0,) * config.codec.latent_channels
        ones = (1.0,) * config.codec.latent_channels
        network = SuperResolver(config, LatentStatistics(mean=channels, std=ones, residual_std=ones))
        nn.init.normal_(network.network.head.weight, std=0.1)
        return network

    def loss(self, module: nn.Module, batch: dict[str, Tensor], _: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        return (module(batch["z"], batch["t"], batch["lr"], batch["tags"]) - batch["z"]).square().mean(), {}

    def validate(self, module: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"error": (module(batch["z"], batch["t"], batch["lr"], batch["tags"]) - batch["z"]).square().mean(dim=(1, 2, 3))}


def share(step: int, rank: int, world: int) -> dict[str, Tensor]:
    """Return a worker's samples: those of the first half of the global batch have two tags, the others as many as there are."""
    generator = torch.Generator().manual_seed(step)
    tags = torch.arange(1, LONGEST + 1).repeat(GLOBAL_BATCH, 1)
    tags[: GLOBAL_BATCH // 2, 2:] = 0
    batch = {
        "z": torch.randn(GLOBAL_BATCH, 48, 6, 8, generator=generator),
        "t": torch.rand(GLOBAL_BATCH, generator=generator),
        "lr": torch.rand(GLOBAL_BATCH, 3, 6, 8, generator=generator),
        "tags": tags,
    }
    size = GLOBAL_BATCH // world
    return {name: value[rank * size : (rank + 1) * size] for name, value in batch.items()}


def work(folder: Path, rank: int, world: int, arguments: list[str]) -> None:
    from linearsr_platform.recipe.train_schema import TrainConfig, ZeroConfig
    from linearsr_platform.train.engine import DeepSpeedEngine

    ways: list[bool] = []
    decide = CrossAttention.absorbs

    def noted(cross: CrossAttention, caption: KeyValue, num_tokens: int) -> bool:
        ways.append(decide(cross, caption, num_tokens))
        return ways[-1]

    CrossAttention.absorbs = noted  # type: ignore[method-assign]
    # No parameter is small enough to stay whole on every worker.
    zero = ZeroConfig(stage=int(arguments[0]), extra={"zero_optimization": {"stage3_param_persistence_threshold": 0}})
    config = TrainConfig(max_steps=STEPS, batch_size=GLOBAL_BATCH, workers=world, zero=zero)
    engine = DeepSpeedEngine(NetworkTask(), config, seed=0)
    losses, errors = [], []
    for step in range(STEPS):
        losses.append(float(engine.train_step([share(step, rank, world)], lr=1e-3).loss))
        # Without a gradient a CPU takes another way through the same modules.
        errors.append(engine.validate(share(step, rank, world))["error"].tolist())
    weights = {name: float(value.norm()) for name, value in engine.full_weights().items()}
    engine.close()
    (folder / f"{world}-{rank}.json").write_text(
        json.dumps({"losses": losses, "errors": errors, "weights": weights, "absorbed": sorted(set(ways))})
    )


def run_workers(folder: Path, world: int, stage: int) -> list[dict]:
    run_group(__file__, folder, world, [str(stage)])
    return [json.loads((folder / f"{world}-{rank}.json").read_text()) for rank in range(world)]


@pytest.mark.distributed
def test_two_workers_with_captions_of_other_lengths_learn_what_one_without_shards_does(tmp_path: Path) -> None:
    (alone,) = run_workers(tmp_path, 1, 0)
    together = run_workers(tmp_path, 2, 3)
    assert [worker["absorbed"] for worker in together] == [[True], [False]]
    means = [sum(losses) / 2 for losses in zip(*(worker["losses"] for worker in together), strict=True)]
    assert means == pytest.approx(alone["losses"], rel=1e-5)
    errors = [first + second for first, second in zip(*(worker["errors"] for worker in together), strict=True)]
    torch.testing.assert_close(torch.tensor(errors), torch.tensor(alone["errors"]), rtol=1e-5, atol=0)
    assert together[0]["weights"] == pytest.approx(alone["weights"], rel=1e-5)


if __name__ == "__main__":
    be_worker(work)
