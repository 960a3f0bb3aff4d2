"""The shape of the repository, each rule with what broke when it did not hold."""

import re
import tomllib
from pathlib import Path

MACHINE_PATH = re.compile(r"(?<![\w.~])/(?:work|root|home|Users)/")
PACKAGE_INDEX = re.compile(r"https?://[^ \"]+/(?:simple|packages)/|--(?:extra-)?index-url|(?m:^)find-links|\"resolved\": *\"https?:")
MAX_FILE_BYTES = 1 << 20


def test_the_standard_library_keeps_its_platform_module(files: list[Path]) -> None:
    python = [name for name in files if name.parts[0] == "platform" and len(name.parts) == 2 and name.suffix == ".py"]
    assert python == []


def test_platform_holds_one_package_and_its_readme(files: list[Path]) -> None:
    assert {name.parts[1] for name in files if name.parts[0] == "platform"} == {"README.md", "linearsr_platform"}


def test_every_folder_of_a_package_is_a_typed_package(root: Path, files: list[Path]) -> None:
    folders = {name.parent for name in files if name.suffix == ".py" and name.parts[0] in ("linearsr", "platform")}
    assert [str(folder) for folder in sorted(folders) if not (root / folder / "__init__.py").is_file()] == []
    assert (root / "linearsr/py.typed").is_file()
    assert (root / "platform/linearsr_platform/py.typed").is_file()


def test_top_level_has_only_what_the_readme_explains(files: list[Path]) -> None:
    folders = {name.parts[0] for name in files if len(name.parts) > 1}
    assert folders <= {".ci", "docs", "infra", "linearsr", "pipelines", "platform", "tests"}
    top = {name.parts[0] for name in files if len(name.parts) == 1}
    assert {"README.md", "CONTRIBUTING.md", "LICENSE", "Makefile", "pyproject.toml"} <= top


def test_tests_have_no_packages_and_no_folder_shadows_a_module(files: list[Path]) -> None:
    tests = [name for name in files if name.parts[0] == "tests"]
    assert [str(name) for name in tests if name.name == "__init__.py"] == []
    assert {part for name in tests for part in name.parent.parts} & {"platform", "linearsr", "linearsr_platform"} == set()


def test_test_files_have_unique_names(files: list[Path]) -> None:
    names = [name.name for name in files if name.parts[0] == "tests" and name.name.startswith("test_")]
    assert sorted(name for name in set(names) if names.count(name) > 1) == []


def test_no_file_knows_this_machine_or_a_package_index(texts: dict[Path, str]) -> None:
    found = [
        f"{name}:{number}: {line.strip()[:100]}"
        for name, text in texts.items()
        for number, line in enumerate(text.splitlines(), start=1)
        if MACHINE_PATH.search(line) or PACKAGE_INDEX.search(line)
    ]
    assert found == []


def test_no_large_file_is_committed(root: Path, files: list[Path]) -> None:
    sizes = {str(name): (root / name).stat().st_size for name in files}
    assert {name: size for name, size in sizes.items() if size > MAX_FILE_BYTES} == {}


def test_every_requirement_has_a_lower_bound_or_a_pin(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    requirements = [*project["dependencies"], *(one for extra in extras for one in extra)]
    assert [one for one in requirements if not one.startswith("linearsr[") and not re.search(r">=|==", one)] == []
