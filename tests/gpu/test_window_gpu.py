"""A window of steps on a GPU in which DeepSpeed tells the norm of one step as a number. Needs torch and pytest only."""

import math

import pytest
import torch

from linearsr_platform.train.processes import join_group
from linearsr_platform.train.results import StepResult
from linearsr_platform.train.window import MetricWindow

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]


def test_a_step_whose_gradients_overflow_is_read_like_the_others() -> None:
    join_group()
    window = MetricWindow([])
    for norm in (torch.tensor(2.0, device="cuda"), math.inf, torch.tensor(3.0, device="cuda")):
        window.add(StepResult(loss=torch.tensor(1.0, device="cuda"), scalars={}, grad_norm=norm))
    assert [step.grad_norm for step in window.flush(3, 1.0).steps] == [2.0, math.inf, 3.0]
