"""`linearsr doctor resume`: equal where training resumes exactly, not equal where it does not, and nothing left of it."""

import json
import subprocess
import sys
from pathlib import Path
from random import Random

import pytest
import typer

from linearsr_platform.stages.resume_check import check_resume, choose_kill

pytestmark = pytest.mark.ray
SMOKE = Path(__file__).parents[2] / "pipelines" / "smoke.yaml"
EXACT = {
    "weights",
    "averaged weights (EMA)",
    "AdamW's first moments",
    "AdamW's second moments",
    "AdamW's number of steps",
    "noise generators",
    "place of the readers",
    "crops of every worker: keys, epochs, draws",
    "learning rate of every step",
    "loss of every step",
    "gradient norm of every step",
    "validations",
}


def doctor(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "linearsr_platform", "doctor", "resume", str(SMOKE), "--set", f"storage={folder}", *arguments]
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)


def test_a_recipes_interrupted_training_ends_with_the_same_bits(tmp_path: Path) -> None:
    done = doctor(tmp_path, "--steps", "6", "--workers", "2", "--json")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads(done.stdout)
    assert found["equal"] is True
    assert {row["what"] for row in found["rows"]} >= EXACT
    assert all(row["undisturbed"] == row["resumed"] != "" for row in found["rows"])
    worker, step = found["killed"]
    assert (worker, found["workers"]) == (0, 1)
    assert 0 < found["resumed_at"] < step <= 6
    assert (found["other"]["workers"], found["other"]["resumed_at"]) == (2, 2)
    assert found["other"]["rows"][0]["equal"] is True
    assert 0 < found["other"]["weights_apart"] < 0.5
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_trained_is_refused_before_anything_is_prepared(tmp_path: Path) -> None:
    for arguments, said in (
        (["--steps", "2"], "--steps: got 2; expected at least 3"),
        (["--workers", "3"], "train.batch_size: got 2 for 3 workers"),
        (["--workers", "2", "--set", "cluster.num_cpus=1"], "pretrain: got 2 workers of 1 CPUs each; expected at most 1"),
    ):
        done = doctor(tmp_path, *arguments)
        assert done.returncode == 2, done.stderr
        assert said in done.stderr
        assert list(tmp_path.iterdir()) == []


def test_a_resume_that_is_not_exact_is_found_out(cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from toy_training import toy_job

    from linearsr_platform.cli.doctor import show_and_exit

    job = toy_job(tmp_path, "forgetful", task="ForgetfulToyTask", workers=2)
    kill = choose_kill(2, 6, Random(3))
    found = check_resume(job, cluster, url=str(tmp_path / "doctor"), steps=6, kill=kill, other_workers=None, on_poll=lambda _: None)
    different = {row.what for row in found.rows if not row.equal}
    assert different == EXACT - {
        "AdamW's number of steps",
        "noise generators",
        "place of the readers",
        "crops of every worker: keys, epochs, draws",
        "learning rate of every step",
    }
    (loss,) = (row for row in found.rows if row.what == "loss of every step")
    assert loss.first_step == found.resumed_at + 1
    with pytest.raises(typer.Exit) as ended:
        show_and_exit(found, as_json=False)
    assert ended.value.exit_code == 1
    assert f"NOT EQUAL, from step {loss.first_step}" in capsys.readouterr().out
