"""Image metrics with a fixed protocol: PSNR, SSIM and MS-SSIM by `linearsr.similarity`, the others by pyiqa.

Nothing is ever downloaded: a metric that needs weights reads them from a local folder or says what to put there.
"""

import hashlib
import importlib
import io
import pickle
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from linearsr.kernels import Kernels
from linearsr.metric_table import METRICS, MetricSpec, metric_spec
from linearsr.protocols import PROTOCOLS, protocol_named
from linearsr.similarity import IDENTICAL_PSNR_DB, ms_ssim, psnr, psnr_y, ssim, ssim_y

__all__ = [
    "IDENTICAL_PSNR_DB",
    "METRICS",
    "NO_WEIGHTS",
    "PROTOCOLS",
    "Meter",
    "MetricError",
    "MetricSpec",
    "MissingWeightsError",
    "find_weights",
    "import_pyiqa",
    "load_state",
    "metric_spec",
    "orientations",
    "smallest_side",
    "weights_digests",
]

_SMALLEST_SIDE_PX = {"ssim_y": 11, "ssim": 11, "ms_ssim": 176, "niqe": 192, "maniqa": 224, "maniqa-pipal": 224}
# Metrics whose own file is loaded here, and whether it holds every parameter: LPIPS and DISTS add theirs to an ImageNet network.
_OWN_STATE = {"lpips": False, "dists": False, "musiq": True, "maniqa": True, "maniqa-pipal": True}
_NIQE_FROM_BASICSR = "niqe_pris_params.npz"


class MetricError(ValueError):
    """A metric cannot be computed here; the message says what is missing and how to bring it."""


class MissingWeightsError(MetricError):
    """A metric's weights are not in the weights folder."""


def orientations(names: Sequence[str]) -> dict[str, bool]:
    """Map each metric to whether a higher value is better, as `KneeDetector` wants it."""
    return {name: metric_spec(name).higher_is_better for name in names}


_OWN: dict[str, Callable[..., Tensor]] = {"psnr_y": psnr_y, "ssim_y": ssim_y, "psnr": psnr, "ssim": ssim, "ms_ssim": ms_ssim}
_CUT_AT_BORDER = ("psnr_y", "ssim_y", "psnr", "ssim")
NO_WEIGHTS = "none"
"""Stands for the hash of a metric that needs no weights."""


def weights_digests(names: Sequence[str], folder: str | None) -> dict[str, str]:
    """Return what tells one metric's weights from others: the SHA-256 of its file, of several the SHA-256 over their own.

    Args:
        names: metrics, of `METRICS`; one without weights gets `NO_WEIGHTS`.
        folder: local folder with the files.

    Raises:
        MissingWeightsError: if a file is not in the folder.
    """
    digests = {}
    for name in names:
        files = find_weights(name, None if folder is None else Path(folder))
        hashes = [_sha256(file) for file in files]
        joined = hashes[0] if len(hashes) == 1 else hashlib.sha256("\n".join(hashes).encode()).hexdigest()
        digests[name] = joined if hashes else NO_WEIGHTS
    return digests


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def smallest_side(name: str, border_px: int) -> int:
    """Return the pixels that a picture's sides must have at least for a metric, under a protocol that cuts `border_px` off each."""
    return _SMALLEST_SIDE_PX.get(name, 1) + (2 * border_px if name in _CUT_AT_BORDER else 0)


