"""The recipe: every setting of a run, written once, typed and strict. Imports no torch.

Nothing here changes a value; what follows from other values is a property. Types and ranges are checked here, rules between
settings in `linearsr_platform.recipe.rules`; `linearsr_platform.recipe.load` applies both.
"""

from typing import Annotated, Literal

from pydantic import Field, PlainSerializer

from linearsr.config import (
    BACKBONES,
    AugmentationConfig,
    BackboneConfig,
    CodecConfig,
    DegradationConfig,
    FlowConfig,
    SamplerConfig,
    TextEncoderConfig,
)
from linearsr.experts import bisect_boundaries
from linearsr.protocols import PROTOCOLS
from linearsr_platform.recipe.data_schema import DataConfig
from linearsr_platform.recipe.degradation_schema import DegradationSection
from linearsr_platform.recipe.promote_schema import PromoteSection
from linearsr_platform.recipe.search_schema import SearchSection
from linearsr_platform.recipe.section import (
    Count,
    CountOrZero,
    Fraction,
    Name,
    NotNegative,
    Positive,
    SecretName,
    SecretReference,
    Section,
    Seed,
)
from linearsr_platform.recipe.train_schema import TrainConfig, ValidationConfig

STAGE_NAMES = ("prepare", "pretrain", "experts", "finetune", "assemble", "evaluate", "register", "promote")
"""Stages of a run, in order."""
SEARCH_STAGE_NAMES = ("prepare", "pretrain", "profile", "trials", "finalists")
"""Stages of a search, in order."""
ProtocolName = Literal["quickstart", "classic", "stablesr", "seesr", "osediff"]
"""Keys of `linearsr.protocols.PROTOCOLS`."""
TRAINING_STAGES = ("pretrain", "experts.train", "finetune.train")
"""Dotted keys of the stages that train."""


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


class EvaluateSection(Section):
    """The held-out evaluation of a bundle."""

    protocols: tuple[ProtocolName, ...] = ("quickstart",)
    """Ways of measuring, each with a table of its own: see `linearsr.protocols`. The first is the report's main table."""
    metrics: tuple[str, ...] | None = None
    """What is measured under every protocol, where `maniqa` is the protocol's own; unset is each protocol's own list, without FID, which
    needs 2049 images. `seam` and `colour_shift` are always measured."""
    perceptual: str = "gmsd"
    """The perceptual metric this recipe claims to beat bicubic on, named beforehand."""
    step_sweep: tuple[Count, ...] = (1, 2, 4, 8)
    """Sampler steps plotted against perception and distortion."""
    seed: Seed = 0
    """Seed of degradation and noise of the evaluation."""

    def measured(self, protocol: str) -> tuple[str, ...]:
        """Return what is measured under a protocol, besides the artefacts."""
        return PROTOCOLS[protocol].resolve(self.metrics or ())


class TrackingConfig(Section):
    """Where MLflow keeps runs and models."""

    uri: str | None = None
    """Tracking and registry URI; unset is a sqlite file under the storage root."""
    experiment: str | None = None
    """Experiment name; unset is the recipe's name."""
    model_name: Name | None = None
    """Registered model name; unset is `linearsr-<recipe name>`."""
    artifacts: Literal["best", "knee", "all", "none"] = "none"
    """Which weights of each trainer its MLflow run keeps: those with the best validation, those handed on (the knee's), `all` that are
    left, or none. The bundle is kept in any case."""


class MachineConfig(Section):
    """A kind of machine that a cluster has."""

    count: Count = 1
    """How many of them, at most where the cluster grows."""
    cpus: Positive
    gpus: NotNegative = 0.0
    memory_gb: Positive | None = None
    """Host memory of one as Ray counts it, GB of 1e9 bytes: `ray start` by itself leaves 30 % to its object store. Unset is not planned
    with."""
    gpu_memory_gb: Positive | None = None
    """Memory of one GPU."""
    price_per_hour: NotNegative | None = None
    """Of one machine, in whatever currency."""


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
    gpus_per_picture_worker: NotNegative = 0.0
    """GPUs of a worker that prepares or measures photographs, where a text encoder, a DC-AE or the bundle works on them; a fraction lets
    several share one. 0 is on CPUs, which give the same numbers on every machine; a GPU's differ from them by rounding."""
    compiled_kernels: bool = False
    """Have CPUs compute what lies between a network's matrix products, and PSNR-Y, by C++ that every machine compiles for itself, once;
    each needs a compiler, `c++`. Faster than plain torch, and the same but for rounding."""
    memory_gb_per_worker: NotNegative | None = None
    """Host memory that Ray keeps for a worker, GB, so that no more train at once than there is memory for. Unset keeps what `linearsr plan`
    works out, or 95 % of a machine if that is less; 0 keeps none."""
    object_store_mb: Count = 256
    """Shared memory of a local cluster, MiB."""
    queue_timeout_s: Positive = 600.0
    """How long a trainer may wait for room before the stage fails, each time that it needs some."""
    machines: tuple[MachineConfig, ...] = ()
    """What the cluster at `address` has. Read by `linearsr plan` alone; a run asks the cluster itself."""
    secrets: dict[SecretName, SecretReference] = Field(default_factory=dict)
    """Environment variables with credentials, by where every node finds their values: `env:NAME` is a variable of the node, `file:PATH` a
    file, as Kubernetes mounts secrets. Only these references travel; a value is in no recipe, job or log."""


class Recipe(Section):
    """A whole run."""

    name: Name
    seed: Seed = 0
    storage: str = "runs"
    """Root of everything this run writes: folder or fsspec URL."""
    data: DataConfig
    degradation: DegradationSection = DegradationConfig()
    augmentation: AugmentationConfig = AugmentationConfig()
    model: ModelSection
    validation: ValidationConfig = ValidationConfig()
    pretrain: TrainConfig
    experts: ExpertsSection
    finetune: FinetuneSection
    sampler: Annotated[SamplerConfig, PlainSerializer(SamplerConfig.to_plain)] = SamplerConfig()
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
    def gate(self) -> PromoteSection:
        """The gate's rules, each with its protocol; rules that name none mean the first, and where there are several they must name one."""
        return self.promote.under(self.evaluate.protocols[0])

    @property
    def model_name(self) -> str:
        """Name in the model registry."""
        return self.tracking.model_name or f"linearsr-{self.name}"
