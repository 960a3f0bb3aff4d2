"""Configuration of the method: frozen dataclasses, each field with its unit and its source. Imports no torch.

Every class validates itself and raises `ValueError` with the offending value; none changes what it was given.
"""

from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Literal

PAPER_BOUNDARIES = (0.223, 0.875, 0.939)
"""Noise levels that split the four experts. Source: LinearSR section 3, SNR-based mixture of experts."""

DC_AE_FACTOR, DC_AE_CHANNELS = 32, 32
"""Pixels per latent along one side, and channels of a latent, of DC-AE f32c32. Source: SANA; method.md 1.7."""

MIN_POINTS = 6
"""Fewest evaluations that the knee detector says anything about."""


def require(holds: bool, where: str, value: object, rule: str) -> None:
    """Raise `ValueError` naming the field, the value it had and the rule it broke, unless `holds`."""
    if not holds:
        raise ValueError(f"{where}: got {value!r}; expected {rule}")


@dataclass(frozen=True, kw_only=True, slots=True)
class CodecConfig:
    """A latent codec: turns pixels into fewer, wider tokens, by an exactly invertible transform or by SANA's autoencoder."""

    kind: Literal["space_to_depth", "haar", "dc-ae"] = "haar"
    """`haar` is the orthonormal wavelet packet: it separates what LR determines from what it does not. `dc-ae` is SANA's
    deep-compression autoencoder f32c32, run by diffusers with the weights that `source` names. method.md 1.7."""
    factor: int = 4
    """Pixels per latent along one side, a power of two in [1, 32]; 32 for `dc-ae`."""
    source: str | None = None
    """`dc-ae` alone: local folder with diffusers' `config.json` and safetensors, or a hub id that is in the local cache."""
    tile: int = 32
    """`dc-ae` alone: latents up to this many positions a side are coded whole, larger ones in overlapping tiles; 32 is 1024 px."""

    def __post_init__(self) -> None:
        """Check the factor, and that weights are named where there are some."""
        require(self.factor in (1, 2, 4, 8, 16, 32), "codec.factor", self.factor, "a power of two in [1, 32]")
        require(self.tile >= 4, "codec.tile", self.tile, "an integer >= 4")
        if self.kind == "dc-ae":
            require(self.factor == DC_AE_FACTOR, "codec.factor", self.factor, f"{DC_AE_FACTOR} for dc-ae")
            require(bool(self.source), "codec.source", self.source, "a local folder or a hub id for dc-ae")
        else:
            require(self.source is None, "codec.source", self.source, f"null for {self.kind}, which has no weights")

    @property
    def latent_channels(self) -> int:
        """Channels of a latent: three colours times the pixels of one token, or what the autoencoder leaves of them."""
        return DC_AE_CHANNELS if self.kind == "dc-ae" else 3 * self.factor**2


@dataclass(frozen=True, kw_only=True, slots=True)
class BackboneConfig:
    """Shape of the linear-attention transformer. Source: SANA (arXiv 2410.10629) table of model sizes."""

    width: int
    """Channels of a token, C."""
    num_blocks: int
    """Transformer blocks."""
    head_width: int = 32
    """Channels of one self-attention head. SANA: 32."""
    num_cross_heads: int = 4
    """Heads of the cross-attention to tag tokens. SANA: 16 (0.6B), 20 (1.6B)."""
    ffn_ratio: float = 2.5
    """Hidden channels of Mix-FFN divided by C. SANA: 2.5."""
    caption_width: int = 2304
    """Channels of a tag or text embedding before its projection. Gemma-2-2b: 2304."""
    stem_width: int = 32
    """Channels of the LR stem's output, concatenated to the latent. method.md 2.8."""
    qk_norm: bool = False
    """RMS-normalise queries and keys (SANA-1.5). Off in the paper."""

    def __post_init__(self) -> None:
        """Check sizes and that heads divide the width."""
        for name in ("width", "num_blocks", "head_width", "num_cross_heads", "caption_width", "stem_width"):
            require(getattr(self, name) >= 1, f"backbone.{name}", getattr(self, name), "a positive integer")
        require(self.width % self.head_width == 0, "backbone.head_width", self.head_width, f"a divisor of width {self.width}")
        require(
            self.width % self.num_cross_heads == 0, "backbone.num_cross_heads", self.num_cross_heads, f"a divisor of width {self.width}"
        )
        require(self.ffn_ratio > 0, "backbone.ffn_ratio", self.ffn_ratio, "a positive number")

    @property
    def ffn_width(self) -> int:
        """Hidden channels of one half of Mix-FFN's gated product."""
        return int(self.width * self.ffn_ratio)