class Meter:
    """Measures images by several metrics under one protocol."""

    def __init__(
        self, names: Sequence[str], protocol: str = "quickstart", weights: str | None = None, kernels: Kernels | None = None
    ) -> None:
        """Check that every metric can be computed here; networks are loaded at the first `measure`.

        Args:
            names: metrics of single pictures, of `METRICS`.
            protocol: one of `PROTOCOLS`.
            weights: local folder with the files of weights that learned metrics need.
            kernels: compute PSNR-Y on a CPU; plain torch does without them.

        Raises:
            ValueError: for an unknown name or protocol.
            MetricError: if pyiqa is needed and cannot be imported.
            MissingWeightsError: if a file of weights is not in the folder.
        """
        self.names = tuple(names)
        for name in self.names:
            if metric_spec(name).scope != "picture":
                raise ValueError(
                    f"metric {name!r}: got a metric of {metric_spec(name).scope}s; expected one of pictures; fix: leave it out"
                )
        chosen = protocol_named(protocol)
        self._border_px = chosen.border_px
        self.protocol = chosen.describe()
        self._weights = None if weights is None else Path(weights)
        self._own: dict[str, Callable[..., Tensor]] = {**_OWN, "psnr_y": partial(psnr_y, kernels=kernels)}
        self._measures: dict[tuple[str, torch.device], Callable[..., Tensor]] = {}
        for name in self.names:
            if metric_spec(name).needs == "weights":
                find_weights(name, self._weights)
        if any(metric_spec(name).needs != "none" for name in self.names):
            import_pyiqa(self.names)

    @torch.no_grad()
    def measure(self, sr: Tensor, hr: Tensor | None = None) -> dict[str, Tensor]:
        """Return metric -> (B,) float64 values of restored images against originals.

        Both are rounded to 8 bit first, as a saved picture is. An image with a NaN or infinite pixel measures NaN.

        Args:
            sr: restored RGB (B, 3, H, W), nominally in [0, 1].
            hr: originals of the same shape; may be left out if no metric needs them.

        Raises:
            ValueError: if shapes differ, an original is missing, or the images are too small for a metric.
        """
        if hr is not None and hr.shape != sr.shape:
            raise ValueError(f"hr: got shape {tuple(hr.shape)}; expected that of sr, {tuple(sr.shape)}; fix: crop both alike")
        broken = ~torch.isfinite(sr).flatten(1).all(dim=1)
        sr, hr = _to_8_bit(sr), None if hr is None else _to_8_bit(hr)
        values = {name: self._one(name, sr, hr) for name in self.names}
        return {name: value.masked_fill(broken, float("nan")) for name, value in values.items()}

    def _one(self, name: str, sr: Tensor, hr: Tensor | None) -> Tensor:
        spec, border = metric_spec(name), self._border_px if name in _CUT_AT_BORDER else 0
        if spec.full_reference and hr is None:
            raise ValueError(f"metric {name!r}: got no originals; expected `hr`; fix: leave out full-reference metrics")
        smallest, side = smallest_side(name, border), min(sr.shape[-2:])
        if side < smallest:
            raise ValueError(f"metric {name!r}: got images of {side} px; expected sides of at least {smallest} px; fix: larger crops")
        window = (..., slice(border, sr.shape[-2] - border), slice(border, sr.shape[-1] - border))
        images = [image[window] for image in (sr, hr) if image is not None]
        if name not in _OWN and (name, sr.device) not in self._measures:
            self._measures[name, sr.device] = _build(name, self._weights, sr.device)
        measure = self._own[name] if name in _OWN else self._measures[name, sr.device]
        return measure(*images[: 2 if spec.full_reference else 1]).reshape(-1).double()


def _to_8_bit(image: Tensor) -> Tensor:
    return image.detach().float().nan_to_num().clamp_(0, 1).mul_(255).round_().div_(255)


