"""FID: the distance against closed forms, too few pictures refused, the network read from a local file."""

import re

import numpy as np
import pytest
import scipy.linalg
import torch

from linearsr.frechet import FEATURES, InceptionFeatures, check_enough, frechet_distance, frechet_inception_distance, inception_input
from linearsr.metric_table import METRICS
from linearsr.metrics import MetricError, MissingWeightsError

(FILE,) = METRICS["fid"].weights_files


def test_the_distance_of_gaussians_is_that_of_the_closed_form():
    rng = np.random.default_rng(0)
    a, b = np.diag(rng.random(6)), np.diag(rng.random(6))
    means = rng.random(6), rng.random(6)
    expected = np.sum((means[0] - means[1]) ** 2) + np.sum((np.sqrt(np.diag(a)) - np.sqrt(np.diag(b))) ** 2)
    assert frechet_distance(means[0], a, means[1], b) == pytest.approx(expected)
    full = [factor @ factor.T for factor in (rng.random((6, 9)), rng.random((6, 9)))]
    root = scipy.linalg.sqrtm(full[0] @ full[1]).real
    expected = np.sum((means[0] - means[1]) ** 2) + np.trace(full[0] + full[1] - 2 * root)
    assert frechet_distance(means[0], full[0], means[1], full[1]) == pytest.approx(expected)
    assert frechet_distance(means[0], full[0], means[0], full[0]) == pytest.approx(0, abs=1e-9)


def test_samples_come_near_the_distance_of_what_they_are_drawn_from():
    rng = np.random.default_rng(0)
    ours, theirs = rng.normal(0, 1, (20000, 4)), rng.normal(0.5, 2, (20000, 4))
    found = frechet_inception_distance(ours.astype(np.float32), theirs.astype(np.float32), least=5)
    assert found == pytest.approx(4 * 0.5**2 + 4 * (2 - 1) ** 2, rel=0.05)


def test_too_few_images_are_refused_with_the_number_that_is_needed():
    few = np.zeros((FEATURES, 4), dtype=np.float32)
    enough = np.zeros((FEATURES + 1, 4), dtype=np.float32)
    for pair in ((few, enough), (enough, few)):
        with pytest.raises(MetricError, match="got 2048 images; expected at least 2049 in each set"):
            frechet_inception_distance(*pair)
    check_enough(FEATURES + 1)


def test_a_missing_or_damaged_file_is_named(tmp_path):
    with pytest.raises(MissingWeightsError, match=re.escape(FILE)):
        InceptionFeatures(str(tmp_path))
    pytest.importorskip("pyiqa")
    (tmp_path / FILE).write_bytes(b"not a checkpoint")
    with pytest.raises(MetricError, match=re.escape(FILE)):
        InceptionFeatures(str(tmp_path))


def test_the_network_is_that_of_the_file_and_sees_what_clean_fid_sees(tmp_path, monkeypatch):
    pytest.importorskip("pyiqa")
    from PIL import Image
    from pyiqa.archs import fid_arch, inception

    def keep(net, url):
        torch.manual_seed(0)
        for parameter in net.parameters():
            torch.nn.init.normal_(parameter, std=0.05)
        torch.save(net.state_dict(), tmp_path / FILE)

    with monkeypatch.context() as patched:
        patched.setattr(inception, "load_pretrained_network", keep)
        theirs = inception.InceptionV3(output_blocks=[3]).eval()
    before = inception.load_pretrained_network
    ours = InceptionFeatures(str(tmp_path))
    assert inception.load_pretrained_network is before
    picture = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "picture.png")
    seen = fid_arch.ResizeDataset([tmp_path / "picture.png"], "clean")[0]
    torch.testing.assert_close(inception_input(picture), (seen - 128) / 128)
    with torch.no_grad():
        expected = theirs(((seen - 128) / 128)[None], False, False)[0].flatten()
    found = ours.of(picture)
    assert found.shape == (FEATURES,)
    torch.testing.assert_close(torch.from_numpy(found), expected)
