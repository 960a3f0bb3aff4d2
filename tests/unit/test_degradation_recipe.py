"""Presets of degradation: their published numbers, pasted files, and what is said about mistakes."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from minimal_recipe import MINIMAL, problems_of, write_recipe

from linearsr.config import DegradationConfig
from linearsr.degradation_config import InvSrDegradation, RealEsrganDegradation, SecondOrderDegradation, StableSrDegradation, changed_keys
from linearsr_platform.recipe.load import load_recipe
from linearsr_platform.recipe.notes import notes_on
from linearsr_platform.recipe.schema import Recipe

# Both blocks of options/train_realesrgan_x4plus.yml as they stand there, with one gt_size; its blur keys belong to the data set.
PASTED = """\
  l1_gt_usm: True
  percep_gt_usm: True
  gan_gt_usm: False

  # the first degradation process
  resize_prob: [0.2, 0.7, 0.1]  # up, down, keep
  resize_range: [0.15, 1.5]
  gaussian_noise_prob: 0.5
  noise_range: [1, 30]
  poisson_scale_range: [0.05, 3]
  gray_noise_prob: 0.4
  jpeg_range: [30, 95]

  # the second degradation process
  second_blur_prob: 0.8
  resize_prob2: [0.3, 0.4, 0.3]  # up, down, keep
  resize_range2: [0.3, 1.2]
  gaussian_noise_prob2: 0.5
  noise_range2: [1, 25]
  poisson_scale_range2: [0.05, 2.5]
  gray_noise_prob2: 0.4
  jpeg_range2: [30, 95]

  gt_size: 256
  queue_size: 180

  blur_kernel_size: 21
  kernel_list: ['iso', 'aniso', 'generalized_iso', 'generalized_aniso', 'plateau_iso', 'plateau_aniso']
  kernel_prob: [0.45, 0.25, 0.12, 0.03, 0.12, 0.03]
  sinc_prob: 0.1
  blur_sigma: [0.2, 3]
  betag_range: [0.5, 4]
  betap_range: [1, 2]

  blur_kernel_size2: 21
  kernel_list2: ['iso', 'aniso', 'generalized_iso', 'generalized_aniso', 'plateau_iso', 'plateau_aniso']
  kernel_prob2: [0.45, 0.25, 0.12, 0.03, 0.12, 0.03]
  sinc_prob2: 0.1
  blur_sigma2: [0.2, 1.5]
  betag_range2: [0.5, 4]
  betap_range2: [1, 2]

  final_sinc_prob: 0.8
