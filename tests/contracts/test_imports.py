"""What an import may bring with it. import-linter holds the directions; these hold what is only seen by running."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "ray", "mlflow", "deepspeed", "webdataset", "pyiqa", "transformers", "diffusers", "huggingface_hub")
LIGHT = [
    "linearsr",
    "linearsr.config",
    "linearsr.codec_source",
    "linearsr.degradation_config",
    "linearsr.opencv",
    "linearsr.experts",
    "linearsr.task_config",
    "linearsr_platform",
    "linearsr_platform.errors",
    "linearsr_platform.storage",
    "linearsr_platform.recipe.schema",
    "linearsr_platform.recipe.load",
    "linearsr_platform.recipe.identity",
    "linearsr_platform.cli.app",
]


def _python(code: str, root: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("module", LIGHT)
def test_a_light_module_imports_nothing_heavy(module: str, root: Path) -> None:
    done = _python(f"import sys, {module}; print([name for name in {HEAVY} if name in sys.modules])", root)
    assert (done.stdout.strip(), done.returncode) == ("[]", 0), done.stderr


def test_deepspeed_comes_into_a_worker_late_and_without_mlflow(root: Path) -> None:
    # A driver never needs DeepSpeed, and MLflow, which DeepSpeed imports if it can, costs each worker 2 s and 130 MB.
    loaded = "print([name for name in ('deepspeed', 'mlflow') if sys.modules.get(name)])"
    worker = (
        f"from linearsr_platform.cluster.worker import keep_mlflow_out; keep_mlflow_out(); import linearsr_platform.train.engine; {loaded}"
    )
    done = _python(f"import sys, linearsr_platform.cluster.trainer, linearsr_platform.cluster.sweep; {loaded}; {worker}", root)
    assert done.returncode == 0, done.stderr
    assert [line for line in done.stdout.splitlines() if line.startswith("[") and line.endswith("]")] == ["[]", "['deepspeed']"]


def test_what_starts_a_trainer_does_without_torch(root: Path) -> None:
    # Nor does its controller, which unpickles the same: 3 CPU seconds and 330 MB a trainer.
    trainer = "linearsr_platform.cluster.trainer, linearsr_platform.cluster.process_group, linearsr_platform.train.job"
    done = _python(f"import sys, {trainer}; print('torch' in sys.modules)", root)
    assert (done.stdout.strip().splitlines()[-1:], done.returncode) == (["False"], 0), done.stderr


def test_the_method_runs_without_the_platform_and_its_dependencies(root: Path) -> None:
    absent = ["linearsr_platform", "cv2", "ray", "mlflow", "deepspeed", "webdataset", "pyiqa", "pydantic", "typer", "rich", "yaml"]
    modules = sorted(f"linearsr.{path.stem}" for path in (root / "linearsr").glob("*.py") if path.stem != "__init__")
    code = f"import sys; sys.modules.update(dict.fromkeys({absent})); import {', '.join(modules)}"
    done = _python(code, root)
    assert done.returncode == 0, done.stderr


def test_what_is_for_a_gpu_machine_needs_torch_and_pytest_alone(root: Path) -> None:
    absent = ["numpy", "PIL", "safetensors", "hypothesis", "xdist", "ray", "deepspeed", "diffusers", "fsspec", "xxhash", "pydantic", "yaml"]
    code = f"""import runpy, sys
sys.modules.update(dict.fromkeys({absent}))
import pytest
runpy.run_path("tests/benchmarks/gpu/one_forward.py")
sys.exit(pytest.main(["--collect-only", "-q", "tests/gpu"]))"""
    environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    done = subprocess.run([sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_standard_library_wins_over_our_platform_folder(root: Path) -> None:
    done = _python("import uuid, platform; print(platform.python_version())", root)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == sys.version.split()[0]


@pytest.mark.parametrize("missing", ["typer", "pydantic"])
def test_the_command_line_names_the_extra_that_is_missing(missing: str, root: Path) -> None:
    arguments = ["linearsr", "check", "pipelines/quickstart.yaml"]
    code = f"import sys; sys.modules[{missing!r}] = None; sys.argv = {arguments}; from linearsr_platform.cli.app import main; main()"
    done = _python(code, root)
    assert done.returncode == 2
    assert "linearsr[platform]" in done.stderr
    assert "Traceback" not in done.stderr
