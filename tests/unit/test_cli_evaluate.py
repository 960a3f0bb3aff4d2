"""`linearsr evaluate`: pictures and a registered model, several protocols side by side, and one clear sentence for each mistake."""

import json
import math
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import skimage.data
from PIL import Image
from typer.testing import CliRunner, Result

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from autoencoders import write_autoencoder
from tiny_bundle import SMALLEST, TINY, write_bundle

from linearsr.config import CodecConfig
from linearsr_platform.cli.app import app
from linearsr_platform.registry.evaluation import Evaluation
from linearsr_platform.registry.models import find_version, read_evaluation
from linearsr_platform.registry.register import register
from linearsr_platform.storage import read_text
from linearsr_platform.tracking.runs import Tracker
from linearsr_platform.tracking.store import default_artifact_root, default_uri

NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("model"), SMALLEST)


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Folders `hr`, `lr` and `sr`, which has noise; one of the files has another suffix."""
    rng = np.random.default_rng(0)
    for folder in ("hr", "lr", "sr"):
        (tmp_path / folder).mkdir()
    for place, name in enumerate(NAMES):
        original = skimage.data.astronaut()[64 * place : 64 * place + 48, 100:164]
        noisy = np.clip(original + rng.normal(0, 5, original.shape), 0, 255).astype(np.uint8)
        Image.fromarray(original).save(tmp_path / "hr" / f"{name}.png")
        Image.fromarray(original[::2, ::2]).save(tmp_path / "lr" / f"{name}.bmp")
        Image.fromarray(noisy).save(tmp_path / "sr" / f"{name}.png")
    return tmp_path


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["evaluate", *map(str, arguments)])


def test_pictures_are_measured_under_protocols_side_by_side(pictures: Path) -> None:
    result = run("--restored", pictures / "sr", "--original", pictures / "hr", "--protocol", "classic", "--protocol", "stablesr")
    assert result.exit_code == 0, result.output
    lines = {line.split()[0]: line for line in result.stdout.splitlines() if line.strip()}
    assert result.stdout.splitlines()[0].split() == ["classic", "stablesr"]
    assert lines["psnr_y"].split()[1] == "↑"
    assert lines["psnr_y"].count("[") == 2
    assert "3 images, means with 95 % intervals" in result.stdout
    assert "left out lpips, clipiqa, musiq: no folder of weights; fix: --weights DIR" in result.stdout
    assert "left out fid: 3 images; expected at least 2049" in " ".join(result.stdout.split())


def test_json_and_file_hold_every_image(pictures: Path) -> None:
    settings = ("--restored", pictures / "sr", "--original", pictures / "hr", "--lr", pictures / "lr", "--grid", 8, "--metric", "psnr_y")
    result = run(*settings, "--output", pictures / "e.json", "--json")
    assert result.exit_code == 0, result.output
    table = json.loads(result.stdout)["tables"]["classic"]
    assert set(table["rows"]["restored"]) == {"psnr_y", "seam", "colour_shift"}
    assert set(table["values"]["restored"]["psnr_y"]) == set(NAMES)
    assert table["images"] == 3
    low, high = table["intervals"]["restored"]["psnr_y"]
    assert low <= table["rows"]["restored"]["psnr_y"] <= high
    assert table["protocol"]["scale"] == 2
    read = Evaluation.from_json((pictures / "e.json").read_text()).tables["classic"]
    assert read.to_plain(with_values=True) == table


def test_a_registered_version_gets_its_numbers_and_they_are_comparable(pictures: Path, bundle: Path) -> None:
    store = pictures / "runs"
    tracker = Tracker(default_uri(str(store)), "nano", artifact_root=default_artifact_root(str(store)))
    run_id = tracker.stage_run(tracker.start_pipeline("quick").run_id, "register").run_id
    register(tracker.client, bundle, name="net", evaluation=None, run_id=run_id)
    facts = {"degradation": {"preset": "none"}, "seed": 3, "tags": {"a": ["astronaut"]}}
    (pictures / "lr" / "test_set.json").write_text(json.dumps(facts))
    asked = ("--lr", pictures / "lr", "--original", pictures / "hr", "--storage", store, "--protocol", "classic", "--protocol", "osediff")
    result = run("models:/net@challenger", *asked, "--attach", "--pictures", pictures / "out")
    assert result.exit_code == 0, result.output
    assert result.stdout.splitlines()[-1] == "stored with net/1"
    found = read_evaluation(tracker.client, find_version(tracker.client, "net", 1))
    assert found is not None
    assert set(found.tables) == {"classic", "osediff"}
    table = found.tables["classic"]
    assert (table.protocol["degradation"], table.protocol["seed"], table.protocol["scale"]) == ({"preset": "none"}, 3, 2)
    assert set(table.rows) == {"bicubic", "one_step", "routed"}
    assert {"seam", "colour_shift", "psnr_y"} <= set(table.values["routed"])
    assert sorted(path.name for path in (pictures / "out").iterdir())[:3] == ["a-bicubic.png", "a-one_step.png", "a-routed.png"]
    folder = json.loads(run(bundle, *asked, "--json").stdout)["tables"]["classic"]
    assert folder["rows"] == {row: dict(values) for row, values in table.rows.items()}
    assert folder["test_set"] == table.test_set
    other = run("models:/net/1", *asked, "--seed", 4, "--json")
    assert json.loads(other.stdout)["tables"]["classic"]["rows"]["routed"] != folder["rows"]["routed"]


def test_another_tile_of_a_dc_ae_makes_another_table(tmp_path: Path) -> None:
    source, models = str(write_autoencoder(tmp_path / "dcae")), {}
    for tile in (4, 32):
        (tmp_path / f"model-{tile}").mkdir()
        config = replace(TINY, codec=CodecConfig(kind="dc-ae", factor=32, source=source, tile=tile))
        models[tile] = write_bundle(tmp_path / f"model-{tile}", config)
    for folder, step in (("hr", 1), ("lr", TINY.scale)):
        (tmp_path / folder).mkdir()
        Image.fromarray(skimage.data.astronaut()[:192:step, :256:step]).save(tmp_path / folder / "a.png")

    def table(tile: int, *options: object) -> dict[str, dict[str, object]]:
        asked = ("--lr", tmp_path / "lr", "--original", tmp_path / "hr", "--metric", "psnr_y", "--json", *options)
        result = run(models[tile], *asked)
        assert result.exit_code == 0, result.output
        found: dict[str, dict[str, object]] = json.loads(result.stdout)["tables"]["classic"]
        return found

    own, other, whole = table(4), table(32, "--codec-tile", 4), table(32)
    assert own["rows"]["routed"] == other["rows"]["routed"] != whole["rows"]["routed"]
    assert other["protocol"] == own["protocol"] | {"codec_tile": 4} == whole["protocol"] | {"codec_tile": 4}


def test_a_missing_extra_unreadable_or_misfitting_picture_is_named(pictures: Path) -> None:
    def refusal() -> str:
        result = run("--restored", pictures / "sr", "--original", pictures / "hr", "--lr", pictures / "lr")
        assert result.exit_code == 2, result.output
        assert isinstance(result.stderr, str)
        return " ".join(result.stderr.split())

    kept = pictures / "kept"
    (pictures / "sr" / "b.png").rename(kept)
    assert "--restored: got no picture named 'b'" in refusal()
    shutil.copy(kept, pictures / "sr" / "b.png")
    shutil.copy(kept, pictures / "sr" / "bx4.png")
    said = refusal()
    assert "--original: got no picture named 'bx4'" in said
    (pictures / "sr" / "bx4.png").unlink()
    (pictures / "sr" / "b.png").write_bytes(kept.read_bytes()[:200])
    assert "b.png" in refusal()
    (pictures / "sr" / "b.png").write_bytes(b"no picture")
    assert "b.png" in refusal()
    Image.open(kept).crop((0, 0, 60, 48)).save(pictures / "sr" / "b.png")
    assert "got 60 x 48 px, and 64 x 48" in refusal()
    shutil.copy(kept, pictures / "sr" / "b.jpg")
    assert "expected one picture of a name" in refusal()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ((), "got neither; expected MODEL with --lr DIR, or --restored DIR"),
        (("net", "--restored", "sr"), "got both"),
        (("net",), "expected --lr DIR"),
        (("--restored", "sr"), "no originals to compare with; fix: --original DIR"),
        (("--restored", "sr", "--original", "hr", "--protocol", "clasic"), "did you mean 'classic'"),
        (("--restored", "sr", "--original", "hr", "--metric", "psnry"), "did you mean 'psnr"),
        (("--restored", "sr", "--original", "hr", "--metric", "lpips"), "which needs LPIPS_v0.1_alex-df73285e.pth"),
        (("--restored", "sr", "--original", "hr", "--metric", "fid"), "3 images; expected at least 2049"),
        (("--restored", "sr", "--metric", "psnr_y"), "no originals"),
        (("--restored", "nowhere"), "expected a folder of pictures"),
        (("--restored", "sr", "--original", "hr", "--attach"), "--attach: got --restored"),
        (("--restored", "sr", "--original", "hr", "--codec-tile", "16"), "--codec-tile: got one with --restored"),
    ],
)
def test_a_mistake_ends_with_2_and_says_what_would_be_right(
    pictures: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(pictures)
    result = run(*words)
    assert result.exit_code == 2, result.output
    assert said in " ".join(result.stderr.split())


def test_a_device_is_one_of_this_machine_or_found_by_itself(pictures: Path, bundle: Path) -> None:
    asked = (bundle, "--lr", pictures / "lr", "--original", pictures / "hr", "--metric", "psnr_y", "--device")
    for device in ("abacus", "cuda:99"):
        refused = run(*asked, device)
        assert (refused.exit_code, f"--device: got '{device}'" in " ".join(refused.stderr.split())) == (2, True)
    assert run(*asked, "auto").exit_code == 0


def test_numbers_are_shown_before_they_are_written(pictures: Path) -> None:
    settings = ("--restored", pictures / "sr", "--original", pictures / "hr", "--metric", "psnr_y")
    result = run(*settings, "--output", pictures)
    assert result.exit_code != 0
    assert "psnr_y" in result.stdout


def test_numbers_are_written_to_a_store(pictures: Path) -> None:
    settings = ("--restored", pictures / "sr", "--original", pictures / "hr", "--metric", "psnr_y")
    assert run(*settings, "--output", "memory://evaluations/new/numbers.json").exit_code == 0
    assert "psnr_y" in read_text("memory://evaluations/new/numbers.json")


def test_without_originals_a_metric_that_needs_none_is_measured(pictures: Path) -> None:
    pytest.importorskip("pyiqa")
    result = run("--restored", pictures / "sr", "--metric", "piqe", "--json")
    assert result.exit_code == 0, result.output
    assert set(json.loads(result.stdout)["tables"]["classic"]["rows"]["restored"]) == {"piqe"}


def test_a_known_test_set_brings_its_pairs_and_its_hash(tmp_path: Path) -> None:
    folder, restored = tmp_path / "DrealSRVal_crop128", tmp_path / "restored"
    for part, side in (("test_LR", 128), ("test_HR", 512)):
        (folder / part).mkdir(parents=True)
        for index in range(93):
            Image.new("RGB", (side, side), (index, 2 * index, 90)).save(folder / part / f"{index:03d}_{'LR4' if side == 128 else 'HR'}.png")
    root = tmp_path / "sets"
    assert CliRunner().invoke(app, ["test-sets", "add", "drealsr", str(folder), "--root", str(root)]).exit_code == 0
    restored.mkdir()
    for index in range(93):
        Image.new("RGB", (512, 512), (index, 2 * index, 91)).save(restored / f"{index:03d}.png")
    words = ["evaluate", "--restored", restored, "--test-set", "DRealSR", "--test-sets-root", root, "--metric", "psnr", "--json"]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, result.output
    table = json.loads(result.stdout)["tables"]["classic"]
    assert table["rows"]["restored"]["psnr"] == pytest.approx(10 * math.log10(3 * 255**2))
    assert table["protocol"]["test_set_name"] == "DRealSR"
    assert len(table["protocol"]["test_set_files"]) == 64
    (restored / "092.png").unlink()
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code != 0
    assert "'092'" in result.output
