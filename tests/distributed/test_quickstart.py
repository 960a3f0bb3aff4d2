"""The quickstart for real: the command a new user runs, once, and everything it promises."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from linearsr_platform.recipe.load import load_recipe

pytestmark = [pytest.mark.ray, pytest.mark.slow]

ROOT = Path(__file__).parents[2]
LINEARSR = Path(sys.executable).with_name("linearsr")
RECIPE = ROOT / "pipelines" / "quickstart.yaml"


def linearsr(*arguments: object, folder: Path) -> str:
    done = subprocess.run([LINEARSR, *map(str, arguments)], cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which the quickstart was run."""
    folder = tmp_path_factory.mktemp("quickstart")
    print(linearsr("run", RECIPE, "--profile", ROOT / "pipelines" / "profiles" / "local.yaml", folder=folder))
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> dict[str, dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in (folder / "runs" / "quickstart").glob("*/result.json")]
    return {result["stage"]: result for result in found}


def test_every_stage_left_a_result(results: dict[str, dict[str, Any]]) -> None:
    assert set(results) == {"prepare", "pretrain", "experts", "finetune", "assemble", "evaluate", "register", "promote"}


def test_the_one_step_estimate_beats_bicubic_on_photographs_never_trained_on(results: dict[str, dict[str, Any]]) -> None:
    rows = results["evaluate"]["data"]["tables"]["quickstart"]["rows"]
    assert sorted(results["evaluate"]["data"]["names"]) == ["coffee", "flower", "rocket"]
    assert rows["one_step"]["psnr_y"] > rows["bicubic"]["psnr_y"]
    assert rows["one_step"]["ssim_y"] > rows["bicubic"]["ssim_y"]


def test_the_routed_sampler_beats_bicubic_on_the_metric_named_beforehand(results: dict[str, dict[str, Any]]) -> None:
    rows = results["evaluate"]["data"]["tables"]["quickstart"]["rows"]
    assert load_recipe(str(RECIPE)).recipe.evaluate.perceptual == "fsim"
    assert rows["routed"]["fsim"] > rows["bicubic"]["fsim"]
    assert {"psnr_y", "ssim_y", "fsim", "gmsd", "vsi"} <= set(rows["routed"])


def test_each_next_stage_started_from_a_knee(results: dict[str, dict[str, Any]]) -> None:
    import mlflow

    pretrain = results["pretrain"]["data"]["trainers"]["pretrain"]
    experts = results["experts"]["data"]["trainers"]
    assert set(experts) == {f"expert-{i}" for i in (1, 2, 3, 4)}
    assert all(f"step_{outcome['knee_step']:08d}" in outcome["knee_weights"] for outcome in experts.values())
    client = mlflow.MlflowClient(f"sqlite:///{Path(results['pretrain']['url']).parents[1] / 'mlflow.db'}")
    children = client.search_runs(
        [experiment.experiment_id for experiment in client.search_experiments()],
        f"tags.`mlflow.parentRunId` = '{results['experts']['run_id']}'",
    )
    starts = {run.data.tags["mlflow.runName"]: run.data.params["init_weights"] for run in children}
    assert starts == dict.fromkeys(experts, pretrain["knee_weights"])
    for run in children:
        assert run.info.status == "FINISHED"
        assert int(run.data.tags["knee"]) == experts[run.data.tags["mlflow.runName"]]["knee_step"]
        curve = client.get_metric_history(run.info.run_id, "validation/psnr_y")
        assert len(curve) == len(experts[run.data.tags["mlflow.runName"]]["history"])


def test_the_champion_enlarges_a_photograph(folder: Path) -> None:
    lr = next((folder / "runs" / "quickstart").glob("evaluate-*/test_set/lr/coffee.png"))
    Image.open(lr).crop((0, 0, 61, 43)).save(folder / "in.png")
    linearsr("upscale", "in.png", "out.png", "--model", "models:/linearsr-quickstart@champion", folder=folder)
    assert Image.open(folder / "out.png").size == (244, 172)


def test_plain_mlflow_loads_the_champion(folder: Path) -> None:
    code = (
        "import mlflow, numpy as np\n"
        f"mlflow.set_tracking_uri('sqlite:///{folder}/runs/mlflow.db')\n"
        "model = mlflow.pyfunc.load_model('models:/linearsr-quickstart@champion')\n"
        "np.save('out.npy', model.predict(np.full((1, 3, 8, 12), 0.5, np.float32)))\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True)
    restored = np.load(folder / "out.npy")
    assert restored.shape == (1, 3, 32, 48)
    assert abs(restored.mean() - 0.5) < 0.05


def test_the_report_stands_alone(folder: Path) -> None:
    html = (folder / "runs" / "quickstart" / "report.html").read_text()
    for word in ("coffee", "rocket", "flower", "expert-4", "0.223", "Bicubic", "Routed"):
        assert word in html
    assert 'src="http' not in html
    assert 'href="http' not in html


def test_a_second_run_does_nothing_again_and_says_so(folder: Path) -> None:
    results = sorted((folder / "runs" / "quickstart").glob("*/result.json"))
    before = {path: path.stat().st_mtime_ns for path in results}
    output = linearsr("run", RECIPE, "--profile", ROOT / "pipelines" / "profiles" / "local.yaml", folder=folder)
    assert output.count("skipped") == 8
    # No trainer was started, and no result written again.
    assert "queued" not in output
    assert {path: path.stat().st_mtime_ns for path in sorted((folder / "runs" / "quickstart").glob("*/result.json"))} == before