"""


def write(folder: Path, degradation: str) -> str:
    return write_recipe(folder, MINIMAL + degradation)


def load(folder: Path, degradation: str) -> Recipe:
    return load_recipe(write(folder, degradation)).recipe


def test_a_file_of_real_esrgan_pastes_as_it_is_and_says_what_is_not_read(tmp_path: Path) -> None:
    recipe = load(tmp_path, "degradation:\n" + PASTED)
    unread = {"gt_size": 256, "queue_size": 180, "percep_gt_usm": True, "gan_gt_usm": False}
    assert recipe.degradation == RealEsrganDegradation(l1_gt_usm=True, **unread)
    (note,) = [note for note in notes_on(recipe) if note.startswith("degradation:")]
    assert all(key in note for key in unread)
    assert set(changed_keys(recipe.degradation)) == {"l1_gt_usm", *unread}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", DegradationConfig()),
        ("degradation: {noise_sigma: [1, 2]}", DegradationConfig(noise_sigma=(1, 2))),
        ("degradation: {preset: quickstart}", DegradationConfig()),
        ("degradation: {preset: stablesr}", StableSrDegradation()),
        ("degradation: {preset: invsr, gt_usm: true}", InvSrDegradation(gt_usm=True)),
        ("degradation: {jpeg_range: [40, 50]}", RealEsrganDegradation(jpeg_range=(40, 50))),
    ],
)
def test_a_preset_is_named_or_follows_from_the_keys(tmp_path: Path, text: str, expected: object) -> None:
    assert load(tmp_path, text).degradation == expected


def test_presets_have_their_published_numbers() -> None:
    """Where they differ from Real-ESRGAN's, which are in `PASTED`."""
    stablesr, invsr = StableSrDegradation(), InvSrDegradation()
    assert (stablesr.blur_sigma, stablesr.betag_range, stablesr.betap_range) == ((0.2, 1.5), (0.5, 2), (1, 1.5))
    assert (stablesr.blur_sigma2, stablesr.betag_range2, stablesr.betap_range2) == ((0.2, 1), (0.5, 2), (1, 1.5))
    assert (stablesr.resize_range, stablesr.noise_range, stablesr.poisson_scale_range) == ((0.3, 1.5), (1, 15), (0.05, 2))
    assert (stablesr.resize_range2, stablesr.noise_range2, stablesr.poisson_scale_range2) == ((0.6, 1.2), (1, 12), (0.05, 1))
    assert (stablesr.jpeg_range, stablesr.jpeg_range2, stablesr.second_blur_prob) == ((60, 95), (60, 100), 0.5)
    assert (stablesr.no_degradation_prob, stablesr.blur_kernel_size2, stablesr.gt_usm) == (0.01, 11, True)
    assert set(changed_keys(RealEsrganDegradation(**_shared(invsr)))) == {
        "gt_usm", "kernel_range", "kernel_range2", "blur_kernel_size2", "second_order_prob",
    }  # fmt: skip
    assert (invsr.second_order_prob, invsr.gt_usm) == (0.5, False)
    assert stablesr.kernel_sides("2") == RealEsrganDegradation().kernel_sides("") == (7, 9, 11, 13, 15, 17, 19, 21)
    assert (invsr.kernel_sides("")[::8], invsr.kernel_sides("2")) == ((3, 19), (3, 5, 7, 9, 11, 13))


def _shared(config: SecondOrderDegradation) -> dict[str, object]:
    return {name: getattr(config, name) for name in SecondOrderDegradation.__dataclass_fields__}


@pytest.mark.parametrize(
    ("text", "key", "rule", "fix"),
    [
        ("{preset: real-esrgan, jpeg_rang: [1, 2]}", "jpeg_rang", "a known key", "did you mean degradation.jpeg_range?"),
        ("{preset: realesrgan}", "preset", "one of quickstart, real-esrgan, stablesr, invsr", "did you mean real-esrgan?"),
        ("{preset: 3}", "preset", "quickstart", ""),
        ("{preset: stablesr, blur_sigma_px: [1, 2]}", "blur_sigma_px", "a known key", "did you mean degradation.blur_sigma?"),
        ("{preset: invsr, sinc_prob: often}", "sinc_prob", "a number", ""),
        ("{preset: invsr, sinc_prob: 1.5}", "sinc_prob", "a number in [0, 1]", ""),
        ("{preset: real-esrgan, noise_range: [3, 1]}", "noise_range", "an ascending pair in [0, 255]", ""),
        ("{preset: real-esrgan, resize_range: [1.1, 1.5]}", "resize_range", "a pair on both sides of 1", ""),
        ("{preset: real-esrgan, kernel_list: [iso]}", "kernel_prob", "one weight >= 0 for each of kernel_list", ""),
        ("{preset: real-esrgan, kernel_list: [isotropic]}", "kernel_list[0]", "one of iso, aniso", ""),
        ("{preset: real-esrgan, blur_kernel_size: 8}", "blur_kernel_size", "an odd number in [7, 51]", ""),
        ("{gt_usm: false, l1_gt_usm: true}", "l1_gt_usm", "no sharpened target where gt_usm is off", ""),
    ],
)
def test_a_mistake_is_named_at_its_key_within_its_preset(tmp_path: Path, text: str, key: str, rule: str, fix: str) -> None:
    (problem,) = problems_of(write(tmp_path, f"degradation: {text}"))
    assert (problem.key, problem.fix) == (f"degradation.{key}", fix)
    assert problem.rule.startswith(rule)


def test_a_section_that_is_no_section_is_named(tmp_path: Path) -> None:
    (problem,) = problems_of(write(tmp_path, "degradation: 3"))
    assert problem.key == "degradation"
    assert problem.rule.startswith("a section with keys like")
