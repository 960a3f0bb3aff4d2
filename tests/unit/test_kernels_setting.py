"""Who is told to use compiled kernels uses them: trainers, scores, measurements, `linearsr upscale`; and whoever cannot says so."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from tiny_bundle import TINY, write_bundle

from linearsr.blocks import GatedDepthwise
from linearsr.config import AugmentationConfig, DegradationConfig, LatentStatistics
from linearsr.kernels import Kernels, KernelsError, build
from linearsr.task_config import TaskConfig
from linearsr_platform.cli.app import app
from linearsr_platform.cluster.record import job_hash
from linearsr_platform.errors import UserError
from linearsr_platform.recipe.train_schema import TrainConfig, ValidationConfig
from linearsr_platform.stages.measured_set import MakeMeasurer
from linearsr_platform.stages.measuring import Request
from linearsr_platform.train.job import TrainJob
from linearsr_platform.train.kernels import kernels_here

KERNELS = Kernels(Path("/nowhere/linearsr.so"))
"""Never called."""


def job(*, compiled_kernels: bool) -> TrainJob:
    channels = TINY.codec.latent_channels
    config = TaskConfig(
        model=TINY,
        statistics=LatentStatistics(mean=(0.0,) * channels, std=(1.0,) * channels, residual_std=(1.0,) * channels),
        interval=(0.0, 1.0),
        degradation=DegradationConfig(),
        augmentation=AugmentationConfig(),
        crop_px=32,
        validation_steps=1,
        metrics=("psnr_y",),
    )
    return TrainJob(
        name="pretrain",
        task="linearsr.task:SuperResolutionTask",
        task_config=config,
        train=TrainConfig(max_steps=1),
        validation=ValidationConfig(),
        train_shards=(),
        validation_shards=(),
        output_url="unused",
        compiled_kernels=compiled_kernels,
    )


def test_a_trainer_computes_with_them_if_its_job_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build, "build_kernels", lambda: KERNELS)
    for compiled in (True, False):
        network = job(compiled_kernels=compiled).build_task().build()
        used = {module.kernels for module in network.modules() if isinstance(module, GatedDepthwise)}
        assert used == {KERNELS if compiled else None}


def test_a_job_is_the_same_with_and_without() -> None:
    assert job_hash(job(compiled_kernels=True)) == job_hash(job(compiled_kernels=False))


def test_a_machine_that_cannot_compile_is_the_users_to_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> Kernels:
        raise KernelsError("compiled kernels: got no C++ compiler")

    monkeypatch.setattr(build, "build_kernels", fail)
    assert kernels_here(wanted=False) is None
    with pytest.raises(UserError, match=r"no C\+\+ compiler"):
        kernels_here()
    with pytest.raises(UserError, match=r"no C\+\+ compiler"):
        job(compiled_kernels=True).build_task()
    with pytest.raises(UserError, match=r"no C\+\+ compiler"):
        MakeMeasurer(request=Request(metrics={"classic": ("psnr_y",)}), compiled_kernels=True)()


@pytest.mark.skipif(shutil.which("c++") is None, reason="this machine has no C++ compiler")
@pytest.mark.parametrize("residency", ["all", "one"])
def test_a_picture_is_the_same_but_for_rounding(tmp_path: Path, residency: str) -> None:
    bundle, photo = write_bundle(tmp_path, noise=0.05), tmp_path / "photo.png"
    Image.radial_gradient("L").resize((23, 17)).convert("RGB").save(photo)
    pictures = []
    for more in ([], ["--compiled-kernels"]):
        target = tmp_path / f"large{len(more)}.png"
        command = ["upscale", str(photo), str(target), "--model", str(bundle), "--residency", residency, "--device", "cpu", *more]
        result = CliRunner().invoke(app, command)
        assert result.exit_code == 0, result.output
        with Image.open(target) as picture:
            pictures.append(np.asarray(picture).astype(int))
    assert np.abs(pictures[0] - pictures[1]).max() <= 1
