"""What a GPU would do with the code's branches for it: the CPU's numbers, with nothing copied to it, or waited for, on the way."""

import pickle
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from linearsr.bundle import save_bundle
from linearsr.config import (
    AugmentationConfig,
    BackboneConfig,
    DegradationConfig,
    LatentStatistics,
    ModelConfig,
    SamplerConfig,
    TagsConfig,
    TextEncoderConfig,
    TextSource,
)
from linearsr.constants import Constant
from linearsr.residency import ExpertsInTurn
from linearsr.routed import RoutedSampler
from linearsr.task import SuperResolutionTask
from linearsr.task_config import TaskConfig
from linearsr.tiles import cut

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from pretended_gpu import pretended_gpu

Batch = dict[str, Tensor]
GRID, TOKENS, WIDTH = (5, 7), 6, 16


def make_task(prior: str, encoder: str, *, qk_norm: bool = False) -> SuperResolutionTask:
    text = TextSource(encoder=TextEncoderConfig(folder="x", max_tokens=TOKENS), digest="d", null=((0.1,) * WIDTH,))
    shape = BackboneConfig(width=32, num_blocks=2, head_width=16, num_cross_heads=2, caption_width=WIDTH, stem_width=8, qk_norm=qk_norm)
    tags = TagsConfig(vocabulary=("cat", "sky") if encoder == "learned" else (), max_tags=3, encoder=encoder, from_lr=0.3)  # type: ignore[arg-type]
    return SuperResolutionTask(
        TaskConfig(
            model=ModelConfig(backbone=shape, tags=tags, prior=prior),  # type: ignore[arg-type]
            statistics=LatentStatistics(mean=(0.1,) * 48, std=(0.5,) * 48, residual_std=(0.4,) * 48),
            interval=(0.0, 1.0),
            degradation=DegradationConfig(),
            augmentation=AugmentationConfig(),
            crop_px=32,
            validation_steps=2,
            metrics=("psnr_y", "ssim_y", "psnr", "ssim"),
            text=None if encoder == "learned" else text,
        )
    )


def make_network(task: SuperResolutionTask) -> nn.Module:
    """Random in every part: a fresh network's output layer is zero."""
    network, generator = task.build(), torch.Generator().manual_seed(5)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return network


def make_batch(task: SuperResolutionTask, count: int) -> Batch:
    rng, (rows, columns) = np.random.default_rng(3), GRID
    arrays = {
        "hr": rng.integers(0, 256, (count, 3, 4 * rows, 4 * columns), dtype=np.uint8),
        "lr": rng.integers(0, 256, (count, 3, rows, columns), dtype=np.uint8),
        "noise": rng.standard_normal((count, 48, rows, columns), dtype=np.float32),
    }
    for suffix in ("", "_lr"):
        if task.captions.text is None:
            arrays[f"tags{suffix}"] = rng.integers(0, 3, (count, 3))
        else:
            arrays[f"text{suffix}"] = rng.standard_normal((count, TOKENS, WIDTH)).astype(np.float16)
            arrays[f"text{suffix}_tokens"] = rng.integers(0, TOKENS + 1, count)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def trained(task: SuperResolutionTask, count: int, device: torch.device) -> tuple[dict[str, Tensor], Callable[[], Tensor]]:
    """Return loss, gradients and what validation measures, on the CPU, and what computes the loss again."""
    network = make_network(task).to(device)
    batch = {name: value.to(device) for name, value in make_batch(task, count).items()}

    def loss() -> Tensor:
        return task.loss(network, batch, torch.Generator().manual_seed(1))[0]

    first = loss()
    first.backward()
    measured = task.validate(network, batch)
    grads = {name: parameter.grad.cpu() for name, parameter in network.named_parameters() if parameter.grad is not None}
    return {"loss": first.detach().cpu(), **grads, **{name: value.cpu() for name, value in measured.items()}}, loss


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(("encoder", "qk_norm"), [("learned", False), ("text", False), ("text", True)])
@pytest.mark.parametrize("prior", ["lr", "none"])
def test_training_on_a_gpu_gives_the_numbers_of_the_cpu(prior: str, encoder: str, qk_norm: bool, count: int) -> None:
    task = make_task(prior, encoder, qk_norm=qk_norm)
    expected, _ = trained(task, count, torch.device("cpu"))
    with pretended_gpu() as gpu:
        got, loss = trained(task, count, gpu.device)
        gpu.counts.clear()
        loss()
    torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-5)
    # What is drawn for a step: noise levels, noise, and twice which captions are read. All else was copied once.
    assert gpu.counts == {"copies": 4, "waits": 0}


