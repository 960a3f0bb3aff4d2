"""Measure pictures one by one under several protocols: the work that evaluation hands out in pieces.

What is made of a picture depends on the picture, the model and the request alone: seeds are those of the request, sums run on one thread,
and nothing is kept between pictures. So it does not matter who does which.
"""

import base64
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from linearsr.artefacts import Edges, colour_shift, evaluation_tiles, grid_edges, seam, tile_edges
from linearsr.colour import fix_colours
from linearsr.degradation import upsample
from linearsr.frechet import InceptionFeatures
from linearsr.kernels import Kernels
from linearsr.latent import upsample_bicubic
from linearsr.metric_table import METRICS, metric_spec
from linearsr.metrics import Meter, MetricError
from linearsr.protocols import PROTOCOLS
from linearsr.upscaler import Estimate, Upscaler, token_grid
from linearsr_platform.data.extras import one_thread

Pixels = NDArray[np.uint8]
"""A picture, (H, W, 3)."""
ESTIMATES: tuple[Estimate, ...] = ("one_step", "routed")
ROWS = ("bicubic", *ESTIMATES)
"""What is compared of a model, beside the LR image and the original."""
RESTORED = "restored"
"""The row of pictures that were there."""


@dataclass(frozen=True, kw_only=True)
class Photograph:
    """A picture to measure, with what is known of it."""

    name: str
    """Without folder and suffix; the same in every folder of the test set."""
    original: Pixels | None = None
    lr: Pixels | None = None
    restored: Pixels | None = None
    """A picture that somebody made already; None has the model make it."""
    tags: tuple[str, ...] = ()
    """What the model is told."""
    tags_of_lr: bool = False
    """Whether `tags` are those of the LR image, as inference has them, and not those of the original."""

    def load(self) -> "Photograph":
        """Return it; pieces that are files are read here."""
        return self

    @property
    def lr_tags(self) -> list[str] | None:
        """Tags of the LR image that a model reads; None if it reads others, or there is nothing left to make."""
        return list(self.tags) if self.tags_of_lr and self.restored is None else None

    @property
    def digest(self) -> str:
        """SHA-256 of the name and of the pixels of original and LR picture."""
        found = hashlib.sha256(self.name.encode())
        for pixels in (self.original, self.lr):
            found.update(b"none" if pixels is None else repr(pixels.shape).encode() + np.ascontiguousarray(pixels).tobytes())
        return found.hexdigest()


class Piece(Protocol):
    """A photograph, or where it can be read."""

    @property
    def name(self) -> str:
        """Its name, which also stands in errors."""

    @property
    def tags(self) -> tuple[str, ...]:
        """What a model is told of it."""

    def load(self) -> Photograph:
        """Return it with its pixels."""
        ...


@dataclass(frozen=True, kw_only=True)
class Request:
    """What is measured of every picture."""

    metrics: Mapping[str, tuple[str, ...]]
    """Protocol to its metrics, besides the artefacts."""
    weights: str | None = None
    """Folder with the weights of learned metrics."""
    seed: int = 0
    """Of the model's noise, the same for every picture."""
    sweep_steps: tuple[int, ...] = ()
    """Numbers of sampler steps to measure besides, under the first protocol."""
    grid_px: int | None = None
    """Grid on which seams of finished pictures are looked for; None measures none."""


