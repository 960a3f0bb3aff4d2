"""Metrics: agreement with independent implementations, and clear words when something is missing."""

import math
import re
import sys

import numpy as np
import pytest
import skimage.data
import torch
from skimage.metrics import structural_similarity

from linearsr.metrics import IDENTICAL_PSNR_DB, METRICS, Meter, MetricError, MissingWeightsError, orientations


@pytest.fixture(scope="module")
def pair():
    hr = torch.from_numpy(skimage.data.astronaut()[:192, 100:320].copy()).permute(2, 0, 1)[None].float() / 255
    noise = torch.randn(2, *hr.shape[1:], generator=torch.Generator().manual_seed(0))
    sr = hr + torch.tensor([0.03, 0.1]).view(2, 1, 1, 1) * noise
    return (sr.clamp(0, 1) * 255).round() / 255, hr.expand(2, -1, -1, -1).contiguous()


def luma(image):
    """Y of BT.601 in studio range, written again from the standard: (H, W) float64."""
    red, green, blue = np.round(image.double().numpy() * 255)
    return 16 + (65.481 * red + 128.553 * green + 24.966 * blue) / 255


def test_psnr_agrees_with_pyiqa_and_ssim_with_skimage(pair):
    pyiqa = pytest.importorskip("pyiqa")
    sr, hr = pair
    ours = Meter(["psnr_y", "ssim_y"], "classic").measure(sr, hr)
    theirs = pyiqa.create_metric("psnr", device=torch.device("cpu"), test_y_channel=True, color_space="ycbcr", crop_border=4, eps=0)
    torch.testing.assert_close(ours["psnr_y"], theirs(sr, hr).double(), atol=1e-4, rtol=0)
    for i in range(2):
        x, y = luma(sr[i])[4:-4, 4:-4], luma(hr[i])[4:-4, 4:-4]
        expected = structural_similarity(x, y, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False)
        assert ours["ssim_y"][i].item() == pytest.approx(expected, abs=1e-6)
    # pyiqa rounds Y to integers before SSIM, which costs it up to 1e-3.
    rounded = pyiqa.create_metric("ssim", device=torch.device("cpu"), color_space="ycbcr", crop_border=4)
    torch.testing.assert_close(ours["ssim_y"], rounded(sr, hr).double(), atol=1e-3, rtol=0)


def test_border_is_not_measured_and_values_are_rounded_to_8_bit(pair):
    _, hr = pair
    meter = Meter(["psnr_y", "ssim_y"])
    marred = hr.clone()
    marred[..., :4, :] = 0
    marred[..., :, -4:] = 1
    same = meter.measure(marred + 0.4 / 255, hr)
    assert same["psnr_y"].tolist() == [IDENTICAL_PSNR_DB] * 2
    assert same["ssim_y"].tolist() == pytest.approx([1.0] * 2)
    marred[0, :, 4, 4] = 1 - marred[0, :, 4, 4]
    assert meter.measure(marred, hr)["psnr_y"][0] < IDENTICAL_PSNR_DB
    assert "border 4 px" in meter.protocol


def test_every_weightless_metric_prefers_the_cleaner_image_as_its_orientation_says(pair):
    pytest.importorskip("pyiqa")
    sr, hr = pair
    names = [name for name, spec in METRICS.items() if spec.needs != "weights" and spec.scope == "picture"]
    values = Meter(names).measure(sr, hr)
    for name, higher_is_better in orientations(names).items():
        light, heavy = values[name].tolist()
        assert (light > heavy) is higher_is_better, name


def test_nonfinite_image_measures_nan_and_leaves_the_others_alone(pair):
    pytest.importorskip("pyiqa")
    sr, hr = pair
    meter = Meter(["psnr_y", "gmsd"])
    clean, damaged = meter.measure(sr, hr), sr.clone()
    damaged[1, 0, 50, 50] = float("nan")
    for name, value in meter.measure(damaged, hr).items():
        assert value[0] == clean[name][0], name
        assert math.isnan(value[1]), name


def test_building_a_metric_says_nothing_and_leaves_random_state_threads_and_hub(pair, capfd):
    pytest.importorskip("pyiqa")
    before = (torch.get_rng_state().tolist(), torch.get_num_threads(), torch.hub.get_dir())
    Meter(["gmsd", "nlpd"]).measure(*pair)
    assert (torch.get_rng_state().tolist(), torch.get_num_threads(), torch.hub.get_dir()) == before
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize("name", [name for name, spec in METRICS.items() if spec.needs == "weights" and spec.scope == "picture"])
def test_missing_weights_name_metric_file_folder_and_remedy(name, tmp_path):
    with pytest.raises(MissingWeightsError) as caught:
        Meter([name], weights=str(tmp_path))
    for part in (repr(name), METRICS[name].weights_files[0], str(tmp_path), "validation.weights"):
        assert part in str(caught.value)
    with pytest.raises(MissingWeightsError, match="no folder of weights"):
        Meter([name])


def test_niqe_reads_matlab_and_basicsr_parameters(tmp_path, pair):
    pytest.importorskip("pyiqa")
    from scipy.io import savemat

    rng = np.random.default_rng(0)
    mean, factor = rng.random((1, 36)), rng.random((36, 36))
    covariance = factor @ factor.T
    for folder in ("matlab", "basicsr"):
        (tmp_path / folder).mkdir()
    savemat(tmp_path / "matlab/niqe_modelparameters.mat", {"mu_prisparam": mean, "cov_prisparam": covariance})
    np.savez(tmp_path / "basicsr/niqe_pris_params.npz", mu_pris_param=mean, cov_pris_param=covariance)
    values = [Meter(["niqe"], weights=str(tmp_path / folder)).measure(pair[0])["niqe"] for folder in ("matlab", "basicsr")]
    assert torch.isfinite(torch.stack(values)).all()
    assert values[1].tolist() == pytest.approx(values[0].tolist(), rel=0.2)  # Y of YIQ and of YCbCr differ in range.


@pytest.mark.parametrize("name", ["lpips", "musiq", "clipiqa", "niqe"])
def test_damaged_weights_are_named(name, tmp_path, pair):
    pytest.importorskip("pyiqa")
    for file in METRICS[name].weights_files:
        (tmp_path / file).write_bytes(b"not a checkpoint")
    with pytest.raises(MetricError, match=re.escape(METRICS[name].weights_files[0])):
        Meter([name], weights=str(tmp_path)).measure(*pair)


def test_bad_requests_say_what_to_do(pair, monkeypatch):
    sr, hr = pair
    with pytest.raises(ValueError, match="did you mean 'psnr_y'"):
        Meter(["psnr-y"])
    with pytest.raises(ValueError, match="quickstart, classic"):
        Meter(["psnr_y"], "paper")
    with pytest.raises(ValueError, match="expected `hr`"):
        Meter(["psnr_y"]).measure(sr)
    with pytest.raises(ValueError, match="got shape"):
        Meter(["psnr_y"]).measure(sr, hr[..., :-1])
    with pytest.raises(ValueError, match="at least 19 px"):
        Meter(["ssim_y"]).measure(sr[..., :18], hr[..., :18])
    monkeypatch.setitem(sys.modules, "pyiqa", None)
    with pytest.raises(MetricError, match=r"linearsr\[metrics\]"):
        Meter(["psnr_y", "gmsd"])
    assert Meter(["psnr_y", "ssim_y"]).measure(sr, hr)["psnr_y"].shape == (2,)
