"""Compiled kernels against plain torch: values, gradients, threads, dtypes, and machines without a compiler."""

import copy
import os
import pickle
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from torch import Tensor

from linearsr import bands
from linearsr.backbone import Backbone
from linearsr.conditioning import TextEmbedding
from linearsr.config import BackboneConfig
from linearsr.depthwise import gated_depthwise
from linearsr.fused import relu_attention
from linearsr.kernels import Kernels, KernelsError, build, use_kernels
from linearsr.similarity import IDENTICAL_PSNR_DB, psnr_y

EPS = 1e-15


@pytest.fixture(scope="module")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> Kernels:
    if shutil.which("c++") is None:
        pytest.skip("this machine has no C++ compiler")
    return build.build_kernels(tmp_path_factory.mktemp("kernels"))


def outcomes(function: Callable[..., Tensor], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Return a function's result and the gradients of all inputs, for a fixed gradient of the result."""
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    result = function(*leaves)
    grad = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(result.dtype)
    return [result.detach(), *torch.autograd.grad(result, leaves, grad)]


def assert_near(got: Sequence[Tensor], expected: Sequence[Tensor], error: float) -> None:
    for one, other in zip(got, expected, strict=True):
        assert (one.double() - other.double()).norm() <= error * other.double().norm()


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
@pytest.mark.parametrize(("batch", "grid", "channels"), [(2, (5, 7), 70), (1, (1, 1), 3), (1, (2, 9), 64), (3, (4, 1), 130)])
def test_gated_depthwise_is_plain_torchs(
    kernels: Kernels, batch: int, grid: tuple[int, int], channels: int, dtype: torch.dtype, error: float
) -> None:
    torch.manual_seed(0)
    shapes = [(batch, grid[0] * grid[1], 2 * channels), (2 * channels, 1, 3, 3), (2 * channels,)]
    inputs = [torch.randn(shape).mul(2).to(dtype) for shape in shapes]
    exact = outcomes(lambda *x: gated_depthwise(*x, grid), [value.double() for value in inputs])
    assert_near(outcomes(lambda *x: gated_depthwise(*x, grid, kernels), inputs), exact, error)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize(("batch", "tokens", "heads"), [(2, 65, 3), (1, 1, 1), (1, 200, 2)])
def test_relu_attention_is_plain_torchs(kernels: Kernels, batch: int, tokens: int, heads: int, dtype: torch.dtype, error: float) -> None:
    torch.manual_seed(0)
    qkv = torch.randn(batch, tokens, 3 * heads * 32).to(dtype)
    qkv[:, 0, : heads * 32] = -1  # A dead query.
    exact = outcomes(lambda x: relu_attention(x, 32, EPS)[0], [qkv.double()])
    assert_near(outcomes(lambda x: relu_attention(x, 32, EPS, kernels)[0], [qkv]), exact, error)
    got, expected = relu_attention(qkv, 32, EPS, kernels)[1], relu_attention(qkv, 32, EPS)[1]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert (got[:, :, 0] == 0).all()


def network() -> tuple[Backbone, Callable[[Backbone], Tensor]]:
    torch.manual_seed(0)
    shape = BackboneConfig(width=64, num_blocks=2, num_cross_heads=2, caption_width=16)
    backbone = Backbone(shape, latent_channels=4, lr_pixels_per_token=1, caption_encoder="text")
    torch.nn.init.normal_(backbone.head.weight)
    z, lr = torch.randn(2, 4, 9, 12), torch.rand(2, 3, 9, 12)
    text = TextEmbedding(torch.randn(2, 5, 16), torch.ones(2, 5, dtype=torch.bool))
    return backbone, lambda one: one(z, torch.tensor([0.3, 0.8]), one.prepare(lr, text))


@pytest.mark.parametrize("cached_values", [1 << 20, 1 << 12])
def test_a_network_is_the_same_with_a_gradient_without_one_and_in_bands(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch, cached_values: int
) -> None:
    monkeypatch.setattr(bands, "CACHED_VALUES", cached_values)
    monkeypatch.setattr(bands, "MIN_TOKENS", 12)
    backbone, run = network()
    plain = run(backbone)
    use_kernels(backbone, kernels)
    with_gradient = run(backbone)
    with torch.no_grad():
        without = run(backbone)
    assert not torch.equal(plain, with_gradient)  # They were used.
    assert_near([with_gradient, without], [plain, plain], 2e-6)
    use_kernels(backbone, None)
    assert torch.equal(run(backbone), plain)


def test_gradients_of_a_network_are_plain_torchs(kernels: Kernels) -> None:
    backbone, run = network()
    gradients = []
    for one in (None, kernels):
        use_kernels(backbone, one)
        backbone.zero_grad()
        run(backbone).square().mean().backward()
        gradients.append([part.grad.clone() for part in backbone.parameters() if part.grad is not None])
    assert_near(gradients[1], gradients[0], 1e-5)


def test_results_do_not_depend_on_the_number_of_threads(kernels: Kernels) -> None:
    qkv, hidden = torch.randn(3, 70, 3 * 64), torch.randn(2, 12, 2 * 200)
    weight, bias = torch.randn(400, 1, 3, 3), torch.randn(400)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3, 64):
            torch.set_num_threads(threads)
            attended = outcomes(lambda x: relu_attention(x, 32, EPS, kernels)[0], [qkv])
            found.append([*attended, *outcomes(lambda *x: gated_depthwise(*x, (3, 4), kernels), [hidden, weight, bias])])
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(found[0], others, strict=True))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_dtypes_are_left_to_torch(kernels: Kernels, dtype: torch.dtype) -> None:
    qkv, hidden = torch.randn(1, 8, 3 * 32).to(dtype), torch.randn(1, 8, 64).to(dtype)
    weight, bias = torch.randn(64, 1, 3, 3).to(dtype), torch.randn(64).to(dtype)
    assert torch.equal(relu_attention(qkv, 32, EPS, kernels)[0], relu_attention(qkv, 32, EPS)[0])
    assert torch.equal(gated_depthwise(hidden, weight, bias, (2, 4), kernels), gated_depthwise(hidden, weight, bias, (2, 4)))


