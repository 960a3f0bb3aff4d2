"""How published tables were measured, as data: one entry a protocol, each value with its source. Imports no torch.

The same pictures give other numbers under another protocol: a border of 4 px, MANIQA trained on other photographs, colours taken from
the LR picture before anything is measured. So a number is worth nothing without the protocol's name.

What could not be verified, because no public script says it, is in `unverified` and in `describe`.
"""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Literal

from linearsr.metric_table import metric_spec


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationProtocol:
    """One way of measuring."""

    name: str
    colour_space: Literal["Y", "RGB"]
    """Of this protocol's PSNR and SSIM: `Y` is BT.601 luminance in studio range, unrounded, as MATLAB and BasicSR; `RGB` is all channels.
    The metrics' names say it too: `psnr_y` is always Y, `psnr` always RGB."""
    border_px: int
    """Pixels cut off each side before PSNR and SSIM; all other metrics see the whole picture."""
    metrics: tuple[str, ...]
    """What is measured unless the caller says otherwise; metrics of a whole set, such as FID, only where there are enough pictures."""
    maniqa: Literal["maniqa", "maniqa-pipal"] = "maniqa"
    """Weights that `maniqa` means here: trained on KonIQ-10k, or on PIPAL."""
    colour_fix: Literal["none", "wavelet", "adain"] = "none"
    """What a model's picture takes from the LR picture before it is measured; finished pictures are measured as they are."""
    rounded_to_8_bit: bool = True
    """Whether both pictures are rounded to 8 bit first, as saved ones are."""
    paired_by: Literal["name"] = "name"
    """How restored pictures find their originals. Scripts that sort both folders pair wrongly when one picture is missing."""
    sources: Mapping[str, str] = field(default_factory=dict)
    """Field to where its value is from."""
    unverified: tuple[str, ...] = ()
    """What no public script says, in words."""

    def resolve(self, names: Sequence[str] = ()) -> tuple[str, ...]:
        """Return the metrics to measure: `names`, or the protocol's own without those of a whole set; `maniqa` is the protocol's."""
        wanted = names or tuple(name for name in self.metrics if metric_spec(name).scope != "set")
        return tuple(dict.fromkeys(self.maniqa if name == "maniqa" else name for name in wanted))

    def describe(self) -> str:
        """Say in one line what decides the numbers."""
        channels = "Y (BT.601 studio range)" if self.colour_space == "Y" else "RGB"
        parts = ["8 bit" if self.rounded_to_8_bit else "not rounded", f"PSNR and SSIM on {channels}, border {self.border_px} px cut"]
        parts += ["others on whole RGB", f"MANIQA is {self.maniqa}", f"colour fix {self.colour_fix}", f"paired by {self.paired_by}"]
        return f"{self.name}: {'; '.join(parts)}"


_OURS = "ours: a script that pairs sorted folders pairs wrongly once a picture is missing"
_ALL_PERCEPTUAL = ("psnr_y", "ssim_y", "lpips", "dists", "fid", "niqe", "musiq", "maniqa-pipal", "clipiqa")

PROTOCOLS: Mapping[str, EvaluationProtocol] = MappingProxyType(
    {
        protocol.name: protocol
        for protocol in (
            EvaluationProtocol(
                name="quickstart",
                colour_space="Y",
                border_px=4,
                metrics=("psnr_y", "ssim_y", "fsim", "gmsd", "vsi"),
                sources={
                    "colour_space": "as classic",
                    "border_px": "as classic",
                    "metrics": "ours: needs no weights",
                    "maniqa": "pyiqa's metric of that name",
                    "colour_fix": "ours: none, so that the model's own colours are measured",
                    "paired_by": _OURS,
                },
            ),
            EvaluationProtocol(
                name="classic",
                colour_space="Y",
                border_px=4,
                metrics=("psnr_y", "ssim_y"),
                sources={
                    "colour_space": "BasicSR, metrics/psnr_ssim.py: test_y_channel, BT.601 studio range",
                    "border_px": "BasicSR, options for x4: crop_border 4",
                    "metrics": "BasicSR, options for x4",
                    "maniqa": "pyiqa's metric of that name",
                    "colour_fix": "BasicSR has none",
                    "paired_by": _OURS,
                },
            ),
            EvaluationProtocol(
                name="stablesr",
                colour_space="Y",
                border_px=0,
                metrics=("psnr_y", "ssim_y", "lpips", "fid", "clipiqa", "musiq"),
                colour_fix="adain",
                sources={
                    "colour_space": "github.com/IceClear/StableSR/issues/45: the author asks for the Y channel, measured with pyiqa",
                    "border_px": "pyiqa's default; no script of StableSR cuts",
                    "metrics": "the paper's table on DIV2K-Val, as quoted in github.com/IceClear/StableSR/issues/156",
                    "maniqa": "not measured there; pyiqa's metric of that name",
                    "colour_fix": "IceClear/StableSR scripts/sr_val_ddpm_text_T_vqganfin_old.py: --colorfix_type adain (used in paper)",
                    "paired_by": _OURS,
                },
                unverified=("border_px: no public script measures; 0 is pyiqa's default", "Y of YCbCr or of pyiqa's own default, YIQ"),
            ),
            EvaluationProtocol(
                name="seesr",
                colour_space="Y",
                border_px=4,
                metrics=_ALL_PERCEPTUAL,
                maniqa="maniqa-pipal",
                colour_fix="adain",
                sources={
                    "colour_space": "PSNR and SSIM on Y as in github.com/cswry/SeeSR/issues/60",
                    "border_px": "github.com/cswry/SeeSR/issues/30: the author says 4, following work on x4",
                    "metrics": "the paper's tables, as quoted in github.com/cswry/SeeSR/issues/41",
                    "maniqa": "github.com/cswry/SeeSR/issues/30: MANIQA_PIPAL-ae6d356b.pth",
                    "colour_fix": "cswry/SeeSR test_seesr.py: --align_method adain by default",
                    "paired_by": _OURS,
                },
                unverified=(
                    "whether DISTS and NIQE are cut too, as a user does in issue 60: here only PSNR and SSIM are",
                    "Y of YCbCr or of pyiqa's own default, YIQ",
                ),
            ),
            EvaluationProtocol(
                name="osediff",
                colour_space="Y",
                border_px=0,
                metrics=_ALL_PERCEPTUAL,
                maniqa="maniqa-pipal",
                colour_fix="adain",
                sources={
                    "colour_space": "cswry/OSEDiff test_metrics.py: test_y_channel, color_space ycbcr",
                    "border_px": "cswry/OSEDiff test_metrics.py: no crop",
                    "metrics": "cswry/OSEDiff test_metrics.py",
                    "maniqa": "cswry/OSEDiff test_metrics.py: maniqa-pipal",
                    "colour_fix": "cswry/OSEDiff test_osediff.py: --align_method adain by default",
                    "paired_by": f"{_OURS}; test_metrics.py also divides by all pictures when it skips unreadable ones",
                },
                unverified=("pyiqa rounds Y to whole levels before SSIM, which moves it by up to 1e-3: here it is not rounded",),
            ),
        )
    }
)
"""Every protocol by its name."""


def protocol_named(name: str) -> EvaluationProtocol:
    """Look a protocol up.

    Raises:
        ValueError: if there is none of that name; the message names the nearest.
    """
    if name not in PROTOCOLS:
        near = difflib.get_close_matches(name, PROTOCOLS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "choose one of these"
        raise ValueError(f"protocol: got {name!r}; expected one of {', '.join(PROTOCOLS)}; fix: {hint}")
    return PROTOCOLS[name]