BACKBONES: dict[str, BackboneConfig] = {
    "nano": BackboneConfig(width=64, num_blocks=3, caption_width=32),
    "tiny": BackboneConfig(width=384, num_blocks=8, num_cross_heads=6, caption_width=256),
    "sana-600m": BackboneConfig(width=1152, num_blocks=28, num_cross_heads=16),
    "sana-1600m": BackboneConfig(width=2240, num_blocks=20, num_cross_heads=20),
}
"""Named sizes. Parameters with an f32 codec of 32 channels, the LR stem and no tags: nano 0.37M, tiny 20.02M, sana-600m 591.90M,
sana-1600m 1604.65M. Without the stem and its channels `sana-*` are the published 591.75M and 1604.46M. method.md 2.1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FlowConfig:
    """Rectified flow and its distribution of training times. Source: SANA training configuration; method.md 1.3, 1.4."""

    shift: float = 3.0
    """Flow shift s: t' = s u / (1 + (s - 1) u). SANA: 3 up to 2K pixels."""
    logit_mean: float = 0.0
    """Mean of the logit-normal over the unshifted time u."""
    logit_std: float = 1.0
    """Standard deviation of the same."""
    endpoint_fraction: float = 0.0
    """Share of training draws put exactly at the noisiest end of the interval, where a one-step estimate is taken."""
    loss_weighting: Literal["latent", "pixel"] = "latent"
    """`latent`: every channel counts the same (SANA); `pixel`: as much as its open residual weighs in the picture, which needs
    a codec that keeps the norm, so not `dc-ae`."""

    def __post_init__(self) -> None:
        """Check ranges."""
        require(0 <= self.endpoint_fraction < 1, "flow.endpoint_fraction", self.endpoint_fraction, "a number in [0, 1)")
        require(isfinite(self.shift) and self.shift > 0, "flow.shift", self.shift, "a positive number")
        require(isfinite(self.logit_std) and self.logit_std > 0, "flow.logit_std", self.logit_std, "a positive number")


@dataclass(frozen=True, kw_only=True, slots=True)
class TagsConfig:
    """Tag guidance (TAG): which words the network knows, and how often it must do without them."""

    encoder: Literal["learned", "text"] = "learned"
    """`learned` embeds ids of a fixed vocabulary; `text` takes the hidden states of a frozen text encoder, as SANA does."""
    vocabulary: tuple[str, ...] = ()
    """Known tags, lower case. Tags outside it are ignored."""
    max_tags: int = 8
    """Tag tokens a sample; more are cut, fewer are padded and masked."""
    dropout: float = 0.1
    """Probability of training a sample without tags, for classifier-free guidance. SANA: 0.1."""
    from_lr: float = 0.0
    """Probability of training a sample with the tags of its LR image, which is all a tagger sees later. method.md 7 #10: 0.4."""

    def __post_init__(self) -> None:
        """Check the ranges of probabilities and that no tag is listed twice."""
        require(0 <= self.dropout < 1, "tags.dropout", self.dropout, "a number in [0, 1)")
        rest = 1 - self.dropout
        require(0 <= self.from_lr <= rest + 1e-9, "tags.from_lr", self.from_lr, f"a number in [0, {rest:g}], what dropout leaves")
        require(self.max_tags >= 1, "tags.max_tags", self.max_tags, "a positive integer")
        require(len(set(self.vocabulary)) == len(self.vocabulary), "tags.vocabulary", self.vocabulary, "distinct words")


@dataclass(frozen=True, kw_only=True, slots=True)
class TextEncoderConfig:
    """A text encoder that reads tags as a prompt: a local folder as transformers saves it."""

    folder: str
    """Folder with config.json, tokenizer and safetensors; read where data is prepared and where tags are given to `upscale`."""
    kind: Literal["transformers", "gemma2"] = "transformers"
    """`transformers`: last hidden states of any encoder; `gemma2`: Gemma-2 as SANA uses it."""
    max_tokens: int = 80
    """Tokens a prompt. SANA: 300; prompts of tags need fewer than 80. method.md 7 #10."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """Dtype that the encoder runs in; embeddings are float32 in either case."""
    instruction: str = ""
    """Text before every prompt but the empty one, for `gemma2`. SANA puts a long one, tags need none. method.md 7 #10."""
    suffix: str = ""
    """Words after the tags when a picture is restored, in validation too; none in training. SeeSR: `clean, high-resolution, 8k`."""

    def __post_init__(self) -> None:
        """Check that there is a folder and room for a first and a last token."""
        require(bool(self.folder), "text.folder", self.folder, "the folder of a text encoder")
        require(self.max_tokens >= 2, "text.max_tokens", self.max_tokens, "an integer of at least 2")
        require(not self.instruction or self.kind == "gemma2", "text.instruction", self.instruction, "none, except for kind gemma2")