def import_pyiqa(names: Sequence[str]) -> Any:
    """Import pyiqa for these metrics.

    Raises:
        MetricError: if it does not import.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Its own dependencies warn of their future at every import.
            return importlib.import_module("pyiqa")
    except ImportError as error:
        wanted = ", ".join(name for name in names if metric_spec(name).needs != "none")
        raise MetricError(f'metrics {wanted}: got {error}; expected pyiqa to import; fix: pip install "linearsr[metrics]"') from error


def find_weights(name: str, folder: Path | None) -> list[Path]:
    """Return the files of a metric's weights, all of which exist; none for a metric without.

    Raises:
        MissingWeightsError: if one is not in the folder.
    """
    found = []
    for file in metric_spec(name).weights_files:
        candidates = [file, _NIQE_FROM_BASICSR] if name == "niqe" else [file]
        present = [folder / candidate for candidate in candidates if folder is not None and (folder / candidate).is_file()]
        if not present:
            where = "no folder of weights" if folder is None else f"no such file in {folder}"
            wanted = " or ".join(candidates)
            into = "a folder and set `validation.weights` to it" if folder is None else f"{folder} (`validation.weights`)"
            raise MissingWeightsError(f"metric {name!r}: got {where}; expected {wanted}; fix: put it into {into}, or leave {name!r} out")
        found.append(present[0])
    return found


def _build(name: str, folder: Path | None, device: torch.device) -> Callable[..., Tensor]:
    """Build a pyiqa metric on `device` without network access, console output or a change of the random state."""
    pyiqa = import_pyiqa([name])
    files = find_weights(name, folder)
    try:
        with torch.random.fork_rng(devices=[]), redirect_stdout(io.StringIO()), warnings.catch_warnings(), _offline(files):
            warnings.simplefilter("ignore")
            metric = pyiqa.create_metric(name, device=device, **_options(name, files))
        if name in _OWN_STATE:
            load_state(metric.net, files[0], strict=_OWN_STATE[name])
    except (RuntimeError, ValueError, KeyError, EOFError, OSError, AttributeError, pickle.UnpicklingError) as error:
        what = ", ".join(map(str, files)) or "pyiqa"
        raise MetricError(f"metric {name!r}: got an error from {what} ({error}); expected it to load; fix: download it again") from error
    return metric  # type: ignore[no-any-return]


def _options(name: str, files: Sequence[Path]) -> dict[str, object]:
    """Return what makes pyiqa read `files`, or nothing, instead of downloading."""
    if name == "clipiqa":
        _import_clip()
        return {"backbone": str(files[0])}
    if name == "niqe":
        return _niqe_options(files[0])
    return {"pretrained": False} if name in _OWN_STATE else {}


def _niqe_options(file: Path) -> dict[str, object]:
    matlab = importlib.import_module("scipy.io")
    if file.name != _NIQE_FROM_BASICSR:
        try:
            matlab.loadmat(file)
        except matlab.matlab.MatReadError as error:  # Not a ValueError, so it is made one.
            raise ValueError(error) from error
        return {"pretrained_model_path": str(file)}
    # BasicSR publishes the same two arrays as .npz and measures Y of YCbCr; pyiqa reads .mat only.
    as_mat = io.BytesIO()
    with np.load(file, allow_pickle=False) as arrays:
        matlab.savemat(as_mat, {"mu_prisparam": arrays["mu_pris_param"], "cov_prisparam": arrays["cov_pris_param"]})
    as_mat.seek(0)
    return {"pretrained_model_path": as_mat, "color_space": "ycbcr"}


def load_state(net: torch.nn.Module, file: Path, *, strict: bool) -> None:
    """Load a state dict without unpickling code; unless `strict`, the file may leave parameters out.

    Raises:
        ValueError: if it is of another network.
    """
    state = torch.load(file, map_location="cpu", weights_only=True)
    missing, unexpected = net.load_state_dict({key.removeprefix("module."): value for key, value in state.items()}, strict=False)
    if unexpected or (strict and missing):
        raise ValueError(f"{len(unexpected)} unknown and {len(missing)} missing parameters for {type(net).__name__}")


def _import_clip() -> None:
    """Import openai-clip, which takes `packaging` from `pkg_resources`, where setuptools 70 and later no longer have it."""
    importlib.import_module("packaging.version")
    stand_in = ModuleType("pkg_resources")
    vars(stand_in)["packaging"] = importlib.import_module("packaging")
    before = sys.modules.get("pkg_resources")
    sys.modules["pkg_resources"] = stand_in
    try:
        importlib.import_module("clip")
    finally:
        del sys.modules["pkg_resources"]
        if before is not None:
            sys.modules["pkg_resources"] = before


@contextmanager
def _offline(files: Sequence[Path]) -> Iterator[None]:
    """Let torchvision find `files` as if downloaded, and timm build networks without fetching weights that are replaced anyway."""
    hub_folder = torch.hub.get_dir()
    timm = importlib.import_module("timm")
    create = timm.create_model

    def create_untrained(model: str, **options: object) -> object:
        return create(model, **{**options, "pretrained": False})

    with TemporaryDirectory() as scratch:
        cache = Path(scratch, "checkpoints")
        cache.mkdir()
        for file in files:
            (cache / file.name).symlink_to(file.resolve())
        torch.hub.set_dir(scratch)
        timm.create_model = create_untrained  # type: ignore[attr-defined]
        try:
            yield
        finally:
            torch.hub.set_dir(hub_folder)
            timm.create_model = create  # type: ignore[attr-defined]
