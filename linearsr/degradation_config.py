"""Configuration of the second-order degradations: the published presets, each a frozen dataclass with its numbers. Imports no torch.

The keys are those of Real-ESRGAN's option files, letter by letter, where this project would call some of them otherwise: a block of such a
file then works as it stands. The keys that differ say so. First order alone is `linearsr.config.DegradationConfig`.
"""

from dataclasses import dataclass, fields
from typing import Literal

from linearsr.config import DegradationConfig, require

KernelKind = Literal["iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso"]
KERNEL_KINDS: tuple[KernelKind, ...] = ("iso", "aniso", "generalized_iso", "generalized_aniso", "plateau_iso", "plateau_aniso")

SMALLEST_KERNEL_PX = 7
"""Smallest side of a blur kernel. Source: Real-ESRGAN, realesrgan/data/realesrgan_dataset.py, where 7 to 21 stand in the code."""

_RANGES = {"blur_sigma": (0.05, 32), "betag_range": (0.05, 32), "betap_range": (0.05, 32), "resize_range": (0.02, 8)}
_STRENGTHS = {"noise_range": (0, 255), "poisson_scale_range": (0, 32), "jpeg_range": (1, 100)}
_PROBABILITIES = ("sinc_prob", "gaussian_noise_prob", "gray_noise_prob")


