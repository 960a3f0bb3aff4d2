"""Measuring a test set: whoever does which picture, the numbers are the same, and what is finished stays finished."""

import dataclasses
import json
import pickle
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from tiny_bundle import SMALLEST, write_bundle

from linearsr.artefacts import seam
from linearsr.bundle import load_bundle
from linearsr.colour import fix_colours
from linearsr.degradation import upsample
from linearsr.latent import upsample_bicubic
from linearsr.metrics import Meter
from linearsr.upscaler import Upscaler
from linearsr_platform.data.crew import SerialCrew
from linearsr_platform.errors import StageError, UserError
from linearsr_platform.stages.measured_set import MakeMeasurer, check_names, measure_all, tables_of
from linearsr_platform.stages.measuring import ROWS, Measured, Measurer, Photograph, Request, features_of, to_pixels, to_tensor

METRICS = {"classic": ("psnr_y", "ssim_y"), "seesr": ("psnr_y",)}
"""Both cut 4 px; they differ in the colour fix."""


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_a_picture_that_memory_does_not_last_for_is_named(monkeypatch: pytest.MonkeyPatch, error: Exception) -> None:
    def fails(self: Measurer, photograph: Photograph) -> Measured:
        raise error

    monkeypatch.setattr(Measurer, "__call__", fails)
    measure = MakeMeasurer(request=Request(metrics={"classic": ("psnr_y",)}))()
    with pytest.raises(StageError, match=r"^large: ran out of memory; .*fix: --device cpu"):
        measure(Photograph(name="large"))


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # A network starts as one that adds nothing; what it adds must differ between tiles.
    return write_bundle(tmp_path_factory.mktemp("model"), SMALLEST, noise=0.1)


@pytest.fixture(scope="module")
def photographs() -> list[Photograph]:
    whole = skimage.data.astronaut()
    crops = {f"crop-{top}": whole[top : top + 48, 100:164] for top in (0, 64, 128, 192)}
    return [Photograph(name=name, original=crop, lr=np.ascontiguousarray(crop[::2, ::2])) for name, crop in crops.items()]