def test_what_is_not_a_number_stays_so(kernels: Kernels) -> None:
    hidden = torch.zeros(1, 9, 4)
    hidden[0, 4, 0] = float("nan")
    for dtype in (torch.float32, torch.bfloat16):
        out = gated_depthwise(hidden.to(dtype), torch.ones(4, 1, 3, 3).to(dtype), torch.zeros(4).to(dtype), (3, 3), kernels)
        assert out[..., 0].isnan().all()
        assert out[..., 1].isfinite().all()


def test_psnr_of_luminance_is_that_of_float64(kernels: Kernels) -> None:
    torch.manual_seed(0)
    for height, width in ((37, 53), (1, 1), (64, 64)):
        hr = torch.rand(2, 3, height, width)
        sr = torch.stack([hr[0], (hr[1] + 0.01 * torch.randn(3, height, width)).clamp(0, 1)])
        got = psnr_y(sr, hr, kernels)
        interleaved = [image.to(memory_format=torch.channels_last) for image in (sr, hr)]
        torch.testing.assert_close(psnr_y(*interleaved, kernels), got, rtol=0, atol=1e-6)
        assert torch.equal(psnr_y(interleaved[0], hr, kernels), got)
        assert got[0] == IDENTICAL_PSNR_DB
        weights = torch.tensor([65.481, 128.553, 24.966], dtype=torch.float64).view(3, 1, 1)
        mean = ((sr[1].double() - hr[1].double()) * weights).sum(dim=0).square().mean()
        assert float(got[1]) == pytest.approx(float(10 * torch.log10(255**2 / mean)), abs=1e-5)
        assert float(psnr_y(sr, hr)[1]) == pytest.approx(float(got[1]), abs=1e-4)


def test_a_network_with_kernels_travels(kernels: Kernels) -> None:
    backbone, run = network()
    use_kernels(backbone, kernels)
    expected = run(backbone)
    assert torch.equal(run(copy.deepcopy(backbone)), expected)
    assert torch.equal(run(pickle.loads(pickle.dumps(backbone))), expected)


def test_they_are_compiled_once(kernels: Kernels) -> None:
    before = kernels.path.stat()
    assert build.build_kernels(kernels.path.parent) == kernels
    assert kernels.path.stat().st_mtime_ns == before.st_mtime_ns
    assert sorted(path.name for path in kernels.path.parent.iterdir()) == [kernels.path.name, "lock"]


def test_a_machine_without_a_compiler_says_so(tmp_path: Path) -> None:
    with pytest.raises(KernelsError, match=r"no C\+\+ compiler 'no-such-compiler'.*fix: install g\+\+"):
        build.build_kernels(tmp_path, compiler="no-such-compiler")
    broken = tmp_path / "broken"
    broken.write_text('#!/bin/sh\ncase "$*" in *-shared*) echo cannot do this >&2; exit 3;; esac\n', encoding="utf-8")
    broken.chmod(0o700)
    with pytest.raises(KernelsError, match=r"exit status 3[\s\S]*cannot do this"):
        build.build_kernels(tmp_path, compiler=str(broken))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "lock"]


def test_a_folder_that_others_may_write_to_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build.tempfile, "gettempdir", lambda: str(tmp_path))
    folder = build.kernels_folder()
    assert folder.stat().st_mode & 0o777 == 0o700
    folder.chmod(0o777)
    with pytest.raises(KernelsError, match="others may write to"):
        build.kernels_folder()
    folder.rmdir()
    (tmp_path / "elsewhere").mkdir()
    os.symlink(tmp_path / "elsewhere", folder)
    with pytest.raises(KernelsError, match="others may write to"):
        build.kernels_folder()