@dataclass(frozen=True, kw_only=True, slots=True)
class TextSource:
    """Where the embeddings of a network that reads prompts come from; part of the network's identity."""

    encoder: TextEncoderConfig
    digest: str
    """SHA-256 of the encoder's files and settings: see `linearsr.text.encoder_digest`."""
    null: tuple[tuple[float, ...], ...]
    """Embedding (tokens, width) of the null prompt "", for samples and guidance without tags."""

    def __post_init__(self) -> None:
        """Check that the null prompt has tokens of one width."""
        widths = {len(token) for token in self.null}
        require(len(widths) == 1 and 0 not in widths, "text.null", widths, "tokens of one width")
        require(len(self.null) <= self.encoder.max_tokens, "text.null", len(self.null), f"at most {self.encoder.max_tokens} tokens")

    @property
    def width(self) -> int:
        """Channels of an embedding."""
        return len(self.null[0])


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """Everything that fixes a network's function except its weights and latent statistics."""

    scale: int = 4
    """Upsampling factor, a power of two."""
    codec: CodecConfig = field(default_factory=CodecConfig)
    backbone: BackboneConfig = field(default_factory=lambda: BACKBONES["nano"])
    flow: FlowConfig = field(default_factory=FlowConfig)
    tags: TagsConfig = field(default_factory=TagsConfig)
    prior: Literal["none", "lr"] = "none"
    """`none`: plain velocity, SANA-exact. `lr`: the LR image is a Gaussian prior for the latent (see `linearsr.flow`)."""

    def __post_init__(self) -> None:
        """Check that the LR grid meets the token grid by stride-2 convolutions alone, and that the loss suits the codec."""
        require(self.scale in (1, 2, 4, 8), "model.scale", self.scale, "1, 2, 4 or 8")
        require(self.codec.factor >= self.scale, "model.codec.factor", self.codec.factor, f"at least the scale, {self.scale}")
        suits = self.flow.loss_weighting == "latent" or self.codec.kind != "dc-ae"
        require(suits, "model.flow.loss_weighting", self.flow.loss_weighting, "latent for codec dc-ae, which is not orthonormal")

    @property
    def lr_pixels_per_token(self) -> int:
        """LR pixels along one side of a token: a power of two, the stem halves the grid log2 of it times."""
        return self.codec.factor // self.scale


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentStatistics:
    """Per-channel statistics of latents, measured on training crops; they are part of a model's identity."""

    mean: tuple[float, ...]
    """Mean of the raw latent of HR crops."""
    std: tuple[float, ...]
    """Standard deviation of the same; latents are divided by it, so they have unit variance."""
    residual_std: tuple[float, ...]
    """Standard deviation of (latent of HR) - (latent of upsampled LR), in units of `std`."""

    def __post_init__(self) -> None:
        """Check that the three have one length and the deviations are positive."""
        require(len(self.mean) == len(self.std) == len(self.residual_std), "statistics", len(self.mean), "three vectors of one length")
        require(all(value > 0 for value in (*self.std, *self.residual_std)), "statistics", self.std, "positive deviations")


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertsConfig:
    """How the noise axis is split. Times are noise levels t in [0, 1] after flow shift; t = 1 is pure noise."""

    boundaries: tuple[float, ...] = PAPER_BOUNDARIES
    """Ascending noise levels between neighbouring experts; n boundaries make n + 1 experts."""
    overlap_log_snr: float = 0.25
    """Each expert also trains this far past its inner edges, in log-SNR. Inference routes hard. method.md 3.6."""

    def __post_init__(self) -> None:
        """Check order and range."""
        inside = all(0 < t < 1 for t in self.boundaries)
        ordered = all(low < high for low, high in zip(self.boundaries, self.boundaries[1:], strict=False))
        require(inside and ordered, "experts.boundaries", self.boundaries, "strictly ascending numbers in (0, 1)")
        require(self.overlap_log_snr >= 0, "experts.overlap_log_snr", self.overlap_log_snr, "a number >= 0")


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerConfig:
    """How an image is drawn from noise."""

    kind: Literal["euler", "dpm++2m"] = "euler"
    """Flow-Euler or Flow-DPM-Solver++(2M). method.md 1.5."""
    num_steps: int = 20
    """Network evaluations an image."""
    guidance_scale: float = 1.0
    """Classifier-free guidance weight on tags; 1 evaluates one branch only."""
    temperature: float = 1.0
    """Standard deviation of the initial noise. 1 is the flow's own; less trades variety for fidelity."""
    times: tuple[float, ...] | None = None
    """Noise levels at which the network is evaluated, descending, in (0, 1]; None takes `grid`."""
    grid: Literal["uniform", "sana", "flow-euler"] = "uniform"
    """Where the steps lie, before the shift: `uniform`, u = 1 - i / N; `sana`, its solver's 0.999 (1 - i / N); `flow-euler`, evenly
    from 1 to nearly 0, as diffusers' flow Euler scheduler, so that few steps reach the detail expert. method.md 1.5, 3.7."""
    history: Literal["drop", "keep"] = "drop"
    """`dpm++2m` alone: what the step after a switch of experts makes of the estimate before it. `drop` takes that step at first order;
    `keep` uses the other expert's estimate, which is of second order only as far as both agree there. method.md 3.7, an ablation."""

    def __post_init__(self) -> None:
        """Check ranges, and that explicit times match the number of steps."""
        require(self.num_steps >= 1, "sampler.num_steps", self.num_steps, "a positive integer")
        require(self.guidance_scale >= 0, "sampler.guidance_scale", self.guidance_scale, "a number >= 0")
        require(0 <= self.temperature <= 1, "sampler.temperature", self.temperature, "a number in [0, 1]")
        if self.times is not None:
            descending = all(high > low for high, low in zip(self.times, self.times[1:], strict=False))
            valid = len(self.times) == self.num_steps and self.times[0] <= 1 and self.times[-1] > 0 and descending
            require(valid, "sampler.times", self.times, f"num_steps = {self.num_steps} descending numbers in (0, 1]")
            require(self.grid == "uniform", "sampler.grid", self.grid, "unset where times are given")
        if self.kind == "euler":
            require(self.history == "drop", "sampler.history", self.history, "drop for euler, which has no history")

    def to_plain(self) -> dict[str, object]:
        """Return it by name, JSON-able; `history` only if set: bundles and recipes from before there was one keep their hashes."""
        plain = asdict(self)
        if self.history == "drop":
            del plain["history"]
        return plain


