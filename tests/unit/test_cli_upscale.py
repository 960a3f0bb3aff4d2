"""`linearsr upscale` and its neighbours: real pictures through a real bundle, and one clear sentence for each mistake."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from autoencoders import write_autoencoder
from tiny_bundle import TINY, write_bundle

from linearsr.config import CodecConfig
from linearsr.enlarge import Enlargement
from linearsr_platform.cli.app import app
from linearsr_platform.stages.picture_work import find_work
from linearsr_platform.stages.upscale_crew import Enlarger, FolderHere


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("model"))


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    path = tmp_path / "photo.png"
    Image.radial_gradient("L").resize((23, 17)).convert("RGB").save(path)
    return path


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["upscale", *map(str, arguments)])
    return result.exit_code, result.output


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_a_picture_of_any_size_comes_out_four_times_larger(bundle: Path, photo: Path, suffix: str) -> None:
    target = photo.with_name(f"large{suffix}")
    code, output = run(photo, target, "--model", bundle)
    assert code == 0, output
    with Image.open(target) as large:
        assert large.size == (92, 68)
    assert sorted(path.name for path in photo.parent.iterdir()) == sorted(["photo.png", target.name])


def test_a_folder_keeps_its_structure(bundle: Path, photo: Path, tmp_path: Path) -> None:
    (tmp_path / "in" / "deeper").mkdir(parents=True)
    for name in ("in/a.png", "in/deeper/b.png"):
        (tmp_path / name).write_bytes(photo.read_bytes())
    code, output = run(tmp_path / "in", tmp_path / "out", "--model", bundle)
    assert code == 0, output
    assert sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.png")) == ["a.png", "deeper/b.png"]


def test_the_seed_decides_the_picture(bundle: Path, photo: Path) -> None:
    pictures = []
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        run(photo, photo.with_name(f"{name}.png"), "--model", bundle, "--seed", seed)
        pictures.append(photo.with_name(f"{name}.png").read_bytes())
    assert pictures[0] == pictures[1] != pictures[2]


def test_the_tile_of_a_dc_ae_is_the_users_where_he_says_so(photo: Path, tmp_path: Path) -> None:
    source = str(write_autoencoder(tmp_path / "dcae"))
    models = {}
    for tile in (4, 32):
        (tmp_path / f"model-{tile}").mkdir()
        codec = CodecConfig(kind="dc-ae", factor=32, source=source, tile=tile)
        models[tile] = write_bundle(tmp_path / f"model-{tile}", replace(TINY, codec=codec))
    Image.radial_gradient("L").resize((64, 48)).convert("RGB").save(photo)
    pictures = {}
    for tile, options in ((4, ()), (32, ()), (32, ("--codec-tile", 4)), (4, ("--codec-tile", 32))):
        code, output = run(photo, tmp_path / "large.png", "--model", models[tile], "--overwrite", *options)
        assert code == 0, output
        pictures[tile, *options] = (tmp_path / "large.png").read_bytes()
    assert pictures[32, "--codec-tile", 4] == pictures[(4,)] != pictures[(32,)] == pictures[4, "--codec-tile", 32]
    # A worker is told, too.
    do = Enlarger(bundle=FolderHere(models[32]), request=Enlargement(), codec_tile=4)()
    (job,) = find_work(str(photo), str(tmp_path / "worker.png")).jobs
    assert [outcome.status for outcome in do(job)] == ["done"]
    assert (tmp_path / "worker.png").read_bytes() == pictures[(4,)]
    code, output = run(photo, "--plan", "--model", models[32], "--codec-tile", 4)
    assert (code, "in tiles of 4 x 4)" in " ".join(output.split())) == (0, True), output


def test_too_few_steps_for_all_experts_are_told_once(bundle: Path, photo: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.png", "b.png"):
        (tmp_path / "in" / name).write_bytes(photo.read_bytes())
    code, output = run(tmp_path / "in", tmp_path / "out", "--model", bundle, "--steps", 1)
    assert code == 0, output
    told = " ".join(output.split())
    assert told.count("warning: sampler: got 1 step on the uniform grid without a noise level for expert 2 of 2 (0.000 to 0.500)") == 1
    assert "take at least 5 steps" in told
    assert "warning" not in run(photo, photo.with_name("large.png"), "--model", bundle)[1]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("absent.png", "out.png"), "no such file"),
        (("photo.png", "out.tiff"), "expected one of .png, .jpg"),
        (("empty", "out"), "got a folder without images"),
        (("broken.png", "out.png"), "broken.png"),
        (("photo.png", "out.png", "--estimate", "best"), "expected routed or one_step"),
        (("photo.png", "out.png", "--codec-tile", "16"), "got a tile of 16 for codec haar, which has none"),
        (("photo.png", "out.png", "--model", "nowhere"), "expected a folder with a bundle.json"),
        (("photo.png", "out.png", "--model", "models:/none@champion"), "expected the storage root of a run"),
    ],
)
def test_mistakes_exit_with_2_and_leave_nothing(
    bundle: Path, photo: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(photo.parent)
    Path("empty").mkdir()
    Path("broken.png").write_bytes(photo.read_bytes()[:60])
    before = sorted(Path().rglob("*"))
    code, output = run(*arguments, *(() if "--model" in arguments else ("--model", bundle)))
    assert code == 2, output
    assert said in " ".join(output.split())
    assert "Traceback" not in output
    assert sorted(Path().rglob("*")) == before


def test_a_changed_bundle_is_refused(bundle: Path, photo: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "copy"
    shutil.copytree(bundle, copy)
    weights = copy / "expert-2.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    code, output = run(photo, photo.with_name("out.png"), "--model", copy)
    assert code == 2
    assert "expert-2.safetensors" in output
    assert not photo.with_name("out.png").exists()
