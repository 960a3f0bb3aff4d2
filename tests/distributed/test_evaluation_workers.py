"""Measuring a model by workers: the numbers of one process, and only what is missing is done again."""

import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from tiny_bundle import write_bundle

from linearsr.degradation import upsample
from linearsr_platform.cluster.capacity import Share
from linearsr_platform.cluster.crew import RayCrew
from linearsr_platform.data.crew import Crew, SerialCrew
from linearsr_platform.stages.measured_set import MakeMeasurer, measure_all
from linearsr_platform.stages.measuring import Photograph, Request

pytestmark = [pytest.mark.ray, pytest.mark.distributed]
COUNT = 5


def test_an_evaluation_has_the_numbers_of_one_process(cluster, tmp_path: Path) -> None:
    bundle, rng = write_bundle(tmp_path, noise=0.05), np.random.default_rng(0)
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
