"""`linearsr check` and the error boundary, as a user meets them: a real process, its output and its exit code."""

import subprocess
import sys
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from linearsr_platform.cli.boundary import reports_errors
from linearsr_platform.data.shard_files import ShardAwayError
from linearsr_platform.errors import StageError, UserError

ROOT = Path(__file__).parents[2]
LATENT = ("--set", "model.flow.loss_weighting=latent")
QUICKSTART = str(ROOT / "pipelines" / "quickstart.yaml")


def linearsr(*arguments):
    command = "from linearsr_platform.cli.app import main; main()"
    return subprocess.run([sys.executable, "-c", command, *arguments], capture_output=True, text=True, check=False, cwd=ROOT)


def test_check_summarises_a_recipe_without_importing_anything_heavy():
    script = (
        "import sys\n"
        "from linearsr_platform.cli.app import app\n"
        f"app(['check', {QUICKSTART!r}, '--set', 'storage=/data/runs'], standalone_mode=False)\n"
        "print('HEAVY', sorted({'torch', 'ray', 'mlflow', 'deepspeed', 'numpy'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    assert "HEAVY []" in done.stdout
    for part in ("quickstart", "prepare > pretrain > experts", "linearsr-quickstart", "/data/runs"):
        assert part in done.stdout


def test_check_misses_the_weights_of_a_codec(tmp_path):
    done = linearsr("check", QUICKSTART, "--set", f"model.codec={{kind: dc-ae, factor: 32, source: {tmp_path}/dcae}}", *LATENT)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"error: codec.source: got '{tmp_path}/dcae'; expected a local folder, which is not there; fix: name")


def test_check_tells_all_errors_on_standard_error_and_counts_them():
    done = linearsr("check", QUICKSTART, "--set", "pretrain.max_step=3", "--set", "seed=x")
    assert (done.returncode, done.stdout) == (2, "")
    lines = done.stderr.splitlines()
    assert lines[0].startswith('error: --set seed=x: seed: got "x"; expected a whole number')
    assert "did you mean pretrain.max_steps?" in lines[1]
    assert lines[2].startswith("2 errors")
    assert "Traceback" not in done.stderr


def test_an_expert_that_would_never_run_is_told_with_what_helps():
    done = linearsr("check", QUICKSTART, "--set", "sampler={num_steps: 8}")
    assert done.returncode == 0, done.stderr
    assert "is valid" in done.stdout
    assert "warning: sampler: got 8 steps on the uniform grid without a noise level for expert 4 of 4" in done.stderr
    assert "fix: take at least 12 steps or set sampler.grid to flow-euler" in done.stderr
    assert linearsr("check", QUICKSTART).stderr == ""


def test_a_traceback_comes_with_verbose_only():
    done = linearsr("check", "nowhere.yaml", "--verbose")
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert "error: nowhere.yaml: there is no such file" in done.stderr


@pytest.mark.parametrize("arguments", [("check",), ("check", QUICKSTART, "--bogus"), ("chekc",)])
def test_a_wrong_command_line_exits_with_2(arguments):
    assert linearsr(*arguments).returncode == 2


def test_version_is_one_line():
    done = linearsr("--version")
    assert done.returncode == 0
    assert done.stdout.startswith("linearsr")


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (UserError("photo.jpg: fix it"), 2, "error: photo.jpg: fix it"),
        (StageError("pretrain: lost"), 1, "error: pretrain: lost"),
        (PermissionError(13, "Permission denied", "/data"), 1, "error: [Errno 13] Permission denied: '/data'"),
        (ShardAwayError("shard s3://b/a.tar: its store does not answer"), 1, "error: shard s3://b/a.tar: its store does not answer"),
        (KeyboardInterrupt(), 130, "interrupted"),
    ],
)
def test_errors_become_one_sentence_and_an_exit_code(error, code, text):
    app = typer.Typer()

    @app.command()
    @reports_errors
    def fail(verbose: bool = False) -> None:
        raise error

    result = CliRunner().invoke(app, [])
    assert result.exit_code == code
    assert result.stderr.strip() == text
