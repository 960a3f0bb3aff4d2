"""The recipe: every setting of a run, written once, typed and strict. Imports no torch.

Nothing here changes a value; what follows from other values is a property. Types and ranges are checked here, rules between
settings in `linearsr_platform.recipe.rules`; `linearsr_platform.recipe.load` applies both.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from linearsr.config import (
    BACKBONES,
    MIN_POINTS,
    AugmentationConfig,
    BackboneConfig,
    CodecConfig,
    DegradationConfig,
    FlowConfig,
    SamplerConfig,
    TextEncoderConfig,
)
from linearsr.experts import EFFECTIVE_LOG_SNR, bisect_boundaries
from linearsr.guard import GuardConfig

Fraction = Annotated[float, Field(ge=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
NotNegative = Annotated[float, Field(ge=0)]
Count = Annotated[int, Field(ge=1)]
CountOrZero = Annotated[int, Field(ge=0)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", description="letters, digits, - and _, not starting with - or _")]


Experts = Annotated[int, Field(ge=1, le=6)]

STAGE_NAMES = ("prepare", "pretrain", "experts", "finetune", "assemble", "evaluate", "register", "promote")
"""Stages of a run, in order."""
SEARCH_STAGE_NAMES = ("prepare", "pretrain", "profile", "trials", "finalists")
"""Stages of a search, in order."""
TRAINING_STAGES = ("pretrain", "experts.train", "finetune.train")
"""Dotted keys of the stages that train."""


class Section(BaseModel):
    """Base of every recipe section: unknown keys are errors and nothing changes after validation."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class SourceConfig(Section):
    """Where photographs come from."""

    url: str
    """Folder, glob or fsspec URL; `package://NAME/SUBFOLDER` is a folder inside an installed Python package."""
    table: str | None = None
    """CSV beside the recipe: `file,split,quality,tags,licence,source`. With it, only the files it names are taken."""
    halve_jpeg: bool = True
    """Halve JPEG sources by Lanczos so that their 8 px blocks do not teach the network JPEG."""
    limit: Count | None = None
    """Take at most this many images, in order of name."""


class DataConfig(Section):
    """What `prepare` turns into shards."""

    sources: Annotated[dict[str, SourceConfig], Field(min_length=1)]
    """Sources by name; plain text is short for `{url: TEXT}`, so that `--set data.sources.NAME=URL` adds one."""
    held_out: tuple[str, ...] = ()
    """File stems that are never trained on, beside those a table marks `held-out`."""
    validation_px: CountOrZero = 128
    """Width of the strip cut off each training photograph for validation crops, HR pixels; 0 cuts none."""
    min_side_px: Count = 64
    """Images with a shorter side are quarantined."""
    samples_per_shard: Count = 1000
    """Images a `.tar` shard."""


class ModelSection(Section):
    """The network that is trained; tags and latent statistics come from the data."""

    scale: Literal[1, 2, 4, 8] = 4
    """Upsampling factor."""
    preset: Literal["nano", "tiny", "sana-600m", "sana-1600m"] | None = None
    """A named backbone; exclusive with `backbone`."""
    backbone: BackboneConfig | None = None
    """A backbone written out."""
    codec: CodecConfig = CodecConfig()
    flow: FlowConfig = FlowConfig()
    prior: Literal["none", "lr"] = "none"
    """`lr`: the LR image is a Gaussian prior for the latent; `none`: plain SANA velocity."""
    max_tags: Count = 8
    """Tag tokens a sample."""
    tag_dropout: Fraction = 0.1
    """Probability of training a sample without its tags."""
    tags_from_lr: Fraction = 0.0
    """Probability of training a sample with the tags of its LR image, `tags_lr`, which `linearsr tag --lr` writes. method.md 7 #10: 0.4."""
    text: TextEncoderConfig | None = None
    """A text encoder that reads the tags as a prompt, once, when data is prepared; unset learns an embedding of each tag. The backbone's
    `caption_width` must be the encoder's width."""

    init_weights: str | None = None
    """Safetensors that pre-training starts from, such as `linearsr import-sana` writes; unset starts from random weights."""

    @property
    def resolved_backbone(self) -> BackboneConfig:
        """The backbone, whichever way it was given."""
        return self.backbone if self.backbone is not None else BACKBONES[str(self.preset)]


