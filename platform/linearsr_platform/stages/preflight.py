"""What is refused before anything starts: everything that can be known without a worker."""

from collections.abc import Sequence
from pathlib import Path
from uuid import uuid4

from linearsr.codec_source import check_codec
from linearsr.metrics import Meter, MetricError, MissingWeightsError, find_weights, metric_spec
from linearsr.opencv import check_installed
from linearsr_platform import storage
from linearsr_platform.errors import UserError
from linearsr_platform.recipe.schema import Recipe
from linearsr_platform.tracking.store import check_reachable
from linearsr_platform.train.kernels import kernels_here


def check_before_start(recipe: Recipe) -> None:
    """Refuse a run whose storage cannot be written, whose MLflow does not answer, or whose codec, metrics or network lack weights.

    Also one with compiled kernels on a cluster of this machine, if it has no compiler.

    Raises:
        UserError: saying which, and what to do.
        CodecError, DegradationError: the same of the codec, and of OpenCV where the degradation needs it.
    """
    check_before_training(recipe)
    if recipe.tracking.uri is not None:
        check_reachable(recipe.tracking.uri)
    for protocol in recipe.evaluate.protocols:
        _check_metrics(recipe.evaluate.measured(protocol), protocol, recipe)


def check_before_training(recipe: Recipe) -> None:
    """Refuse what `check_before_start` refuses, as far as it concerns training without tracking."""
    check_codec(recipe.model.codec)
    check_installed(recipe.degradation)
    check_first_weights(recipe.model.init_weights)
    check_writable(recipe.storage)
    # Of another cluster, its machines know.
    kernels_here(wanted=recipe.cluster.compiled_kernels and recipe.cluster.address is None)
    _check_metrics(recipe.validation.metrics, "quickstart", recipe)


def _check_metrics(names: Sequence[str], protocol: str, recipe: Recipe) -> None:
    try:
        Meter([name for name in names if metric_spec(name).scope == "picture"], protocol, recipe.validation.weights)
        for name in names:
            find_weights(name, None if recipe.validation.weights is None else Path(recipe.validation.weights))
    except MissingWeightsError as error:
        raise UserError(f"{error}; `linearsr prefetch RECIPE --what metrics` brings it") from error
    except MetricError as error:
        raise UserError(str(error)) from error


def check_first_weights(url: str | None) -> None:
    """Refuse weights to start from that are not there."""
    if url is not None and not storage.exists(url):
        raise UserError(f"model.init_weights: got {url!r}; expected a safetensors file; fix: write one with `linearsr import-sana`")


def check_writable(url: str) -> None:
    """Write and remove a small file under a storage root, which must be one that workers see too."""
    if not storage.is_shared(url):
        raise UserError(f"storage: got {url!r}, the memory of this process; expected a place that workers see; fix: storage: runs")
    probe = storage.join(url, f"write-test-{uuid4().hex}")
    try:
        storage.write_bytes(probe, b"")
        storage.remove(probe)
    except OSError as error:
        raise UserError(f"storage: got {url!r}; expected a place that can be written: {error}; fix: --set storage=...") from error
