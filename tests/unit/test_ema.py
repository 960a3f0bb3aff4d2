"""The average of weights equals its formula at every ZeRO stage, and validating with it leaves training as it was."""

import os

import pytest
import torch
from torch import Tensor, nn

os.environ.setdefault("DS_ACCELERATOR", "cpu")

from linearsr_platform.recipe.train_schema import TrainConfig, ZeroConfig
from linearsr_platform.train.ema import ExponentialAverage
from linearsr_platform.train.engine import DeepSpeedEngine

INPUTS = torch.randn(4, 3, generator=torch.Generator().manual_seed(5))


class Network(nn.Module):
    """Two layers, one frozen parameter and one buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(3, 8), nn.Linear(8, 1)
        self.last.bias.requires_grad_(requires_grad=False)
        self.register_buffer("offset", torch.tensor([0.5]))

    def forward(self, x: Tensor) -> Tensor:
        x = (x + self.offset).to(self.first.weight.dtype)
        return self.last(torch.tanh(self.first(x))).float()


class ToyTask:
    """A regression whose validation value is the network's output."""

    def build(self) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return Network()

    def loss(self, module: nn.Module, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        return (module(batch["x"]) - 1).square().mean(), {}

    def validate(self, module: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"output": module(batch["x"]).flatten()}


def test_decay_warms_up_so_that_the_first_weights_are_forgotten() -> None:
    class Weights:
        def __init__(self) -> None:
            self.weight = torch.zeros(2)

        def master_weights(self) -> list[Tensor]:
            return [self.weight]

    engine = Weights()
    average = ExponentialAverage(engine, decay=0.25)
    engine.weight += 1
    average.update(1)
    first = 1 - 2 / 11
    torch.testing.assert_close(average.tensors()[0], torch.full((2,), first))
    engine.weight += 1
    average.update(2)
    torch.testing.assert_close(average.tensors()[0], torch.full((2,), 0.25 * first + 0.75 * 2))
    with pytest.raises(ValueError, match=r"got shapes \[\[3\]\]; expected \[\[2\]\]"):
        average.restore([torch.zeros(3)])


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_average_equals_its_formula_at_every_stage(monkeypatch: pytest.MonkeyPatch, stage: int, precision: str) -> None:
    monkeypatch.setenv("LOCAL_RANK", "0")
    config = TrainConfig(max_steps=9, batch_size=4, lr=0.1, clip_norm=1.0, precision=precision, zero=ZeroConfig(stage=stage))
    engine = DeepSpeedEngine(ToyTask(), config, seed=0)
    average = ExponentialAverage(engine, decay=0.5)
    reference = engine.full_weights()
    assert set(reference) == {"first.weight", "first.bias", "last.weight", "last.bias", "offset"}
    for step in range(1, 8):
        engine.train_step([{"x": INPUTS}], lr=0.1)
        average.update(step)
        decay = min(0.5, (1 + step) / (10 + step))
        for name, weight in engine.full_weights().items():
            reference[name] = decay * reference[name] + (1 - decay) * weight

    raw, output = engine.full_weights(), engine.validate({"x": INPUTS})["output"]
    with average.swapped():
        inside, averaged_output = engine.full_weights(), engine.validate({"x": INPUTS})["output"]
    torch.testing.assert_close(inside, reference)  # float32, also where the network computes in bfloat16

    network = Network()
    network.load_state_dict(reference)
    tolerance = 1e-5 if precision == "float32" else 3e-2
    torch.testing.assert_close(averaged_output, network(INPUTS).flatten().detach(), rtol=tolerance, atol=tolerance)
    assert not torch.allclose(averaged_output, output)

    after = engine.full_weights()
    assert all(torch.equal(after[name], raw[name]) for name in raw)
    assert torch.equal(engine.validate({"x": INPUTS})["output"], output)
    engine.close()