@dataclass(frozen=True, kw_only=True, slots=True)
class SecondOrderDegradation:
    """Blur, resize, noise and JPEG, twice, with a sinc filter at the end. The defaults are Real-ESRGAN's.

    Ranges are drawn uniformly a sample; noise is in 8-bit levels, kernels in pixels whatever the size of the crop. A `2` marks the second
    round. Source: Real-ESRGAN, section 3 and options/train_realesrgan_x4plus.yml.
    """

    gt_usm: bool = True
    """Sharpen HR before it is degraded, and take that as the target of training."""
    l1_gt_usm: bool | None = None
    """Whether the target is the sharpened HR too, where `gt_usm` says that LR comes from it; unset is yes."""

    blur_kernel_size: int = 21
    """Largest side of a kernel, odd; sides are drawn among the odd numbers from 7 on, unless `kernel_range` gives both ends."""
    kernel_range: tuple[int, int] | None = None
    """Smallest and largest side of a kernel, odd. Not a key of Real-ESRGAN's, which has 7 and 21 in its code."""
    kernel_list: tuple[KernelKind, ...] = KERNEL_KINDS
    """Kinds of kernel that are drawn when it is no sinc filter."""
    kernel_prob: tuple[float, ...] = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
    """Weights of `kernel_list`."""
    sinc_prob: float = 0.1
    """Probability of a sinc filter in place of a blur."""
    blur_sigma: tuple[float, float] = (0.2, 3.0)
    """Standard deviation of a kernel along each axis."""
    betag_range: tuple[float, float] = (0.5, 4.0)
    """Shape of generalised Gaussians: half are drawn below 1, half above."""
    betap_range: tuple[float, float] = (1.0, 2.0)
    """Shape of plateaus, drawn the same way."""
    resize_prob: tuple[float, float, float] = (0.2, 0.7, 0.1)
    """Weights of up, down and keep."""
    resize_range: tuple[float, float] = (0.15, 1.5)
    """Smallest and largest factor: down is drawn from the first to 1, up from 1 to the second."""
    gaussian_noise_prob: float = 0.5
    """Probability of Gaussian noise; else it is Poisson noise."""
    noise_range: tuple[float, float] = (1.0, 30.0)
    """Standard deviation of Gaussian noise."""
    poisson_scale_range: tuple[float, float] = (0.05, 3.0)
    """Factor on Poisson noise."""
    gray_noise_prob: float = 0.4
    """Probability of noise that is the same in all channels."""
    jpeg_range: tuple[float, float] = (30.0, 95.0)
    """JPEG quality."""

    second_order_prob: float = 1.0
    """Probability of the second blur, resize and noise; else JPEG and sinc follow at once. InvSR's key."""
    second_blur_prob: float = 0.8
    """Probability of the second blur."""
    blur_kernel_size2: int = 21
    kernel_range2: tuple[int, int] | None = None
    """As `kernel_range`, and of the final sinc filter too."""
    kernel_list2: tuple[KernelKind, ...] = KERNEL_KINDS
    kernel_prob2: tuple[float, ...] = (0.45, 0.25, 0.12, 0.03, 0.12, 0.03)
    sinc_prob2: float = 0.1
    blur_sigma2: tuple[float, float] = (0.2, 1.5)
    betag_range2: tuple[float, float] = (0.5, 4.0)
    betap_range2: tuple[float, float] = (1.0, 2.0)
    resize_prob2: tuple[float, float, float] = (0.3, 0.4, 0.3)
    resize_range2: tuple[float, float] = (0.3, 1.2)
    """As `resize_range`, but relative to the size that LR will have."""
    gaussian_noise_prob2: float = 0.5
    noise_range2: tuple[float, float] = (1.0, 25.0)
    poisson_scale_range2: tuple[float, float] = (0.05, 2.5)
    gray_noise_prob2: float = 0.4
    jpeg_range2: tuple[float, float] = (30.0, 95.0)
    final_sinc_prob: float = 0.8
    """Probability of the final sinc filter, which comes before or after the second JPEG, with the resize to LR's size."""

    no_degradation_prob: float = 0.0
    """Probability of an LR that is HR reduced and nothing else. StableSR's key."""

    gt_size: int | None = None
    """Accepted so that a block can be pasted, and not read: `crop_px` of each stage says how large crops are."""
    queue_size: int | None = None
    """Not read: a pool gives batches variety where a batch shares its draws; here each sample has its own."""
    percep_gt_usm: bool | None = None
    """Not read: there is no perceptual loss."""
    gan_gt_usm: bool | None = None
    """Not read: there is no discriminator."""

    def __post_init__(self) -> None:
        """Check ranges, probabilities, and that every kind of kernel has its weight."""
        for suffix in ("", "2"):
            for name, (lowest, highest) in (_RANGES | _STRENGTHS).items():
                self._check_range(name + suffix, lowest, highest)
            self._check_kernels(suffix)
            for name in _PROBABILITIES:
                self._check_probability(name + suffix)
            weights = getattr(self, f"resize_prob{suffix}")
            require(
                all(w >= 0 for w in weights) and sum(weights) > 0, f"degradation.resize_prob{suffix}", weights, "weights >= 0, not all 0"
            )
            for name in ("betag_range", "betap_range", "resize_range"):
                low, high = getattr(self, name + suffix)
                require(low <= 1 <= high, f"degradation.{name}{suffix}", (low, high), "a pair on both sides of 1")
        for name in ("second_order_prob", "second_blur_prob", "final_sinc_prob", "no_degradation_prob"):
            self._check_probability(name)
        require(self.gt_usm or not self.l1_gt_usm, "degradation.l1_gt_usm", self.l1_gt_usm, "no sharpened target where gt_usm is off")

    def kernel_sides(self, suffix: str) -> tuple[int, ...]:
        """Return the odd sides of kernels, pixels, that are drawn in round `suffix`, empty for the first and `2` for the second."""
        given: tuple[int, int] | None = getattr(self, f"kernel_range{suffix}")
        low, high = given if given is not None else (SMALLEST_KERNEL_PX, getattr(self, f"blur_kernel_size{suffix}"))
        return tuple(range(low, high + 1, 2))

    @property
    def sharpens_target(self) -> bool:
        """Whether training aims at the sharpened HR."""
        return self.gt_usm and self.l1_gt_usm is not False

    def _check_range(self, name: str, lowest: float, highest: float) -> None:
        low, high = getattr(self, name)
        require(lowest <= low <= high <= highest, f"degradation.{name}", (low, high), f"an ascending pair in [{lowest}, {highest}]")

    def _check_probability(self, name: str) -> None:
        value = getattr(self, name)
        require(0 <= value <= 1, f"degradation.{name}", value, "a number in [0, 1]")

    def _check_kernels(self, suffix: str) -> None:
        kinds, weights = getattr(self, f"kernel_list{suffix}"), getattr(self, f"kernel_prob{suffix}")
        fits = len(weights) == len(kinds) and all(weight >= 0 for weight in weights) and sum(weights) > 0
        require(fits, f"degradation.kernel_prob{suffix}", weights, f"one weight >= 0 for each of kernel_list{suffix}, not all 0")
        size, given = getattr(self, f"blur_kernel_size{suffix}"), getattr(self, f"kernel_range{suffix}")
        require(
            size % 2 == 1 and SMALLEST_KERNEL_PX <= size <= 51, f"degradation.blur_kernel_size{suffix}", size, "an odd number in [7, 51]"
        )
        if given is not None:
            odd = given[0] % 2 == 1 and given[1] % 2 == 1 and 3 <= given[0] <= given[1] <= 51
            require(odd, f"degradation.kernel_range{suffix}", given, "an ascending pair of odd numbers in [3, 51]")


