"""What is known about every image metric, as data. Imports no torch, so a recipe can be checked without it."""

import difflib
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True, slots=True)
class MetricSpec:
    """What a metric is and what it needs."""

    higher_is_better: bool
    """Orientation: whether a larger value is a better image."""
    full_reference: bool
    """Whether it compares with an original; otherwise it judges an image alone."""
    needs: Literal["none", "pyiqa", "weights"]
    """`none`: computed here; `pyiqa`: that package, no download; `weights`: that package and files of weights."""
    weights_files: tuple[str, ...] = ()
    """Names of the files in the weights folder, for `needs="weights"`; as pyiqa, torchvision, timm and CLIP publish them."""
    scope: Literal["picture", "set", "artefact"] = "picture"
    """What has a value: a picture; a whole set of pictures, `linearsr.frechet`; or a picture by what is known of how it was made, its LR
    picture and its tiles, `linearsr.artefacts`, which every evaluation measures and no training can."""


METRICS: dict[str, MetricSpec] = {
    "psnr_y": MetricSpec(higher_is_better=True, full_reference=True, needs="none"),
    "ssim_y": MetricSpec(higher_is_better=True, full_reference=True, needs="none"),
    "psnr": MetricSpec(higher_is_better=True, full_reference=True, needs="none"),
    "ssim": MetricSpec(higher_is_better=True, full_reference=True, needs="none"),
    "ms_ssim": MetricSpec(higher_is_better=True, full_reference=True, needs="none"),
    "gmsd": MetricSpec(higher_is_better=False, full_reference=True, needs="pyiqa"),
    "fsim": MetricSpec(higher_is_better=True, full_reference=True, needs="pyiqa"),
    "vsi": MetricSpec(higher_is_better=True, full_reference=True, needs="pyiqa"),
    "nlpd": MetricSpec(higher_is_better=False, full_reference=True, needs="pyiqa"),
    "vif": MetricSpec(higher_is_better=True, full_reference=True, needs="pyiqa"),
    "piqe": MetricSpec(higher_is_better=False, full_reference=False, needs="pyiqa"),
    "niqe": MetricSpec(higher_is_better=False, full_reference=False, needs="weights", weights_files=("niqe_modelparameters.mat",)),
    "lpips": MetricSpec(
        higher_is_better=False,
        full_reference=True,
        needs="weights",
        weights_files=("LPIPS_v0.1_alex-df73285e.pth", "alexnet-owt-7be5be79.pth"),
    ),
    "dists": MetricSpec(
        higher_is_better=False, full_reference=True, needs="weights", weights_files=("DISTS_weights-f5e65c96.pth", "vgg16-397923af.pth")
    ),
    "musiq": MetricSpec(higher_is_better=True, full_reference=False, needs="weights", weights_files=("musiq_koniq_ckpt-e95806b9.pth",)),
    "maniqa": MetricSpec(higher_is_better=True, full_reference=False, needs="weights", weights_files=("ckpt_koniq10k.pt",)),
    "maniqa-pipal": MetricSpec(higher_is_better=True, full_reference=False, needs="weights", weights_files=("MANIQA_PIPAL-ae6d356b.pth",)),
    "clipiqa": MetricSpec(higher_is_better=True, full_reference=False, needs="weights", weights_files=("RN50.pt",)),
    "fid": MetricSpec(
        higher_is_better=False,
        full_reference=True,
        needs="weights",
        weights_files=("pt_inception-2015-12-05-6726825d.pth",),
        scope="set",
    ),
    "seam": MetricSpec(higher_is_better=False, full_reference=False, needs="none", scope="artefact"),
    "colour_shift": MetricSpec(higher_is_better=False, full_reference=False, needs="none", scope="artefact"),
}
"""Every metric by the name recipes use; pyiqa's own names except `psnr_y` and `ssim_y`, which are of luminance, and the artefacts."""
ARTEFACTS = tuple(name for name, spec in METRICS.items() if spec.scope == "artefact")
"""What every evaluation measures besides."""


def metric_spec(name: str) -> MetricSpec:
    """Look a metric up.

    Raises:
        ValueError: if there is none of that name; the message names the nearest.
    """
    if name not in METRICS:
        near = difflib.get_close_matches(name, METRICS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else "choose one of these"
        raise ValueError(f"metric: got {name!r}; expected one of {', '.join(METRICS)}; fix: {hint}")
    return METRICS[name]
