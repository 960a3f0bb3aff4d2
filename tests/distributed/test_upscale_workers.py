"""Enlarging and measuring by workers: the bytes and numbers of one process, and only what is missing is done again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from flaky_s3 import flaky_s3

from linearsr.bundle import save_bundle
from linearsr.config import BackboneConfig, LatentStatistics, ModelConfig, SamplerConfig
from linearsr.degradation import upsample
from linearsr.model import SuperResolver
from linearsr_platform import storage
from linearsr_platform.cluster.capacity import Share
from linearsr_platform.cluster.crew import RayCrew
from linearsr_platform.data.crew import Crew, SerialCrew
from linearsr_platform.stages.measured_set import MakeMeasurer, measure_all
from linearsr_platform.stages.measuring import Photograph, Request

pytestmark = [pytest.mark.ray, pytest.mark.server, pytest.mark.distributed]
COUNT = 5


def tiny_bundle(folder: Path) -> Path:
    config = ModelConfig(backbone=BackboneConfig(width=32, num_blocks=1, caption_width=8), prior="lr")
    statistics = LatentStatistics(mean=(0.0,) * 48, std=(1.0,) * 48, residual_std=(0.1,) * 48)
    save_file(SuperResolver(config, statistics).state_dict(), folder / "weights.safetensors")
    sampler, weights = SamplerConfig(num_steps=2, times=(1.0, 0.4)), [folder / "weights.safetensors"] * 2
    save_bundle(
        folder / "bundle", config=config, statistics=statistics, boundaries=(0.5,), sampler=sampler, expert_weights=weights, lineage={}
    )
    return folder / "bundle"


def test_workers_do_what_one_process_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bundle, rng = tiny_bundle(tmp_path), np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for index in range(COUNT):
        Image.fromarray(rng.integers(0, 256, (20 + index, 24, 3), dtype=np.uint8)).save(tmp_path / "in" / f"{index}.png")

    def upscale(source: str, target: str, *options: str) -> dict[str, str]:
        """Return what became of each picture, by name."""
        command = [str(Path(sys.executable).with_name("linearsr")), "upscale", source, target, "--model", str(bundle), "--json", *options]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(os.environ), timeout=300)
        assert done.returncode == 0, done.stderr
        return {storage.name_of(one["target"]): one["status"] for one in json.loads(done.stdout)["pictures"]}

    upscale(str(tmp_path / "in"), str(tmp_path / "alone"), "--threads", "1")
    expected = {path.name: path.read_bytes() for path in (tmp_path / "alone").iterdir()}
    with flaky_s3(share=0.05, seed=3) as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        bucket = server.make_bucket("pictures")
        storage.copy_tree(str(tmp_path / "in"), storage.join(bucket, "in"))
        source, target = storage.join(bucket, "in"), storage.join(bucket, "out")
        assert set(upscale(source, target, "--workers", "2").values()) == {"done"}
        assert {storage.name_of(url): storage.read_bytes(url) for url in storage.list_files(target)} == expected
        storage.remove(storage.join(target, "3.png"))
        again = upscale(source, target, "--workers", "2")
        assert again == {name: "done" if name == "3.png" else "skipped" for name in expected}
        assert {storage.name_of(url): storage.read_bytes(url) for url in storage.list_files(target)} == expected


def test_an_evaluation_has_the_numbers_of_one_process(cluster, tmp_path: Path) -> None:
    bundle, rng = tiny_bundle(tmp_path), np.random.default_rng(0)
    lr = [rng.integers(0, 256, (16 + 4 * index, 20, 3), dtype=np.uint8) for index in range(COUNT)]
    photographs = [Photograph(name=f"p{index}", original=upsample(one, 4), lr=one) for index, one in enumerate(lr)]
    request = Request(metrics={"classic": ("psnr_y", "ssim_y"), "seesr": ("psnr_y",)}, sweep_steps=(1,))

    def measured(crew: Crew, results: str | None = None, told: list[int] | None = None) -> list[str]:
        make = MakeMeasurer(request=request, bundle_url=str(bundle), results_url=results)
        every = measure_all(photographs, make, lambda count: crew, lambda done, total: told.append(done) if told is not None else None)
        return [one.to_json() for one in every]

    results, told = str(tmp_path / "results"), []
    alone = measured(SerialCrew())
    assert measured(RayCrew(Share(cpus=1)), results) == alone
    (tmp_path / "results" / "p2.json").unlink()
    assert measured(RayCrew(Share(cpus=1)), results, told) == alone
    assert told == [COUNT - 1, COUNT]
