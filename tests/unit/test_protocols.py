"""Protocols: each value has a source, and the same pictures read what each protocol says by hand."""

import math
from typing import get_args

import numpy as np
import pytest
import torch

from linearsr.metric_table import metric_spec
from linearsr.metrics import NO_WEIGHTS, Meter, MissingWeightsError, weights_digests
from linearsr.protocols import PROTOCOLS, protocol_named
from linearsr_platform.recipe.schema import ProtocolName


def test_a_recipe_may_name_every_protocol_and_no_other():
    assert get_args(ProtocolName) == tuple(PROTOCOLS)


@pytest.mark.parametrize("name", PROTOCOLS)
def test_every_value_has_a_source_and_the_metrics_agree_with_it(name):
    protocol = PROTOCOLS[name]
    assert set(protocol.sources) >= {"colour_space", "border_px", "metrics", "maniqa", "colour_fix", "paired_by"}
    specs = {metric: metric_spec(metric) for metric in protocol.metrics}
    assert all(spec.scope != "artefact" for spec in specs.values())
    assert ("psnr_y" in specs) == (protocol.colour_space == "Y")
    assert {"maniqa", "maniqa-pipal"} & set(specs) <= {protocol.maniqa}
    assert "fid" not in protocol.resolve()
    assert protocol.resolve(["maniqa"]) == (protocol.maniqa,)


def test_an_unknown_protocol_names_the_nearest():
    with pytest.raises(ValueError, match="did you mean 'osediff'"):
        protocol_named("osedif")


def test_the_border_is_what_tells_classic_from_stablesr():
    """An error in the outer 4 px alone: classic sees none, stablesr its share of the area."""
    hr = torch.full((1, 3, 40, 40), 0.5)
    hr = (hr * 255).round() / 255
    sr = hr.clone()
    sr[..., :2, :] += 10 / 255
    values = {name: Meter(["psnr_y", "psnr"], name).measure(sr, hr) for name in ("classic", "stablesr")}
    assert values["classic"]["psnr_y"].item() == 100
    # Grey moved by 10 of 255 moves Y by 10 x 219 / 255; 2 of 40 rows have it.
    for metric, step in (("psnr_y", 10 * 219 / 255), ("psnr", 10)):
        expected = 10 * math.log10(255**2 / (step**2 * 2 / 40))
        assert values["stablesr"][metric].item() == pytest.approx(expected, abs=1e-3)


def test_rgb_metrics_see_colours_that_luminance_does_not():
    rng = np.random.default_rng(0)
    hr = torch.from_numpy(rng.integers(60, 190, (1, 3, 32, 32))).float() / 255
    sr = hr.clone()
    sr[:, 0] += 24.966 * 0.4 / 255  # red up and blue down, so that Y stays about what it is
    sr[:, 2] -= 65.481 * 0.4 / 255
    found = Meter(["psnr_y", "psnr", "ssim", "ssim_y"], "osediff").measure(sr, hr)
    assert found["psnr_y"].item() > found["psnr"].item() + 10
    skimage = pytest.importorskip("skimage.metrics")
    x, y = (np.round(image[0].permute(1, 2, 0).double().numpy() * 255) for image in (sr, hr))
    settings = {"data_range": 255, "channel_axis": 2, "gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    per_channel = [
        skimage.structural_similarity(x[..., c], y[..., c], **{**settings, "channel_axis": None}, full=True)[1][5:-5, 5:-5].mean()
        for c in range(3)
    ]
    assert found["ssim"].item() == pytest.approx(np.mean(per_channel), abs=1e-5)


def test_the_hash_of_weights_follows_every_file(tmp_path):
    for name in ("LPIPS_v0.1_alex-df73285e.pth", "alexnet-owt-7be5be79.pth", "RN50.pt"):
        (tmp_path / name).write_bytes(name.encode())
    before = weights_digests(["psnr_y", "lpips", "clipiqa"], str(tmp_path))
    assert before["psnr_y"] == NO_WEIGHTS
    (tmp_path / "alexnet-owt-7be5be79.pth").write_bytes(b"other")
    after = weights_digests(["psnr_y", "lpips", "clipiqa"], str(tmp_path))
    assert after["lpips"] != before["lpips"]
    assert after["clipiqa"] == before["clipiqa"] != NO_WEIGHTS
    with pytest.raises(MissingWeightsError):
        weights_digests(["musiq"], str(tmp_path))
