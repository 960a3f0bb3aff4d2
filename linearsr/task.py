"""What the platform trains: build a network, make examples, take a training loss, validate.

The platform knows this class only by the protocol it satisfies, and builds it in each worker from a picklable config.
"""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from linearsr.captions import Captions
from linearsr.codec_source import verify_codec
from linearsr.config import AugmentationConfig
from linearsr.constants import Constant
from linearsr.degradation import augment, degrade_pair
from linearsr.flow import interpolate, sample_times
from linearsr.kernels import Kernels, use_kernels
from linearsr.latent import LatentSpace
from linearsr.metrics import Meter
from linearsr.model import SuperResolver
from linearsr.sampling import sample_euler
from linearsr.tags import Caption
from linearsr.task_config import TaskConfig

Array = NDArray[np.generic]
PLAIN = AugmentationConfig(flips=False, scales=(1.0, 1.0), colour=False)
"""No augmentation but the choice of the crop."""


def to_pixels(image: Tensor) -> Tensor:
    """Map uint8 (..., 0 to 255) to float32 in [-1, 1]."""
    return image.float() / 127.5 - 1


def crop_on_grid(
    image: NDArray[np.uint8], latent: Array, crop_px: int, factor: int, rng: np.random.Generator
) -> tuple[NDArray[np.uint8], Array]:
    """Cut a random crop (crop_px, crop_px, 3) and the same part of its latent (c, crop_px / factor, crop_px / factor).

    Raises:
        ValueError: if the latent (c, H // factor, W // factor) is smaller than the crop or of another image.
    """
    grid = tuple(side // factor for side in image.shape[:2])
    side = crop_px // factor
    if latent.shape[1:] != grid or min(grid) < side:
        raise ValueError(
            f"latent: got shape {latent.shape} for an image of {image.shape[1]}x{image.shape[0]} px; expected {grid}, "
            f"at least {side} a side; fix: a smaller crop_px, or a larger data.min_side_px"
        )
    top, left = (int(rng.integers(0, length - side, endpoint=True)) for length in grid)
    crop = image[top * factor : top * factor + crop_px, left * factor : left * factor + crop_px]
    return np.ascontiguousarray(crop), np.ascontiguousarray(latent[:, top : top + side, left : left + side])


class SuperResolutionTask:
    """Flow-matching training of one `SuperResolver` on one interval of noise levels."""

    kernels: Kernels | None = None
    """What networks and metrics compute with on a CPU; None is plain torch. Set it before `build`."""

    def __init__(self, config: TaskConfig) -> None:
        """Keep the config; nothing heavy happens before `build`, but the codec's weights are compared with their hash.

        Raises:
            CodecError: if this machine has another codec than `config.codec_digest` says, or none.
        """
        if config.codec_digest is not None:
            verify_codec(config.model.codec, config.codec_digest)
        self.config = config
        self._space = LatentSpace(config.model, config.statistics)
        self._loss_weights = Constant(self._space.loss_weights())
        self._meter: Meter | None = None
        self.captions = Captions(config.model.tags, config.text)

    def __getstate__(self) -> dict[str, object]:
        """Travel without the networks of metrics: who makes crops elsewhere has no use for them, and would start CUDA for those on one."""
        return {**vars(self), "_meter": None}

    def build(self) -> nn.Module:
        """Return a freshly initialised network on the CPU in float32, the same for the same seed."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.seed)
            network = SuperResolver(self.config.model, self.config.statistics)
        use_kernels(network, self.kernels)
        return network

    def transform(
        self, image: NDArray[np.uint8], tags: Sequence[str] | Caption, rng: np.random.Generator, latent: Array | None = None
    ) -> dict[str, Array]:
        """Make one training example from an HR image (H, W, 3): `hr`, `lr` uint8 (3, H, W), and captions as `Captions.example`.

        With the image's `latent` (c, H // f, W // f) by the model's codec the crop lies on its grid, and its part (c, h, w) is added.

        Raises:
            ValueError: if there is a latent, but augmentation is on, the target sharpened or the image smaller than a crop.
        """
        if latent is None:
            return self._example(augment(image, self.config.crop_px, self.config.augmentation, rng), tags, rng)
        if self.config.augmentation != PLAIN:
            raise ValueError(f"augmentation: got {self.config.augmentation} with latents of pictures as they are; expected {PLAIN}")
        if self.config.degradation.sharpens_target:
            raise ValueError("degradation: got a sharpened target with latents of pictures as they are; expected l1_gt_usm: false")
        crop, part = crop_on_grid(image, latent, self.config.crop_px, self.config.model.codec.factor, rng)
        return self._example(crop, tags, rng) | {"latent": part}

    def validation_example(self, image: NDArray[np.uint8], tags: Sequence[str] | Caption, crop_px: int, index: int) -> dict[str, Array]:
        """Make the `index`-th validation example: a plain crop, degradation and `noise`, the same at every call."""
        rng = np.random.default_rng([self.config.seed, index])
        example = self._example(augment(image, crop_px, PLAIN, rng), tags, rng, at_inference=True)
        codec = self.config.model.codec
        side = crop_px // codec.factor
        example["noise"] = rng.standard_normal((codec.latent_channels, side, side), dtype=np.float32)
        return example

    def loss(self, module: nn.Module, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the scalar loss of a batch and what to log; draws times and noise from `generator`.

        The loss is the velocity error without a prior (flow matching, method.md 1.1), and the error in units of what
        the LR prior leaves open with one.
        """
        model, count = self.config.model, batch["hr"].shape[0]
        clean = self._space.encode(to_pixels(batch["hr"])) if "latent" not in batch else self._space.normalise(batch["latent"])
        t = sample_times(count, self.config.interval, model.flow, generator).to(clean.device)
        noise = torch.randn(clean.shape, generator=generator).to(clean.device)
        captions = self.captions.mix(batch, torch.rand(count, 1, generator=generator)[:, 0])
        t_B111 = t[:, None, None, None]
        estimate = module(interpolate(clean, noise, t_B111), t, to_pixels(batch["lr"]), captions)
        error = (estimate - clean) / self._space.error_scale(t_B111)
        return (self._loss_weights.on(error.device) * error.square()).mean(), {}

    def _example(
        self, crop: NDArray[np.uint8], tags: Sequence[str] | Caption, rng: np.random.Generator, *, at_inference: bool = False
    ) -> dict[str, Array]:
        hr, lr = degrade_pair(crop, self.config.model.scale, self.config.degradation, rng)
        planes = {name: np.ascontiguousarray(image.transpose(2, 0, 1)) for name, image in (("hr", hr), ("lr", lr))}
        return {**planes, **self.captions.example(tags, at_inference=at_inference)}

    @torch.no_grad()
    def validate(self, module: nn.Module, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Restore a validation batch and measure it against the truth: metric name -> (B,) float values.

        The path starts at the top of the interval, from noise or from the truth noised to that level, and follows
        `validation_steps` Euler steps; the last estimate is decoded. Of tags it reads what inference does: `Captions.at_inference`.
        """
        low, high = self.config.interval
        lr = to_pixels(batch["lr"])
        clean = self._space.encode(to_pixels(batch["hr"]))
        steps, captions = self.config.validation_steps, self.captions.at_inference(batch)
        times = [high - (high - low) * i / steps for i in range(steps)]
        start = interpolate(clean, batch["noise"].to(clean.device), torch.tensor(high))

        def denoise(z: Tensor, t: float) -> Tensor:
            return module(z, torch.full((z.shape[0],), t, device=z.device), lr, captions)  # type: ignore[no-any-return]

        restored = self._space.decode(sample_euler(denoise, start, times))
        if self._meter is None:
            self._meter = Meter(self.config.metrics, "quickstart", self.config.metric_weights, self.kernels)
        return self._meter.measure(restored / 2 + 0.5, batch["hr"].float() / 255)