class ZeroConfig(Section):
    """How DeepSpeed shards a trainer. Source: DeepSpeed's own configuration keys."""

    stage: Literal[0, 1, 2, 3] = 2
    """ZeRO stage: 0 replicates, 1 shards optimizer states, 2 gradients too, 3 parameters too."""
    extra: dict[str, object] = {}
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
    """Ray Train workers of one trainer."""
    log_every: Count = 10
    """Steps between batches of logged metrics."""
    validate_every: Count = 100
    """Steps between validations; each also writes an EMA snapshot."""
    checkpoint_every: Count = 100
    """Steps between full checkpoints; a lost worker costs at most this many steps."""
    max_failures: CountOrZero = 3
    """Worker-group restarts before the stage fails."""
    crops_per_image: Count = 8
    """Crops taken from an image each time it is read."""
    knee: KneeConfig = KneeConfig()
    guard: GuardConfig = GuardConfig()
    """When training goes back to its last good state; off in no recipe of ours."""

    @property
    def micro_batch_size(self) -> int:
        """Crops of one forward on one worker."""
        return self.batch_size // (self.workers * self.accumulation)


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


class ExpertsSection(Section):
    """The log-SNR experts."""

    boundaries: tuple[float, ...] | Literal["bisection"] = "bisection"
    """Ascending noise levels, or the hierarchical bisection with `anchor`. `from:NAME` in a recipe or `--set` stands for the numbers
    that the search NAME under the same storage root has found."""
    anchor: Annotated[float, Field(gt=0, lt=1)] = 0.875
    """Noise level that splits structure from detail. LinearSR, Wan2.2."""
    overlap_log_snr: NotNegative = 0.25
    """Training reaches this far past inner edges, in log-SNR."""
    cpus_per_worker: Positive | None = None
    """Overrides `cluster.cpus_per_worker` while experts share the cluster."""
    train: TrainConfig

    @property
    def resolved_boundaries(self) -> tuple[float, ...]:
        """The boundaries as numbers, whichever way they were given."""
        return bisect_boundaries(self.anchor) if self.boundaries == "bisection" else self.boundaries


class FinetuneSection(Section):
    """Fine-tuning of each expert from its knee."""

    subset: Literal["high-quality", "train"] = "high-quality"
    """Which split feeds it."""
    train: TrainConfig


class ProfileSection(Section):
    """The profiling pass over the pre-trained network: what its gradients say about the noise axis. Source: method.md 5.3."""

    levels: Annotated[int, Field(ge=8, le=256)] = 64
    """Levels that the range of log-SNR is divided into."""
    samples: Annotated[int, Field(ge=4)] = 32
    """Gradients a level; the error falls with their root."""
    crops: Count = 4
    """Training crops a gradient."""


class ScoreSection(Section):
    """How a trial is scored: its experts together restore held-back crops as a release would."""

    crops: Count = 32
    """Crops from the held-back strips; the same noise and degradation for every trial."""
    crop_px: Count = 128
    batch_size: Count = 8
    steps: Count = 12
    """Sampler steps on the shifted uniform grid; `sampler` gives the rest. Enough that every expert is asked."""


class FinalistsSection(Section):
    """What is trained anew at the end, through the same trainers as a run, to tell a win from noise."""

    top: Count = 2
    """Best trials that are repeated, beside the paper's boundaries, uniform ones and a single expert."""
    seeds: Annotated[int, Field(ge=2)] = 3
    """Trainings of each with other seeds; none of them the search's own."""