@dataclass(frozen=True, kw_only=True, slots=True)
class DegradationConfig:
    """First-order synthesis of LR from HR: blur, reduce, noise, JPEG; each range is drawn uniformly a sample.

    The presets of second order are in `linearsr.degradation_config`.
    """

    preset: Literal["quickstart"] = "quickstart"
    blur_sigma_px: tuple[float, float] = (0.4, 1.6)
    """Standard deviation of the isotropic Gaussian blur, in HR pixels."""
    noise_sigma: tuple[float, float] = (0.0, 6.0)
    """Standard deviation of additive Gaussian noise, in 8-bit levels."""
    jpeg_quality: tuple[int, int] = (70, 95)
    """JPEG quality of the LR image."""

    @property
    def sharpens_target(self) -> bool:
        """Whether training aims at a sharpened HR: never with this preset."""
        return False

    def __post_init__(self) -> None:
        """Check that ranges ascend and stay legal."""
        for name, lowest, highest in (("blur_sigma_px", 0, 32), ("noise_sigma", 0, 128), ("jpeg_quality", 1, 100)):
            low, high = getattr(self, name)
            require(lowest <= low <= high <= highest, f"degradation.{name}", (low, high), f"an ascending pair in [{lowest}, {highest}]")


@dataclass(frozen=True, kw_only=True, slots=True)
class AugmentationConfig:
    """What a training crop may undergo before it is degraded."""

    flips: bool = True
    """Random mirror and quarter turns: eight poses."""
    scales: tuple[float, float] = (0.5, 1.0)
    """Size of the crop relative to the source, uniform in log: 0.5 takes a window twice as wide and halves it."""
    colour: bool = True
    """Random permutation of channels, gain and gamma of luminance."""

    def __post_init__(self) -> None:
        """Check the range of scales."""
        require(0 < self.scales[0] <= self.scales[1] <= 1, "augmentation.scales", self.scales, "an ascending pair in (0, 1]")
