"""The training task: its loss is flow matching, its validation starts where the expert's interval does, and it learns."""

import pickle

import numpy as np
import pytest
import torch

from linearsr.config import AugmentationConfig, BackboneConfig, DegradationConfig, FlowConfig, LatentStatistics, ModelConfig, TagsConfig
from linearsr.degradation import upsample
from linearsr.flow import sample_times
from linearsr.metrics import Meter
from linearsr.task import SuperResolutionTask, to_pixels
from linearsr.task_config import TaskConfig

IMAGE = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8).repeat(4, axis=0).repeat(4, axis=1)


def make_task(prior: str = "lr", interval: tuple[float, float] = (0.0, 1.0), **flow: object) -> SuperResolutionTask:
    model = ModelConfig(
        backbone=BackboneConfig(width=32, num_blocks=1, caption_width=8),
        flow=FlowConfig(**flow),  # type: ignore[arg-type]
        tags=TagsConfig(vocabulary=("cat",), max_tags=2),
        prior=prior,  # type: ignore[arg-type]
    )
    statistics = LatentStatistics(mean=(0.0,) * 48, std=(0.5,) * 48, residual_std=(0.4,) * 48)
    return SuperResolutionTask(
        TaskConfig(
            model=model,
            statistics=statistics,
            interval=interval,
            degradation=DegradationConfig(),
            augmentation=AugmentationConfig(),
            crop_px=32,
            validation_steps=1,
            metrics=("psnr_y",),
        )
    )


def batch_of(task: SuperResolutionTask, count: int = 4) -> dict[str, torch.Tensor]:
    examples = [task.transform(IMAGE, ["cat"], np.random.default_rng(index)) for index in range(count)]
    return {name: torch.from_numpy(np.stack([example[name] for example in examples])) for name in examples[0]}


def test_examples_are_deterministic_pairs() -> None:
    task = make_task()
    first, second = (task.transform(IMAGE, ["cat"], np.random.default_rng(5)) for _ in range(2))
    assert {name: (value.shape, value.dtype) for name, value in first.items()} == {
        "hr": ((3, 32, 32), np.uint8),
        "lr": ((3, 8, 8), np.uint8),
        "tags": ((2,), np.int64),
    }
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_a_task_travels_without_the_networks_of_its_metrics() -> None:
    """Loader processes get its `transform` when validation may have made them; on a GPU each process would start CUDA for them."""
    task = make_task()
    before = pickle.dumps(task.transform)
    task._meter = Meter(("psnr_y",), "quickstart", None)
    assert pickle.dumps(task.transform) == before
    assert pickle.loads(before).__self__.config == task.config


def test_without_a_prior_the_loss_is_the_velocity_error() -> None:
    task = make_task("none")
    module, batch = task.build(), batch_of(task)
    torch.nn.init.normal_(module.network.head.weight, std=0.1)
    loss, _ = task.loss(module, batch, torch.Generator().manual_seed(3))

    generator = torch.Generator().manual_seed(3)
    clean = module.space.encode(to_pixels(batch["hr"]))
    t = sample_times(4, (0.0, 1.0), task.config.model.flow, generator)
    noise = torch.randn(clean.shape, generator=generator)
    keep = torch.rand(4, 1, generator=generator) >= 0.1
    level = t[:, None, None, None]
    conditioning = module.network.prepare(to_pixels(batch["lr"]), batch["tags"] * keep)
    velocity = module.network((1 - level) * clean + level * noise, t, conditioning)
    torch.testing.assert_close(loss, (velocity - (noise - clean)).square().mean(), rtol=1e-4, atol=0)


def test_pixel_weighting_counts_an_error_as_it_weighs_in_the_picture() -> None:
    task = make_task(loss_weighting="pixel")
    space = task.build().space
    latent, error = torch.randn(2, 48, 4, 4), torch.randn(2, 48, 4, 4)
    std, sigma = space.std.value, space.sigma.value
    scaled = error * sigma
    in_picture = (space.codec.decode((latent + scaled) * std) - space.codec.decode(latent * std)).square().mean()
    weighted = (space.loss_weights() * error.square()).mean()
    torch.testing.assert_close(weighted * (std * sigma).square().mean(), in_picture, rtol=1e-4, atol=1e-7)


def test_validation_of_an_untrained_network_is_bicubic() -> None:
    task = make_task()
    example = task.validation_example(IMAGE, ["cat"], 64, index=0)
    batch = {name: torch.from_numpy(value)[None] for name, value in example.items()}
    measured = task.validate(task.build(), batch)["psnr_y"]
    bicubic = torch.from_numpy(upsample(np.ascontiguousarray(example["lr"].transpose(1, 2, 0)), 4).copy()).permute(2, 0, 1)[None]
    expected = Meter(("psnr_y",), "quickstart").measure(bicubic / 255, batch["hr"] / 255)["psnr_y"]
    torch.testing.assert_close(measured, expected, atol=0.05, rtol=0)


def test_an_expert_of_little_noise_starts_from_little_noise() -> None:
    values = []
    for interval in ((0.9, 1.0), (0.0, 0.2)):
        task = make_task(interval=interval)
        example = task.validation_example(IMAGE, [], 64, index=0)
        values.append(task.validate(task.build(), {name: torch.from_numpy(value)[None] for name, value in example.items()})["psnr_y"])
    assert values[1] > values[0] + 3


@pytest.mark.parametrize("prior", ["none", "lr"])
def test_a_few_steps_lower_the_loss(prior: str) -> None:
    task = make_task(prior)
    module, batch = task.build(), batch_of(task)
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)

    def loss() -> torch.Tensor:
        return task.loss(module, batch, torch.Generator().manual_seed(0))[0]

    before = loss().item()
    for _ in range(15):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.9 * before


def test_the_seed_decides_the_initial_weights() -> None:
    first, second = make_task().build().state_dict(), make_task().build().state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