@pytest.mark.parametrize("tile", [None, 4])
@pytest.mark.parametrize("prior", ["lr", "none"])
def test_a_sampler_on_a_gpu_gives_the_numbers_of_the_cpu_and_copies_nothing(prior: str, tile: int | None) -> None:
    task = make_task(prior, "text")
    networks = [make_network(task), make_network(task)]
    sampler = SamplerConfig(num_steps=6, kind="dpm++2m", guidance_scale=2.0)
    batch = make_batch(task, 2)
    tiling = None if tile is None else cut(GRID, tile)

    @torch.no_grad()
    def restored(device: torch.device) -> Tensor:
        moved = {name: value.to(device) for name, value in batch.items()}
        routed = RoutedSampler([network.to(device).eval() for network in networks], (0.6,), sampler)  # type: ignore[arg-type,list-item]
        captions, null = task.captions.all(moved), task.captions.null(2, device)

        def run() -> Tensor:
            return routed.sample(moved["noise"], moved["lr"].float() / 127.5 - 1, captions, null=null, tiling=tiling)

        result = run()
        if device.type != "cpu":
            gpu.counts.clear()
            run()
        return result.cpu()

    expected = restored(torch.device("cpu"))
    with pretended_gpu() as gpu:
        got = restored(gpu.device)
    torch.testing.assert_close(got, expected, rtol=2e-4, atol=2e-4)
    assert gpu.counts["copies"] == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("encoder", ["learned", "text"])
def test_a_forward_can_be_recorded_as_a_cuda_graph(encoder: str, dtype: torch.dtype) -> None:
    task = make_task("lr", encoder)
    with pretended_gpu() as gpu, torch.no_grad():
        network = make_network(task).network.to(gpu.device, dtype).eval()
        batch = {name: value.to(gpu.device) for name, value in make_batch(task, 1).items()}
        prepared = network.prepare(batch["lr"].float(), task.captions.all(batch), reused=True)
        t = torch.full((1,), 0.3, device=gpu.device)
        gpu.counts.clear()
        network(batch["noise"], t, prepared)
    assert gpu.counts.total() == 0, "nothing comes from the CPU, and nothing is waited for"


def test_a_constant_travels_without_its_copies() -> None:
    constant = Constant(torch.ones(3))
    with pretended_gpu() as gpu:
        assert constant.on(gpu.device).device == gpu.device
        assert constant.on(gpu.device) is constant.on(gpu.device)
    travelled = pickle.loads(pickle.dumps(constant))
    assert vars(travelled)["_copies"] == {}
    assert torch.equal(travelled.value, constant.value)


class Stream:
    """Notes what it is told."""

    def __init__(self, told: list[str]) -> None:
        self._told = told

    def record_event(self) -> str:
        return "what was queued"

    def wait_event(self, event: str) -> None:
        self._told.append(f"wait for {event}")

    def synchronize(self) -> None:
        self._told.append("copied")


def test_weights_never_come_to_a_gpu_before_it_is_done_with_those_they_replace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: Stream(told))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: Stream([]))
    monkeypatch.setattr(torch.cuda, "stream", lambda _: nullcontext())
    monkeypatch.setattr(Tensor, "pin_memory", lambda tensor: tensor)
    task = make_task("lr", "learned")
    weights = [tmp_path / f"{index}.safetensors" for index in range(3)]
    for index, path in enumerate(weights):
        save_file({name: value.fill_(index) for name, value in task.build().state_dict().items()}, path)
    model = task.config.model
    bundle = save_bundle(
        tmp_path / "bundle",
        config=model,
        statistics=task.config.statistics,
        boundaries=(0.3, 0.6),
        sampler=SamplerConfig(num_steps=4),
        expert_weights=weights,
        lineage={},
    )
    with pretended_gpu("cuda") as gpu:
        experts = ExpertsInTurn(bundle, gpu.device)
        # The last is not expected: it takes the place of the first, whose work may still be queued, and nothing was fetched ahead.
        for order, asked in (([0, 1], 0), ([0, 1], 1), ([2], 2)):
            experts.expect(order)
            assert experts[asked].network.table.detach().cpu().unique().tolist() == [asked]
    assert told == ["wait for what was queued", "copied"] * 3
