"""Settings of a training stage and of its validation. Imports no torch."""

from math import ceil
from typing import Annotated, Any, Literal

from pydantic import Field

from linearsr.config import MIN_POINTS
from linearsr.guard import GuardConfig
from linearsr_platform.errors import UserError
from linearsr_platform.recipe.section import Count, CountOrZero, Fraction, NotNegative, Positive, Section

PLACEMENT = frozenset({"workers", "min_workers", "accumulation", "zero", "loader_workers", "max_failures", "keep_checkpoints"})
"""Keys of a training stage that say where it runs, and not what it computes: a run whose recipe changes them is still the same run."""


class ZeroConfig(Section):
    """How DeepSpeed shards a trainer. Source: DeepSpeed's own configuration keys."""

    stage: Literal[0, 1, 2, 3] = 2
    """ZeRO stage: 0 replicates, 1 shards optimizer states, 2 gradients too, 3 parameters too."""
    extra: dict[str, object] = Field(default_factory=dict)
    """Passed to DeepSpeed's configuration untouched, under what this recipe sets."""


class KneeConfig(Section):
    """ESGF: when training of a stage has reached its knee."""

    metrics: tuple[str, ...] = ("psnr_y", "ssim_y", "gmsd")
    """Validation metrics that vote."""
    patience: Count | None = None
    """Validation points on a plateau that end the stage although nothing got worse; unset waits until it does, or for `max_steps`."""
    min_points: Annotated[int, Field(ge=MIN_POINTS)] = MIN_POINTS
    """Validation points before any confirmation."""
    keep: Annotated[int, Field(ge=2)] = 24
    """EMA snapshots kept as candidates."""
    stop: bool = True
    """End the stage once the knee is confirmed or training diverges; otherwise only record it."""


class TrainConfig(Section):
    """One training stage."""

    max_steps: Count
    """Optimizer steps at most; the knee usually ends the stage before."""
    max_seconds: Positive | None = None
    """Wall-clock budget of the loop; at its end the stage stops as if at `max_steps`."""
    batch_size: Count = 8
    """Crops a step over all workers and accumulation."""
    accumulation: Count = 1
    """Micro-batches a worker sums before a step."""
    crop_px: Count = 128
    """Side of a training crop, HR pixels."""
    lr: Positive = 1e-4
    """Peak learning rate of AdamW."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    weight_decay: NotNegative = 0.01
    warmup_steps: CountOrZero = 0
    """Steps of linear warm-up."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after warm-up; cosine falls to 0 at `max_steps`."""
    clip_norm: Positive = 0.1
    """Gradient norm above which gradients are scaled down. SANA: 0.1."""
    ema_decay: Fraction = 0.999
    """Decay of the exponential moving average of weights, which is what is validated and released."""
    precision: Literal["float32", "bfloat16"] = "float32"
    zero: ZeroConfig = ZeroConfig()
    workers: Count = 1
    """Ray Train workers of one trainer. May change between attempts of a run; the batch is shared out anew."""
    min_workers: Count | None = None
    """Workers to go on with while the cluster has no room for all; unset waits for all of them."""
    log_every: Count = 10
    """Steps between batches of logged metrics, at which the guard looks at them."""
    validate_every: Count = 100
    """Steps between validations; each also writes an EMA snapshot."""
    checkpoint_every: Count = 100
    """Steps between full checkpoints; a lost worker costs at most this many steps, and those taken while one was being written."""
    keep_checkpoints: Count = 2
    """Full checkpoints to keep; one more than is needed, in case the last is damaged."""
    max_failures: CountOrZero = 3
    """Worker-group restarts before the stage fails."""
    crops_per_image: Count = 8
    """Crops taken from an image each time it is read."""
    loader_workers: Annotated[CountOrZero, Field(exclude=True)] = 0
    """Processes of each worker that decode, crop and degrade ahead; 0 does it between steps. Results do not depend on it."""
    knee: KneeConfig = KneeConfig()
    guard: GuardConfig = GuardConfig()
    """When training goes back to its last good state; off in no recipe of ours."""

    @property
    def micro_batch_size(self) -> int:
        """Crops of one forward on one worker."""
        return self.batch_size // (self.workers * self.accumulation)

    @property
    def least_workers(self) -> int:
        """Workers that it can start with."""
        return self.workers if self.min_workers is None else self.min_workers

    def on_workers(self, workers: int) -> "TrainConfig":
        """Return the same training on another number of workers: the same batch, in micro-batches that are no larger.

        Raises:
            UserError: if the batch cannot be shared out evenly.
        """
        if workers == self.workers:
            return self
        if self.batch_size % workers:
            raise UserError(
                f"train.batch_size: got {self.batch_size} for {workers} workers; expected a multiple of them; fix: train.workers, "
                "or train.min_workers"
            )
        each = self.batch_size // workers
        parts = range(ceil(each / self.micro_batch_size), each + 1)
        accumulation = next(count for count in parts if each % count == 0)
        return self.model_copy(update={"workers": workers, "min_workers": None, "accumulation": accumulation})

    def decisive(self) -> dict[str, Any]:
        """Return the settings that decide what is computed, as JSON; all but `PLACEMENT`."""
        return self.model_dump(mode="json", exclude=set(PLACEMENT))


class ValidationConfig(Section):
    """How a training stage is validated; costs little, so it can run often."""

    crops: Count = 16
    """Fixed crops from the held-back strips."""
    crop_px: Count = 128
    """Their side, HR pixels."""
    batch_size: Count = 8
    steps: Count = 2
    """Sampler steps; an expert starts from the noised truth at the top of its own interval."""
    metrics: tuple[str, ...] = ("psnr_y", "ssim_y", "gmsd")
    weights: str | None = None
    """Local folder with the weights of learned metrics (LPIPS, MUSIQ, ...), the same on every node."""