@dataclass(frozen=True, kw_only=True)
class Measured:
    """The numbers of one picture."""

    digest: str
    """That of the photograph."""
    values: Mapping[str, Mapping[str, Mapping[str, float]]]
    """Protocol to row to metric to value; the sweep is in rows `steps-N` of the first protocol."""
    features: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    """Protocol to row, and `original`, to what FID compares, as base64 of float32."""
    lr_tags: list[str] | None = None
    """Tags of the LR image that were read; None if there were none."""

    def to_json(self) -> str:
        """Write it as one JSON object; NaN stays what it is."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "Measured":
        """Read what `to_json` writes.

        Raises:
            ValueError: if it is anything else.
        """
        try:
            return cls(**json.loads(text))
        except (RecursionError, TypeError) as error:
            raise ValueError(str(error)) from error


class KeepPicture(Protocol):
    """Takes the pictures that a measurement makes, as they were before any colour fix."""

    def __call__(self, photograph: Photograph, row: str, picture: Pixels) -> None:
        """Keep one."""


class Measurer:
    """Holds a loaded model, or none, and the metrics; measures one photograph at a time."""

    def __init__(
        self, request: Request, upscaler: Upscaler | None, keep: KeepPicture | None = None, kernels: Kernels | None = None
    ) -> None:
        """Build the metrics; their networks are loaded by the first photograph.

        Args:
            request: what is measured.
            upscaler: makes the pictures; None where every photograph brings its own.
            keep: is given every picture that is made.
            kernels: compute PSNR-Y; None is plain torch.

        Raises:
            MetricError: if a metric cannot be computed here.
        """
        self._request, self._upscaler, self._keep = request, upscaler, keep
        self._meters = {
            name: Meter([metric for metric in metrics if metric_spec(metric).scope == "picture"], name, request.weights, kernels)
            for name, metrics in request.metrics.items()
        }
        with_fid = any(metric_spec(metric).scope == "set" for metrics in request.metrics.values() for metric in metrics)
        self._inception = InceptionFeatures(request.weights) if with_fid else None

    def __call__(self, photograph: Photograph) -> Measured:
        """Make the pictures of a photograph and measure them under every protocol."""
        with one_thread():
            values: dict[str, dict[str, dict[str, float]]] = {name: {} for name in self._meters}
            features: dict[str, dict[str, str]] = {}
            for row, picture, seams in self._pictures(photograph):
                for name in self._meters if row in (*ROWS, RESTORED) else [next(iter(self._meters))]:
                    fixed = self._fix(picture, photograph, name)
                    values[name][row] = self._measure(name, row, fixed, photograph, seams)
                    if self._wants_features(name, row):
                        features.setdefault(name, {})[row] = self._features(fixed)
                if self._keep is not None and row in ROWS:
                    self._keep(photograph, row, to_pixels(picture))
            if features and photograph.original is not None:
                original = self._features(to_tensor(photograph.original))
                features = {name: {**rows, "original": original} for name, rows in features.items()}
        return Measured(digest=photograph.digest, values=values, features=features, lr_tags=photograph.lr_tags)

    def _pictures(self, photograph: Photograph) -> Iterator[tuple[str, Tensor, float | None]]:
        """Yield each row with its picture (1, 3, H, W) and its seams, if they are known."""
        if photograph.restored is not None:
            restored = to_tensor(photograph.restored)
            yield RESTORED, restored, self._seam_on_grid(photograph, restored)
            return
        assert self._upscaler is not None  # noqa: S101 (a photograph without a picture needs a model)
        assert photograph.lr is not None  # noqa: S101
        upscaler, lr = self._upscaler, to_tensor(photograph.lr)
        yield "bicubic", to_tensor(upsample(photograph.lr, upscaler.bundle.config.scale)), 1.0

        def upscale(estimate: Estimate, steps: int | None = None, tile: int | None = None) -> Tensor:
            made = upscaler.upscale_tensor(lr, tags=photograph.tags, seed=self._request.seed, steps=steps, estimate=estimate, tile=tile)
            return made.clamp(0, 1)

        tiling = evaluation_tiles(token_grid(lr.shape[2], lr.shape[3], upscaler.bundle.config.lr_pixels_per_token))
        for estimate in ESTIMATES:
            whole = upscale(estimate)
            edges = tile_edges(tiling, upscaler.bundle.config.codec.factor, (whole.shape[2], whole.shape[3]))
            tiled = upscale(estimate, tile=max(tiling.side)) if any(edges) else whole
            yield estimate, whole, _seam(tiled, edges, whole)
        for steps in self._request.sweep_steps:
            yield f"steps-{steps}", upscale("routed", steps), None

    def _seam_on_grid(self, photograph: Photograph, restored: Tensor) -> float | None:
        if self._request.grid_px is None:
            return None
        edges = grid_edges(self._request.grid_px, (restored.shape[2], restored.shape[3]))
        return _seam(restored, edges, None if photograph.original is None else to_tensor(photograph.original))

    def _fix(self, picture: Tensor, photograph: Photograph, protocol: str) -> Tensor:
        """Take colours from the LR picture as the protocol says; a finished picture stays what it is."""
        kind = PROTOCOLS[protocol].colour_fix
        if kind == "none" or photograph.lr is None or photograph.restored is not None:
            return picture
        lr = to_tensor(photograph.lr)
        return fix_colours(picture, upsample_bicubic(lr, picture.shape[2] // lr.shape[2]).clamp(0, 1), kind)

    def _measure(self, protocol: str, row: str, picture: Tensor, photograph: Photograph, seams: float | None) -> dict[str, float]:
        rounded = to_tensor(to_pixels(picture))
        original = None if photograph.original is None else to_tensor(photograph.original)
        try:
            found = {name: float(values[0]) for name, values in self._meters[protocol].measure(rounded, original).items()}
        except ValueError as error:
            raise MetricError(f"{photograph.name}, {row}: {error}") from error
        if row not in (*ROWS, RESTORED):
            return found
        if seams is not None:
            found["seam"] = seams
        if photograph.lr is not None:
            found["colour_shift"] = colour_shift(rounded[0], to_tensor(photograph.lr)[0])
        return found

    def _wants_features(self, protocol: str, row: str) -> bool:
        wanted = any(METRICS[name].scope == "set" for name in self._request.metrics[protocol])
        return self._inception is not None and wanted and row in (*ROWS, RESTORED)

    def _features(self, picture: Tensor) -> str:
        assert self._inception is not None  # noqa: S101 (asked for by `_wants_features`)
        return base64.b64encode(self._inception.of(to_pixels(picture)).tobytes()).decode("ascii")


def features_of(text: str) -> NDArray[np.float32]:
    """Read features (2048,) that a measurement kept."""
    return np.frombuffer(base64.b64decode(text), dtype=np.float32)


def to_tensor(pixels: Pixels) -> Tensor:
    """Return (1, 3, H, W) float32 in [0, 1] of (H, W, 3)."""
    return torch.from_numpy(np.array(pixels)).permute(2, 0, 1)[None].float() / 255


def to_pixels(picture: Tensor) -> Pixels:
    """Return (H, W, 3) of (1, 3, H, W) in [0, 1], rounded to 8 bit."""
    rounded: Pixels = (picture[0].permute(1, 2, 0) * 255).round().to(torch.uint8).numpy()
    return rounded


def _seam(picture: Tensor, edges: Edges, control: Tensor | None) -> float:
    """Measure seams of pictures as they are saved, (1, 3, H, W)."""
    rounded, other = to_tensor(to_pixels(picture)), None if control is None else to_tensor(to_pixels(control))[0]
    return seam(rounded[0], edges, other)


def save_png(pixels: Pixels, path: Any) -> None:
    """Write pixels to a file."""
    Image.fromarray(pixels).save(path, format="PNG")


Measure = Callable[[Piece], Measured]
"""What `Make` of a crew returns here."""