class SearchSection(Section):
    """The search over expert boundaries. Source: method.md part 5."""

    parent: Name | None = None
    """Run under the same storage root whose pre-trained network is taken; unset pre-trains here."""
    experts: Annotated[tuple[Experts, ...], Field(min_length=1)] = (4,)
    """How many experts a trial may have."""
    log_snr: tuple[float, float] = EFFECTIVE_LOG_SNR
    """Range in which boundaries may lie."""
    step_log_snr: Positive = 0.25
    """Boundaries lie on a grid of this step, so that the same intervals come again and need not be trained again."""
    min_width_log_snr: Positive = 0.5
    """Least width of an expert's interval."""
    trials: Count = 16
    """Boundaries that are tried, the proposals among them. More may be asked for later: the search goes on where it was."""
    rungs: Annotated[tuple[Count, ...], Field(min_length=1)] = (200, 400)
    """Optimizer steps of all experts of a trial together, ascending; after each rung but the last the worse trials stop."""
    reduction: Annotated[float, Field(gt=1)] = 2.0
    """One in this many trials goes on to the next rung."""
    metric: str = "psnr_y"
    """Metric of the scores, one of `validation.metrics`."""
    max_concurrent: Count | None = None
    """Trials at once at most; unset takes as many as the cluster has room for."""
    seed: int = 0
    """Of the searcher and of the experts' training."""
    profile: ProfileSection = ProfileSection()
    score: ScoreSection = ScoreSection()
    finalists: FinalistsSection = FinalistsSection()


class EvaluateSection(Section):
    """The held-out evaluation of a bundle."""

    protocol: Literal["quickstart", "classic"] = "quickstart"
    metrics: tuple[str, ...] = ("psnr_y", "ssim_y", "fsim", "gmsd", "vsi")
    perceptual: str = "gmsd"
    """The perceptual metric this recipe claims to beat bicubic on, named beforehand."""
    step_sweep: tuple[Count, ...] = (1, 2, 4, 8)
    """Sampler steps plotted against perception and distortion."""
    seed: int = 0
    """Seed of degradation and noise of the evaluation."""


class PromoteSection(Section):
    """The gate between `challenger` and `champion`."""

    metric: str = "psnr_y"
    """Metric of the evaluation that decides."""
    estimate: Literal["one_step", "routed"] = "one_step"
    """Which of the model's two outputs it is taken from."""
    tolerance: NotNegative = 0.0
    """How much worse than the champion is still promoted."""


class TrackingConfig(Section):
    """Where MLflow keeps runs and models."""

    uri: str | None = None
    """Tracking and registry URI; unset is a sqlite file under the storage root."""
    experiment: str | None = None
    """Experiment name; unset is the recipe's name."""
    model_name: Name | None = None
    """Registered model name; unset is `linearsr-<recipe name>`."""


class ClusterConfig(Section):
    """Where it runs: a profile usually sets this section."""

    address: str | None = None
    """Ray address; unset starts a local cluster and stops it at the end."""
    num_cpus: Count | None = None
    """CPUs of a local cluster; unset takes what the machine has."""
    num_gpus: CountOrZero = 0
    """GPUs of a local cluster."""
    cpus_per_worker: Positive = 1.0
    gpus_per_worker: NotNegative = 0.0
    object_store_mb: Count = 256
    """Shared memory of a local cluster, MiB."""
    queue_timeout_s: Positive = 600.0
    """How long a trainer may wait for room before the stage fails."""


class Recipe(Section):
    """A whole run."""

    name: Name
    seed: int = 0
    storage: str = "runs"
    """Root of everything this run writes: folder or fsspec URL."""
    data: DataConfig
    degradation: DegradationConfig = DegradationConfig()
    augmentation: AugmentationConfig = AugmentationConfig()
    model: ModelSection
    validation: ValidationConfig = ValidationConfig()
    pretrain: TrainConfig
    experts: ExpertsSection
    finetune: FinetuneSection
    sampler: SamplerConfig = SamplerConfig()
    evaluate: EvaluateSection = EvaluateSection()
    promote: PromoteSection = PromoteSection()
    search: SearchSection | None = None
    """Read by `linearsr search` alone."""
    tracking: TrackingConfig = TrackingConfig()
    cluster: ClusterConfig = ClusterConfig()

    def training_stage(self, key: str) -> TrainConfig:
        """Return the settings of a training stage by its dotted key, one of `TRAINING_STAGES`."""
        if key == "pretrain":
            return self.pretrain
        return self.experts.train if key == "experts.train" else self.finetune.train

    @property
    def model_name(self) -> str:
        """Name in the model registry."""
        return self.tracking.model_name or f"linearsr-{self.name}"