@dataclass(frozen=True, kw_only=True, slots=True)
class RealEsrganDegradation(SecondOrderDegradation):
    """Real-ESRGAN's own. Source: options/train_realesrgan_x4plus.yml and train_realesrnet_x4plus.yml, whose numbers are the same."""

    preset: Literal["real-esrgan"] = "real-esrgan"


@dataclass(frozen=True, kw_only=True, slots=True)
class StableSrDegradation(SecondOrderDegradation):
    """StableSR's, milder. Source: configs/stableSRNew/v2-finetune_text_T_512.yaml."""

    preset: Literal["stablesr"] = "stablesr"
    blur_sigma: tuple[float, float] = (0.2, 1.5)
    betag_range: tuple[float, float] = (0.5, 2.0)
    betap_range: tuple[float, float] = (1.0, 1.5)
    resize_range: tuple[float, float] = (0.3, 1.5)
    noise_range: tuple[float, float] = (1.0, 15.0)
    poisson_scale_range: tuple[float, float] = (0.05, 2.0)
    jpeg_range: tuple[float, float] = (60.0, 95.0)
    second_blur_prob: float = 0.5
    blur_kernel_size2: int = 11
    # The file says 11, its loader (basicsr/data/realesrgan_dataset.py) does not read it and draws 7 to 21 in both rounds.
    kernel_range2: tuple[int, int] | None = (7, 21)
    blur_sigma2: tuple[float, float] = (0.2, 1.0)
    betag_range2: tuple[float, float] = (0.5, 2.0)
    betap_range2: tuple[float, float] = (1.0, 1.5)
    resize_range2: tuple[float, float] = (0.6, 1.2)
    noise_range2: tuple[float, float] = (1.0, 12.0)
    poisson_scale_range2: tuple[float, float] = (0.05, 1.0)
    jpeg_range2: tuple[float, float] = (60.0, 100.0)
    no_degradation_prob: float = 0.01


@dataclass(frozen=True, kw_only=True, slots=True)
class InvSrDegradation(SecondOrderDegradation):
    """InvSR's: Real-ESRGAN's ranges, half of the samples without the second round. Source: configs/sd-turbo-sr-ldis.yaml."""

    preset: Literal["invsr"] = "invsr"
    # `use_sharp: False` there.
    gt_usm: bool = False
    # Its loader (basicsr/data/realesrgan_dataset.py) draws odd sides from 3 to just under blur_kernel_size.
    kernel_range: tuple[int, int] | None = (3, 19)
    blur_kernel_size2: int = 15
    kernel_range2: tuple[int, int] | None = (3, 13)
    second_order_prob: float = 0.5


Degradation = DegradationConfig | RealEsrganDegradation | StableSrDegradation | InvSrDegradation
"""Any of the presets, told apart by `preset`."""

PRESETS: dict[str, type[Degradation]] = {
    "quickstart": DegradationConfig,
    "real-esrgan": RealEsrganDegradation,
    "stablesr": StableSrDegradation,
    "invsr": InvSrDegradation,
}
"""The presets by the name that a recipe gives."""

UNREAD_KEYS = ("gt_size", "queue_size", "percep_gt_usm", "gan_gt_usm")
"""Keys of Real-ESRGAN's files that are accepted and mean nothing here."""


def changed_keys(config: Degradation) -> tuple[str, ...]:
    """Return the keys whose values are not those of the preset."""
    published = type(config)()
    return tuple(field.name for field in fields(config) if getattr(config, field.name) != getattr(published, field.name))
