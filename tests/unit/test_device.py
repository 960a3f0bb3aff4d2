"""A worker that has reserved a GPU computes there or not at all."""

from types import SimpleNamespace

import pytest
import ray
import torch

from linearsr_platform.cluster.device import own_device
from linearsr_platform.errors import StageError


@pytest.mark.parametrize(("reserved", "found", "expected"), [([], True, "cpu"), ([], False, "cpu"), (["1"], True, "cuda")])
def test_a_worker_computes_on_what_it_has_reserved(
    monkeypatch: pytest.MonkeyPatch, reserved: list[str], found: bool, expected: str
) -> None:
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_accelerator_ids=lambda: {"GPU": reserved}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: found)
    assert own_device() == torch.device(expected)


def test_a_gpu_that_torch_does_not_find_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "get_runtime_context", lambda: SimpleNamespace(get_accelerator_ids=lambda: {"GPU": ["1"]}))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(StageError, match=r"got GPU 1 of .* reserved, but torch .* finds no CUDA there; fix: the driver"):
        own_device()
