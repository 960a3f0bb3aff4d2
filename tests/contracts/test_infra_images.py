"""Dockerfiles and shell scripts are linted; images run without root, from pinned versions within our bounds."""

import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
from fnmatch import fnmatch
from importlib.metadata import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement

PROGRAMS = Path(sysconfig.get_path("scripts"))
PIN = re.compile(r"^([\w.-]+)==(\S+)$", re.MULTILINE)


def _run(*words: object, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([str(word) for word in words], capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload, no-any-return]


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def _stages(text: str) -> dict[str, str]:
    """Instructions of each named stage of a Dockerfile, comments left out; the last one is called `last` too."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    stages: dict[str, list[str]] = {}
    name = ""
    for line in lines:
        if line.startswith("FROM "):
            name = line.rsplit(" AS ", 1)[1] if " AS " in line else "last"
        stages.setdefault(name, []).append(line)
    return {name: "\n".join(lines) for name, lines in stages.items()}


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.mlflow"])
def test_dockerfiles_have_no_findings(root: Path, name: str) -> None:
    done = _run(PROGRAMS / "hadolint", root / "infra/images" / name)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_the_linter_of_dockerfiles_would_find_something(tmp_path: Path) -> None:
    (tmp_path / "Dockerfile").write_text("FROM python\nRUN pip install numpy\n")
    done = _run(PROGRAMS / "hadolint", tmp_path / "Dockerfile")
    assert done.returncode != 0
    assert {"DL3006", "DL3013", "DL3042"} <= set(re.findall(r"DL\d{4}", done.stdout))


def test_shell_scripts_have_no_findings(root: Path, files: list[Path]) -> None:
    scripts = [root / name for name in files if (root / name).read_bytes().startswith((b"#!/usr/bin/env bash", b"#!/bin/bash"))]
    assert {path.name for path in scripts} >= {"build.sh", "run"}
    done = _run(PROGRAMS / "shellcheck", *scripts)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def test_images_end_without_root_and_take_nothing_unpinned(root: Path) -> None:
    for name, ends in (("Dockerfile", ["cpu", "gpu"]), ("Dockerfile.mlflow", ["last"])):
        text = (root / "infra/images" / name).read_text()
        stages = _stages(text)
        for end in ends:
            base = re.match(r"FROM (\S+)", stages[end])
            assert base is not None
            users = re.findall(r"^USER (\S+)$", stages.get(base[1], "") + "\n" + stages[end], re.MULTILINE)
            assert users[-1:] == ["1000:1000"], f"{name}: {end}"
            assert "pip install" not in stages[end], "the last stage has no compiler's and no installer's leftovers"
        external = set(re.findall(r"^FROM (\S+)", text, re.MULTILINE)) - set(stages)
        assert external == {"${PYTHON_IMAGE}"}
        assert re.findall(r"^ARG PYTHON_IMAGE=(\S+)$", text, re.MULTILINE) == ["python:3.12.12-slim-bookworm"]


def test_the_context_holds_what_is_copied_and_little_else(root: Path) -> None:
    lines = [line for line in (root / ".dockerignore").read_text().splitlines() if line and not line.startswith("#")]
    assert lines[0] == "*"
    admitted = [line.removeprefix("!") for line in lines if line.startswith("!")]
    copied = set()
    for name in ("Dockerfile", "Dockerfile.mlflow"):
        for sources in re.findall(r"^COPY (?!--from)(.+) \S+$", (root / "infra/images" / name).read_text(), re.MULTILINE):
            copied |= set(sources.split())
    assert copied == set(admitted)
    assert [source for source in copied if not (root / source).exists()] == []
    assert any(fnmatch("linearsr/__pycache__", line) for line in lines[1:])


def test_every_requirement_of_the_images_is_pinned_within_its_bounds(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    pins = {_normal(name): version for name, version in PIN.findall((root / "infra/images/constraints.txt").read_text())}
    (extras,) = set(re.findall(r"^ARG EXTRAS=(\S+)$", (root / "infra/images/Dockerfile").read_text(), re.MULTILINE))
    optional = project["optional-dependencies"]
    requirements = [Requirement(one) for one in project["dependencies"] + [one for name in extras.split(",") for one in optional[name]]]
    for one in requirements:
        assert one.specifier.contains(pins[_normal(one.name)]), str(one)
    named = {_normal(one.name) for one in requirements}
    server = {_normal(line) for line in re.findall(r"^[\w-]+$", (root / "infra/images/mlflow-requirements.txt").read_text(), re.MULTILINE)}
    assert pins.keys() - named - server == {"botocore"}, "pins that nothing asks for"
    assert server <= pins.keys()


def test_images_and_launched_nodes_have_the_extras_that_recipes_ask_for(root: Path) -> None:
    (line,) = re.findall(r"^ARG EXTRAS=(\S+)$", (root / "infra/images/Dockerfile").read_text(), re.MULTILINE)
    told = [re.search(r"the extras (\w+(?:, \w+)* and \w+)", path.read_text()) for path in (root / "pipelines").glob("*.yaml")]
    asked = {extra for found in told if found is not None for extra in re.split(r", | and ", found[1])}
    assert asked
    assert asked <= set(line.split(","))
    for path in (root / "infra/launcher").glob("*.yaml"):
        assert f".whl | head -n 1)[{line}]" in path.read_text(), path.name


def test_every_extra_that_is_asked_of_others_is_one_of_theirs(root: Path) -> None:
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    requirements = [Requirement(one) for extra in project["optional-dependencies"].values() for one in extra]
    asking = [one for one in requirements if one.extras]
    assert {one.name for one in asking} >= {"ray", "moto"}
    for one in asking:
        # pip only warns of an extra that is not there, and installs nothing for it.
        offered = metadata(one.name).get_all("Provides-Extra") or []
        assert {_normal(extra) for extra in one.extras} <= {_normal(extra) for extra in offered}, str(one)


def test_the_dockerfile_reads_requirements_as_pip_would(root: Path, tmp_path: Path) -> None:
    text = (root / "infra/images/Dockerfile").read_text()
    code = re.search(r"python -c '([^']+)' \"\$\{EXTRAS\}\" > requirements\.txt", text)
    assert code is not None
    shutil.copy(root / "pyproject.toml", tmp_path)
    done = _run(sys.executable, "-c", code[1], "platform,tags", cwd=tmp_path)
    project = tomllib.loads((root / "pyproject.toml").read_text())["project"]
    optional = project["optional-dependencies"]
    assert done.stdout.splitlines() == [*project["dependencies"], *optional["platform"], *optional["tags"]], done.stderr


def test_the_build_script_builds_what_is_named_and_refuses_the_rest(root: Path, tmp_path: Path) -> None:
    docker = tmp_path / "docker"
    docker.write_text('#!/bin/bash\nif [ "$#" -gt 4 ]; then test -f infra/images/Dockerfile; fi\necho "$*"\n')
    docker.chmod(0o755)
    script = root / "infra/images/build.sh"
    environment = {"PATH": "/usr/bin:/bin", "DOCKER": str(docker), "REGISTRY": "r.example", "VERSION": "9.9", "EXTRAS": "platform"}

    done = _run(script, "--push", "gpu", "mlflow", env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    builds = [line for line in done.stdout.splitlines() if line.startswith("build ")]
    assert builds[0].endswith(" --tag r.example/linearsr:9.9-gpu .")
    assert "--target gpu" in builds[0]
    assert "--build-arg EXTRAS=platform " in builds[0]
    assert "--file infra/images/Dockerfile.mlflow" in builds[1]
    assert "push r.example/linearsr:9.9-gpu" in done.stdout.splitlines()

    done = _run(script, "tpu", env=environment, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "got tpu; expected cpu, gpu or mlflow" in done.stderr
    assert _run(script, "--help", env=environment, cwd=tmp_path).stdout.startswith("usage: ")
