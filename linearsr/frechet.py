"""Frechet inception distance: how far two sets of pictures are from each other as sets.

Features are those of pyiqa's `fid` in its default mode, clean-fid: each channel resized to 299 x 299 by Pillow's bicubic kernel in
float32, then the pooled features of the Inception network that FID was defined with. The network's weights are read from a local folder.
"""

import importlib
import pickle
import warnings
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from linearsr.metrics import MetricError, find_weights, import_pyiqa, load_state

FEATURES = 2048
LEAST_IMAGES = FEATURES + 1
"""A covariance of so many features has full rank from this many pictures on; with fewer the distance says more about their number."""
INPUT_PX = 299

Features = NDArray[np.float32]


class InceptionFeatures:
    """Maps pictures to the features that FID compares."""

    def __init__(self, weights: str | None, device: torch.device | str = "cpu") -> None:
        """Load the network.

        Args:
            weights: folder with the file that `METRICS["fid"]` names.
            device: where it runs.

        Raises:
            MissingWeightsError: if the file is not there.
            MetricError: if pyiqa does not import, or the file is not of this network.
        """
        (file,) = find_weights("fid", None if weights is None else Path(weights))
        import_pyiqa(["fid"])
        module = importlib.import_module("pyiqa.archs.inception")
        load = module.load_pretrained_network
        # pyiqa would download, and unpickle whatever it finds.
        vars(module)["load_pretrained_network"] = lambda net, url: load_state(net, file, strict=True)
        blocks = [module.InceptionV3.BLOCK_INDEX_BY_DIM[FEATURES]]
        try:
            with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # torchvision warns of how pyiqa calls it.
                self._net = module.InceptionV3(output_blocks=blocks).eval().to(device)
        except (RuntimeError, ValueError, KeyError, EOFError, OSError, AttributeError, pickle.UnpicklingError) as error:
            raise MetricError(f"metric 'fid': got an error from {file} ({error}); expected it to load; fix: download it again") from error
        finally:
            vars(module)["load_pretrained_network"] = load
        self._device = torch.device(device)

    @torch.no_grad()
    def of(self, picture: NDArray[np.uint8]) -> Features:
        """Return the features (2048,) of one picture (H, W, 3)."""
        features: Tensor = self._net(inception_input(picture)[None].to(self._device), False, False)[0]
        return features.flatten().float().cpu().numpy()


def inception_input(picture: NDArray[np.uint8]) -> Tensor:
    """Resize a picture (H, W, 3) as clean-fid does, to (3, 299, 299) in about [-1, 1]."""
    size = (INPUT_PX, INPUT_PX)
    planes = [Image.fromarray(picture[..., c].astype(np.float32)).resize(size, Image.Resampling.BICUBIC) for c in range(3)]
    return torch.from_numpy(np.stack([np.asarray(plane).clip(0, 255) for plane in planes])).sub(128).div(128)


def check_enough(count: int, least: int = LEAST_IMAGES) -> None:
    """Refuse too few pictures.

    Raises:
        MetricError: saying how many are needed and why.
    """
    if count < least:
        raise MetricError(
            f"metric 'fid': got {count} images; expected at least {least} in each set, because the covariance of {FEATURES} features "
            "is singular with fewer; fix: a larger test set, or leave 'fid' out"
        )


def frechet_inception_distance(ours: Features, theirs: Features, *, least: int = LEAST_IMAGES) -> float:
    """Return the distance of two sets of features, (N, F) and (M, F).

    Raises:
        MetricError: if a set has fewer than `least`.
    """
    for features in (ours, theirs):
        check_enough(len(features), least)
    moments = [(features.mean(axis=0), np.cov(features, rowvar=False)) for features in (ours.astype(np.float64), theirs.astype(np.float64))]
    return frechet_distance(*moments[0], *moments[1])


def frechet_distance(
    mean_a: NDArray[np.float64], covariance_a: NDArray[np.float64], mean_b: NDArray[np.float64], covariance_b: NDArray[np.float64]
) -> float:
    """Return the squared Frechet distance of two Gaussians, |m_a - m_b|^2 + tr(A + B - 2 (A B)^(1/2)).

    The eigenvalues of A B are those of A^(1/2) B A^(1/2), which is symmetric: its roots are real, and no matrix square root is needed.

    Args:
        mean_a, mean_b: (F,).
        covariance_a, covariance_b: (F, F), symmetric and positive semidefinite.
    Source: Dowson and Landau 1982; Heusel et al. 2017, equation 6.
    """
    values, vectors = np.linalg.eigh(covariance_a)
    root = (vectors * np.sqrt(values.clip(min=0))) @ vectors.T
    cross = np.sqrt(np.linalg.eigvalsh(root @ covariance_b @ root).clip(min=0)).sum()
    difference = mean_a - mean_b
    return float(difference @ difference + np.trace(covariance_a) + np.trace(covariance_b) - 2 * cross)
