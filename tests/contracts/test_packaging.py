"""What a wheel holds: a serving image or a Ray node has nothing else."""

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def wheel(root: Path, tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("wheel")
    build = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)]
    subprocess.run(build, cwd=root, check=True, capture_output=True)
    (path,) = folder.glob("*.whl")
    return zipfile.ZipFile(path)


def test_the_wheel_holds_both_packages_and_nothing_else(wheel: zipfile.ZipFile, files: list[Path]) -> None:
    expected = {name for name in files if name.parts[0] == "linearsr"}
    expected |= {Path(*name.parts[1:]) for name in files if name.parts[0] == "platform" and len(name.parts) > 2}
    packed = {Path(name) for name in wheel.namelist() if ".dist-info/" not in name}
    assert packed == expected
    assert {Path("linearsr/py.typed"), Path("linearsr_platform/py.typed")} <= packed


def test_the_wheel_installs_the_command_line(wheel: zipfile.ZipFile) -> None:
    (entry_points,) = [name for name in wheel.namelist() if name.endswith("entry_points.txt")]
    assert "linearsr = linearsr_platform.cli.app:main" in wheel.read(entry_points).decode()


def test_the_base_install_needs_only_what_the_method_needs(wheel: zipfile.ZipFile) -> None:
    (metadata,) = [name for name in wheel.namelist() if name.endswith("METADATA")]
    required = re.findall(r"^Requires-Dist: ([\w-]+)(?!.*extra ==)", wheel.read(metadata).decode(), re.MULTILINE)
    assert sorted(required) == ["numpy", "pillow", "safetensors", "torch"]
