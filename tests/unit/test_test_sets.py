"""Test sets by name: a copy is checked when it is added, and must stay what it was."""

import json
from datetime import date
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from linearsr_platform.cli.app import app
from linearsr_platform.data import test_sets as sets
from linearsr_platform.errors import UserError

TODAY = date(2026, 1, 2)


def write_pairs(folder: Path, names: list[tuple[str, str]], side: int = 128) -> Path:
    rng = np.random.default_rng(0)
    for part, scale, index in (("test_LR", 1, 0), ("test_HR", 4, 1)):
        (folder / part).mkdir(parents=True)
        for pair in names:
            # Flat colours: small files, each another one.
            Image.new("RGB", (side * scale, side * scale), tuple(rng.integers(256, size=3).tolist())).save(
                folder / part / f"{pair[index]}.png"
            )
    return folder


@pytest.fixture
def real_sr(tmp_path: Path) -> Path:
    """A hundred pairs that are called what RealSR's are called."""
    names = [(f"{camera}_{number:03}_LR4", f"{camera}_{number:03}_HR") for camera in ("Canon", "Nikon") for number in range(50)]
    return write_pairs(tmp_path / "test-sets/RealSRVal_crop128", names)


@pytest.fixture
def here(tmp_path: Path) -> Path:
    return tmp_path / "test-sets"


def run(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["test-sets", *map(str, words)])
    return result.exit_code, " ".join(result.output.split())


def test_names_are_found_as_people_type_them() -> None:
    assert [sets.known_test_set(name).name for name in ("realsr", "DRealSR", "div2k_val", "RealLQ250", "DrealSRVal_crop128")] == [
        "RealSR",
        "DRealSR",
        "DIV2K-Val",
        "RealLQ250",
        "DRealSR",
    ]
    with pytest.raises(UserError, match=r"got 'Set5'; expected one of RealSR, DRealSR, DIV2K-Val, RealLQ250, RealLR200"):
        sets.known_test_set("Set5")
    plain = [name.lower().replace("_", "").replace("-", "") for one in sets.TEST_SETS.values() for name in {one.name, *one.aliases}]
    assert len(plain) == len(set(plain))


def test_what_is_not_there_is_told_with_page_licence_layout_and_command(here: Path) -> None:
    with pytest.raises(UserError) as caught:
        sets.find_test_set("DIV2K-Val", here)
    for part in (
        sets.STABLESR,
        "S-Lab 1.0",
        f"{here}/DIV2K_V2_val/ with 3000 images in test_LR/ and test_HR/",
        "linearsr test-sets add DIV2K-Val",
    ):
        assert part in str(caught.value)


def test_a_set_is_trusted_when_added_and_refused_when_it_changes(real_sr: Path, here: Path) -> None:
    with pytest.raises(UserError, match="was never added"):
        sets.find_test_set("RealSR", here)
    added = sets.add_test_set("RealSR", real_sr, here, TODAY)
    found = sets.find_test_set("realsr", here)
    assert found == added
    assert [(pair.name, pair.lr.name, pair.hr and pair.hr.name) for pair in found.pairs[:2]] == [
        ("Canon_000", "Canon_000_LR4.png", "Canon_000_HR.png"),
        ("Canon_001", "Canon_001_LR4.png", "Canon_001_HR.png"),
    ]
    picture = real_sr / "test_HR/Nikon_049_HR.png"
    Image.new("RGB", (512, 512)).save(picture)
    with pytest.raises(UserError, match=rf"SHA-256 .*; expected {added.sha256}, recorded on 2026-01-02; fix: "):
        sets.find_test_set("RealSR", here)
    picture.unlink()
    with pytest.raises(UserError, match=r"got 1 images in .* without a partner, such as 'Nikon_049'"):
        sets.find_test_set("RealSR", here)
    (real_sr / "test_LR/Nikon_049_LR4.png").unlink()
    with pytest.raises(UserError, match=r"got 99 images in .*; expected 100"):
        sets.find_test_set("RealSR", here)


def test_the_hash_is_of_names_and_bytes_and_not_of_the_place(real_sr: Path, here: Path, tmp_path: Path) -> None:
    known = sets.TEST_SETS["RealSR"]
    before = sets.inspect(known, real_sr).sha256
    moved = real_sr.rename(tmp_path / "elsewhere")
    assert sets.inspect(known, moved).sha256 == before
    (moved / "test_LR/Canon_000_LR4.png").rename(moved / "test_LR/Canon_000.png")
    assert sets.inspect(known, moved).sha256 != before


def test_images_of_another_size_are_refused(tmp_path: Path, here: Path) -> None:
    names = [(f"{number:03}", f"{number:03}") for number in range(93)]
    folder = write_pairs(tmp_path / "full-size", names, side=64)
    with pytest.raises(UserError, match="got 64x64 px; expected 128x128"):
        sets.add_test_set("DRealSR", folder, here, TODAY)
    assert not (here / sets.MANIFEST).exists()


def test_a_set_without_originals_has_none(tmp_path: Path, here: Path) -> None:
    folder = tmp_path / "RealLR200"
    folder.mkdir()
    for number in range(200):
        Image.new("RGB", (20, 30), (number, 0, 0)).save(folder / f"photo{number:03}_x2.png")
    (folder / "._photo000_x2.png").write_bytes(b"what macOS leaves beside it")
    found = sets.add_test_set("RealLR200", folder, here, TODAY)
    assert (found.hr, len(found.pairs), {pair.hr for pair in found.pairs}) == (None, 200, {None})
    assert found.pairs[0].name == "photo000_x2"
    assert sets.find_test_set("RealLR200", here).lr.resolve() == folder.resolve()


def test_the_commands_say_it_too(real_sr: Path, here: Path) -> None:
    code, output = run("list", "--root", here)
    assert code == 0
    assert "RealSR not recorded" in output
    assert "RealLQ250 absent" in output
    code, output = run("add", "RealSR", real_sr, "--root", here)
    assert (code, "RealSR: 100 pairs, SHA-256" in output, "no published hash" in output) == (0, True, True)
    assert run("verify", "--root", here)[0] == 0
    assert json.loads((here / "test_sets.json").read_text())["test_sets"]["RealSR"]["folder"] == "RealSRVal_crop128"
    (real_sr / "test_LR/Canon_000_LR4.png").write_bytes(b"damaged")
    code, output = run("verify", "RealSR", "--root", here)
    assert (code, "1 of 1 test sets are not what was added: RealSR" in output) == (1, True)
    listed = json.loads(CliRunner().invoke(app, ["test-sets", "list", "--root", str(here), "--json"]).output)
    assert {one["name"]: one["state"] for one in listed["test_sets"]}["RealSR"] == "changed"
    code, output = run("verify", "DRealSR", "--root", here)
    assert (code, "nothing of it in" in output) == (2, True)
