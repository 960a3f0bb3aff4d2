"""`make install` does its work once, again only when pyproject.toml changed, and says what is wrong with a Python."""

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

EVERYTHING = "-m pip install --quiet --editable .[dev]"
# Stands in for both the system's Python and the environment's: writes down what it was asked to do.
FAKE_PYTHON = """#!/bin/bash
here=$(cd "$(dirname "$0")" && pwd)
if [ "$1" = -c ]; then case "$2" in *version_info*) exit "${OLD_PYTHON:-0}" ;; *ensurepip*) exit "${NO_VENV:-0}" ;; esac; fi
if [ "$1" = --version ]; then echo "Python 3.9.2"; exit; fi
echo "$*" >> "$LOG"
if [ "$2" = venv ]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; touch "$3/bin/pip"; chmod +x "$3/bin/pip"; fi
if [ "$2" = pip ]; then exit "${PIP_FAILS:-0}"; fi
"""


Install = Callable[..., tuple[subprocess.CompletedProcess[str], list[str]]]


@pytest.fixture
def install(root: Path, tmp_path: Path) -> Install:
    """Run `make install` in a checkout whose Python only takes notes: how it ended, and what Python was asked to do."""
    for name in ("Makefile", "pyproject.toml"):
        shutil.copy(root / name, tmp_path / name)
    python = tmp_path / "python3"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    log = tmp_path / "log"
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("MAKE", "MFLAGS"))}

    def run(**environment: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
        log.write_text("")
        variables = {**inherited, "LOG": str(log), **environment}
        done = subprocess.run(
            ["make", f"PYTHON={python}", "install"], cwd=tmp_path, env=variables, capture_output=True, text=True, check=False
        )
        return done, log.read_text().splitlines()

    return run


def test_a_second_install_does_nothing(install: Install, tmp_path: Path) -> None:
    done, calls = install()
    assert done.returncode == 0, done.stderr
    assert (calls[0], calls[-1]) == ("-m venv .venv", EVERYTHING)
    (tmp_path / "pyproject.toml").touch()
    done, calls = install()
    assert (done.returncode, calls) == (0, [])


def test_a_changed_pyproject_installs_again_into_the_same_environment(install: Install, tmp_path: Path) -> None:
    install()
    with (tmp_path / "pyproject.toml").open("a") as project:
        project.write("# one more line\n")
    _, calls = install()
    assert "-m venv .venv" not in calls
    assert calls[-1] == EVERYTHING


def test_a_failed_install_is_tried_again(install: Install) -> None:
    done, _ = install(PIP_FAILS="1")
    assert done.returncode != 0
    done, calls = install()
    assert (done.returncode, calls[-1]) == (0, EVERYTHING)


@pytest.mark.parametrize(
    ("environment", "hint"),
    [({"OLD_PYTHON": "1"}, "got Python 3.9.2"), ({"NO_VENV": "1"}, "apt install python3-venv")],
)
def test_an_unusable_python_is_named_with_the_remedy(install: Install, tmp_path: Path, environment: dict[str, str], hint: str) -> None:
    done, _ = install(**environment)
    assert done.returncode != 0
    assert hint in done.stderr
    assert not (tmp_path / ".venv").exists()


def test_ci_needs_nothing_but_make_test(root: Path) -> None:
    script = root / ".ci/run"
    assert os.access(script, os.X_OK)
    assert script.read_text().splitlines()[-1] == "make test"