class Backwards:
    """A crew of three, as if in other processes, that share the pieces out and hand back the last first."""

    def __init__(self) -> None:
        self.worked_on: list[str] = []

    def map_unordered(self, make: Callable[[], Callable[[Any], Any]], pieces: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        functions = [pickle.loads(pickle.dumps(make))() for _ in range(3)]
        for position in reversed(range(len(pieces))):
            self.worked_on.append(pieces[position].name)
            piece = pickle.loads(pickle.dumps(pieces[position]))
            yield position, pickle.loads(pickle.dumps(functions[position % 3](piece)))


def measured_by(
    crew: Any, photographs: Sequence[Photograph], bundle: Path, results: Path | None = None, **settings: Any
) -> tuple[list[Measured], Any]:
    request = Request(metrics=METRICS, **settings)
    make = MakeMeasurer(request=request, bundle_url=str(bundle), results_url=None if results is None else str(results))
    found = measure_all(photographs, make, lambda count: crew, lambda done, total: None)
    names = [photograph.name for photograph in photographs]
    return found, tables_of(names, found, request, ROWS, {"seed": 0})


def test_numbers_do_not_depend_on_who_measures_or_in_which_order(bundle: Path, photographs: list[Photograph]) -> None:
    one, tables = measured_by(SerialCrew(), photographs, bundle, sweep_steps=(1,))
    many, others = measured_by(Backwards(), photographs, bundle, sweep_steps=(1,))
    assert one == many
    assert tables == others
    assert measured_by(SerialCrew(), photographs[::-1], bundle)[1] == tables
    assert set(one[0].values["classic"]) == {*ROWS, "steps-1"}
    assert tables["classic"].images == 4
    assert tables["classic"].rows["bicubic"]["seam"] == 1
    assert {"seam", "colour_shift"} < set(tables["seesr"].rows["routed"])
    assert tables["classic"].protocol["weights"] == dict.fromkeys(("psnr_y", "ssim_y", "seam", "colour_shift"), "none")
    assert measured_by(SerialCrew(), photographs, bundle, seed=1)[1]["classic"].rows["routed"] != tables["classic"].rows["routed"]


def test_each_protocol_measures_its_own_picture(bundle: Path, photographs: list[Photograph]) -> None:
    """As it is under classic, with the moments of the LR picture under seesr."""
    _, tables = measured_by(SerialCrew(), photographs[:1], bundle)
    first = photographs[0]
    assert first.lr is not None
    assert first.original is not None
    expected = Meter(["psnr_y"], "classic").measure(to_tensor(upsample(first.lr, 2)), to_tensor(first.original))["psnr_y"].item()
    assert tables["classic"].rows["bicubic"]["psnr_y"] == expected
    source = to_tensor(upsample(first.lr, 2))
    fixed = fix_colours(to_tensor(upsample(first.lr, 2)), upsample_bicubic(to_tensor(first.lr), 2).clamp(0, 1), "adain")
    assert not torch.equal(fixed, source)
    expected = Meter(["psnr_y"], "seesr").measure(fixed, to_tensor(first.original))["psnr_y"].item()
    assert tables["seesr"].rows["bicubic"]["psnr_y"] == expected
    routed = [tables[name].rows["routed"]["psnr_y"] for name in METRICS]
    assert abs(routed[0] - routed[1]) > 0.01


def test_seams_are_those_of_the_model_in_tiles_against_the_same_in_one(bundle: Path, photographs: list[Photograph]) -> None:
    (found,), _ = measured_by(SerialCrew(), photographs[:1], bundle)
    upscaler = Upscaler(load_bundle(bundle))
    assert photographs[0].lr is not None
    lr = to_tensor(photographs[0].lr)  # 24 x 32 px, a pixel a token: tiles of 12 that share 3
    whole, tiled = (to_tensor(to_pixels(upscaler.upscale_tensor(lr, tile=tile)))[0] for tile in (None, 12))
    assert not torch.equal(whole, tiled)
    edges = ((12, 24, 36), (14, 24, 26, 38, 40, 50))  # of tiles at 0, 6, 12 down and 0, 7, 13, 20 across, 2 px a token
    assert found.values["classic"]["routed"]["seam"] == seam(tiled, edges, whole) != 1


def test_an_interrupted_evaluation_goes_on_and_other_pixels_are_measured_again(
    bundle: Path, photographs: list[Photograph], tmp_path: Path
) -> None:
    whole, _ = measured_by(SerialCrew(), photographs, bundle)
    measured_by(SerialCrew(), photographs[:2], bundle, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["crop-0.json", "crop-64.json"]
    (tmp_path / "crop-64.json").write_text("{")
    crew = Backwards()
    found, _ = measured_by(crew, photographs, bundle, tmp_path)
    assert sorted(crew.worked_on) == ["crop-128", "crop-192", "crop-64"]
    assert found == whole
    original = photographs[0].original
    assert original is not None
    changed = [dataclasses.replace(photographs[0], original=255 - original), *photographs[1:]]
    crew = Backwards()
    measured_by(crew, changed, bundle, tmp_path)
    assert crew.worked_on == ["crop-0"]
    told = [dataclasses.replace(photographs[1], tags=("cat",), tags_of_lr=True)]
    for expected in (["crop-64"], []):
        crew = Backwards()
        (found,), _ = measured_by(crew, told, bundle, tmp_path)
        assert (crew.worked_on, found.lr_tags) == (expected, ["cat"])


def test_the_test_set_is_known_by_names_and_pixels(bundle: Path, photographs: list[Photograph]) -> None:
    def test_set(photographs: Sequence[Photograph]) -> str:
        hashed: str = measured_by(SerialCrew(), photographs, bundle)[1]["classic"].test_set
        return hashed

    original, lr = photographs[0].original, photographs[0].lr
    assert original is not None
    assert lr is not None
    changes = ({"name": "other"}, {"lr": 255 - lr}, {"original": 255 - original})
    variants = [test_set([dataclasses.replace(photographs[0], **change), *photographs[1:2]]) for change in changes]  # type: ignore[arg-type]
    assert len({test_set(photographs[:2]), *variants}) == 4
    assert test_set(photographs[1::-1]) == test_set(photographs[:2])


def test_what_cannot_be_measured_is_refused_before_anything_is_made(photographs: list[Photograph], tmp_path: Path) -> None:
    def ask(**metrics: tuple[str, ...]) -> None:
        make = MakeMeasurer(request=Request(metrics=metrics, weights=str(tmp_path)), bundle_url="/nowhere")
        measure_all(photographs, make, lambda count: SerialCrew(), lambda done, total: None)

    with pytest.raises(UserError, match=r"'lpips'.*LPIPS_v0.1_alex"):
        ask(classic=("lpips",))
    (tmp_path / "pt_inception-2015-12-05-6726825d.pth").touch()
    with pytest.raises(UserError, match="got 4 images; expected at least 2049"):
        ask(seesr=("fid",))
    with pytest.raises(UserError, match="2 pictures named 'a'"):
        check_names(["a", "b", "a"])


def test_features_of_a_set_are_kept_for_each_picture_and_too_few_make_no_distance(photographs: list[Photograph], tmp_path: Path) -> None:
    inception = pytest.importorskip("pyiqa.archs.inception")
    net = inception._inception_v3(num_classes=1008, aux_logits=False, pretrained=False)
    for name, channels in (("Mixed_5b", (192, 32)), ("Mixed_5c", (256, 64)), ("Mixed_5d", (288, 64))):
        setattr(net, name, inception.FIDInceptionA(channels[0], pool_features=channels[1]))
    for name, width in (("Mixed_6b", 128), ("Mixed_6c", 160), ("Mixed_6d", 160), ("Mixed_6e", 192)):
        setattr(net, name, inception.FIDInceptionC(768, channels_7x7=width))
    net.Mixed_7b, net.Mixed_7c = inception.FIDInceptionE_1(1280), inception.FIDInceptionE_2(2048)
    torch.save(net.state_dict(), tmp_path / "pt_inception-2015-12-05-6726825d.pth")
    request = Request(metrics={"osediff": ("psnr_y", "fid"), "classic": ("psnr_y",)}, weights=str(tmp_path))
    finished = [dataclasses.replace(photograph, restored=photograph.original, lr=None) for photograph in photographs[:2]]
    measurer = Measurer(request, None)
    found = [measurer(photograph) for photograph in finished]
    assert [set(one.features) for one in found] == [{"osediff"}] * 2
    assert all(one.features["osediff"]["restored"] == one.features["osediff"]["original"] for one in found)
    assert features_of(found[0].features["osediff"]["restored"]).shape == (2048,)
    with pytest.raises(UserError, match="got 2 images; expected at least 2049"):
        tables_of([photograph.name for photograph in finished], found, request, ["restored"], {})


def test_a_measurement_travels_as_json(bundle: Path, photographs: list[Photograph]) -> None:
    (found,), _ = measured_by(SerialCrew(), photographs[:1], bundle)
    assert Measured.from_json(found.to_json()) == found
    with pytest.raises(ValueError, match="unexpected"):
        Measured.from_json(json.dumps({"other": 1}))
