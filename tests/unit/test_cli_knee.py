"""`linearsr knee` as a user meets it: files of every make, one clear sentence for each mistake, runs in MLflow."""

import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from linearsr.config import MIN_POINTS
from linearsr.curves import HIGHER_IS_BETTER, orientation_of, parse_csv, parse_declarations
from linearsr_platform.cli.app import app
from linearsr_platform.tracking.histories import metric_histories
from linearsr_platform.tracking.runs import Tracker
from linearsr_platform.tracking.store import default_artifact_root, default_uri

KNEE, ONSET, EVERY, LENGTH = 20, 24, 100, 70  # Evaluations; step 100 is evaluation 0.


def curve(seed: int = 0, *, oscillates: bool = True) -> dict[str, list[float]]:
    """Three metrics that rise until KNEE and, after ONSET, swing with five times the noise."""
    rng = np.random.default_rng(seed)
    i = np.arange(LENGTH)
    rise = 1 - np.exp(-i / 5) if oscillates else i / LENGTH
    noise = np.where((i > ONSET) & oscillates, 0.15, 0.03)
    units = {"psnr_y": (24.0, 0.8), "ssim_y": (0.66, 0.04), "lpips": (0.5, -0.2)}
    return {name: [round(base + unit * v, 6) for v in rise + noise * rng.standard_normal(LENGTH)] for name, (base, unit) in units.items()}


def table(columns: dict[str, list[float]], *, rows: int = LENGTH) -> list[list[str]]:
    return [["step", *columns], *([str(EVERY * (i + 1)), *(str(c[i]) for c in columns.values())] for i in range(rows))]


def written(path: Path, rows: list[list[str]], delimiter: str = ",", newline: str = "\n") -> Path:
    path.write_bytes("".join(delimiter.join(row) + newline for row in rows).encode())
    return path


@pytest.fixture
def csv(tmp_path: Path) -> Path:
    return written(tmp_path / "curves.csv", table(curve()))


def run(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, ["knee", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def answer(*arguments: object) -> dict[str, object]:
    code, out, err = run(*arguments, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def test_json_is_one_object_with_the_knee(csv):
    found = answer(csv)
    assert list(found) == ["knee_step", "confirmed_at", "state", "interval", "onset_step", "metrics", "saved_fraction", "reason"]
    assert found["state"] == "confirmed"
    low, high = found["interval"]
    assert 0.65 * KNEE * EVERY <= found["knee_step"] <= (ONSET + 2) * EVERY
    assert low <= found["knee_step"] <= high
    assert found["knee_step"] <= found["onset_step"] < found["confirmed_at"]
    assert found["saved_fraction"] == pytest.approx(1 - found["confirmed_at"] / (LENGTH * EVERY), abs=1e-4)
    assert {name: one["higher_is_better"] for name, one in found["metrics"].items()} == {"psnr_y": True, "ssim_y": True, "lpips": False}
    assert all(set(one) == {"higher_is_better", "state", "best_step", "onset_step"} for one in found["metrics"].values())


def test_a_curve_that_improves_has_no_knee_and_that_is_no_error(tmp_path):
    found = answer(written(tmp_path / "rise.csv", table(curve(oscillates=False))))
    assert (found["knee_step"], found["confirmed_at"], found["interval"], found["saved_fraction"]) == (None, None, None, 0.0)
    assert answer(written(tmp_path / "short.csv", table(curve(), rows=MIN_POINTS)))["knee_step"] is None


def test_online_replays_what_training_would_have_seen(csv, tmp_path):
    seen = answer(csv, "--online")["decisions"]
    assert [one["step"] for one in seen] == [EVERY * (i + 1) for i in range(LENGTH)]
    certain = next(one["step"] for one in seen if one["state"] == "confirmed")
    assert certain == answer(csv)["confirmed_at"]
    half = written(tmp_path / "half.csv", table(curve(), rows=LENGTH // 2))
    assert answer(half, "--online")["decisions"] == seen[: LENGTH // 2]


def test_people_get_the_answer_in_words_and_a_line_for_each_metric(csv):
    found = answer(csv)
    code, out, _ = run(csv, "--online")
    assert code == 0
    for part in ("Knee confirmed", f"step {found['knee_step']}", f"step {found['confirmed_at']}", found["reason"]):
        assert part in out
    lines = [line.split() for line in out.splitlines()]
    assert [line[:2] for line in lines if line and line[0] in curve()] == [["psnr_y", "higher"], ["ssim_y", "higher"], ["lpips", "lower"]]
    assert sum(line[:1] == [str(EVERY * (i + 1))] for i in range(LENGTH) for line in lines) == LENGTH


VARIANTS = {
    "BOM": lambda text: "\ufeff" + text,
    "CRLF": lambda text: text.replace("\n", "\r\n"),
    "semicolons": lambda text: text.replace(",", ";"),
    "tabs": lambda text: text.replace(",", "\t"),
    "spaces and capitals": lambda text: text.replace("step,psnr_y", " Step , PSNR_Y ").replace("\n", " \n").replace(",", " , "),
    "blank lines": lambda text: "\n" + text.replace("\n", "\n\n,,,\n"),
    "steps as floats": lambda text: text.replace("\n1000,", "\n1e3,").replace("\n2000,", "\n2000.0,"),
    "names of MLflow": lambda text: text.replace("psnr_y", "validation/psnr_y"),
    "an index without a name": lambda text: "".join(f"{'' if i == 0 else i - 1},{line}\n" for i, line in enumerate(text.splitlines())),
    "rows of training between": lambda text: "".join(f"{line}\n{line.split(',')[0]},,,\n" for line in text.splitlines()),
    "cells in quotes": lambda text: text.replace("step", '"step"'),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_same_table_in_another_dress_gives_the_same_points(csv, variant):
    plain = csv.read_text()
    expected, got = parse_csv(plain, "a", {}), parse_csv(VARIANTS[variant](plain), "b", {})
    assert [(step, [*values.values()]) for step, values in got.points] == [(step, [*values.values()]) for step, values in expected.points]
    assert [*got.orientations.values()] == [*expected.orientations.values()]


def test_an_empty_cell_is_missing_and_nan_is_divergence(csv):
    rows = table(curve())
    rows[3][1], rows[4][1], rows[5][1], rows[5][2] = "", "nan", "inf", "-inf"
    points = parse_csv("\n".join(map(",".join, rows)), "curves", {}).points
    assert "psnr_y" not in points[2][1]
    assert math.isnan(points[3][1]["psnr_y"])
    assert [points[4][1][name] for name in ("psnr_y", "ssim_y")] == [math.inf, -math.inf]


def test_declared_metrics_are_the_only_ones_used(tmp_path):
    columns = curve()
    file = written(
        tmp_path / "own.csv", table({"epoch": list(range(LENGTH)), "my_score": columns["lpips"], "eval/psnr": columns["psnr_y"]})
    )
    found = answer(file, "--metric", "my_score:lower", "--metric", "psnr")
    assert {name: one["higher_is_better"] for name, one in found["metrics"].items()} == {"my_score": False, "eval/psnr": True}


def changed(row: int, column: int, cell: str) -> str:
    rows = table(curve())
    rows[row][column] = cell
    return "\n".join(map(",".join, rows))


MISTAKES = {
    "no step column": (changed(0, 0, "iteration"), (), "`step`", "rename 'iteration'"),
    "steps that do not ascend": (
        changed(9, 0, "800"),
        (),
        "c.csv:10: got step 800 after 800",
    ),
    "a broken step": (changed(9, 0, "850.5"), (), "c.csv:10: got step 850.5"),
    "text for a number": (changed(9, 2, "n/a"), (), "c.csv:10: got ssim_y 'n/a'"),
    "a decimal comma": (changed(9, 2, '"0,8"'), (), "decimal point"),
    "a cell too many": (changed(9, 3, "0.1,0.2"), (), "c.csv:10: got 5 cells"),
    "an unknown metric": (changed(0, 3, "lpipss"), (), "'lpipss'", "nearest known name is 'lpips'", "--metric 'lpipss:higher'"),
    "a metric of training": (changed(0, 3, "train/loss"), (), "'train/loss'"),
    "a column twice": (changed(0, 2, "psnr_y"), (), "two columns 'psnr_y'"),
    "an absent metric": (changed(0, 0, "step"), ("--metric", "musiq"), "no column 'musiq'"),
    "an undeclared orientation": (changed(0, 3, "own"), ("--metric", "own"), "--metric 'own:lower'"),
    "a wrong orientation": (changed(0, 0, "step"), ("--metric", "psnr_y:up"), "NAME:higher or NAME:lower"),
    "a metric twice": (changed(0, 0, "step"), ("--metric", "psnr_y", "--metric", "psnr_y:lower"), "psnr_y twice"),
    "too few points": (
        "step,psnr\n" + "".join(f"{i},{i}\n" for i in range(MIN_POINTS - 1)),
        (),
        f"got {MIN_POINTS - 1} ",
        f"at least {MIN_POINTS}",
    ),
    "a quote that never ends": (changed(9, 3, '"0.1'), (), "no table"),
    "a header alone": ("step,psnr\n", (), "got 0 evaluations"),
    "no metric at all": ("step\n" + "".join(f"{i}\n" for i in range(9)), (), "got no metric"),
    "a metric without values": ("step,psnr,ssim\n" + "".join(f"{i},{i},\n" for i in range(9)), (), "no value of ssim"),
    "an empty file": ("", (), "empty file"),
    "another picture": (changed(0, 0, "step"), ("--plot", "knee.pdf"), ".png"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_each_mistake_is_one_sentence_and_exit_code_2(tmp_path, mistake):
    text, arguments, *parts = MISTAKES[mistake]
    (tmp_path / "c.csv").write_text(text)
    code, out, err = run(tmp_path / "c.csv", *arguments)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert [part for part in parts if part not in err] == []


def test_a_file_that_is_not_there_or_no_text_is_told(tmp_path):
    (tmp_path / "image.csv").write_bytes(b"\x89PNG\xff\xfe")
    for arguments, part in (([tmp_path / "no.csv"], "no such file"), ([tmp_path / "image.csv"], "UTF-8"), ([], "CURVES.csv or --run")):
        code, _, err = run(*arguments)
        assert code == 2
        assert part in err


def test_the_answer_and_the_picture_need_no_torch(csv):
    picture = csv.with_name("knee.png")
    script = (
        "import sys\n"
        "from linearsr_platform.cli.app import app\n"
        f"app(['knee', {str(csv)!r}, '--json', '--plot', {str(picture)!r}], standalone_mode=False)\n"
        "print('HEAVY', sorted({'torch', 'ray', 'mlflow', 'deepspeed', 'pandas', 'matplotlib.pyplot'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "HEAVY []" in done.stdout
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("name", "higher"),
    [
        ("validation/psnr_y", True),
        ("val_LPIPS", False),
        ("eval/MS-SSIM", True),
        ("loss", False),
        ("val_loss", False),
        ("maniqa-pipal", True),
    ],
)
def test_names_are_known_in_the_spellings_of_other_trainers(name, higher):
    assert orientation_of(name) is higher
    assert parse_declarations([name]) == {name: higher}


def test_orientations_are_those_of_pyiqa():
    spec = importlib.util.find_spec("pyiqa")
    if spec is None or spec.origin is None:
        pytest.skip("pyiqa is not installed")
    # The table's own file: importing the package takes seconds.
    file = importlib.util.spec_from_file_location("configs", Path(spec.origin).with_name("default_model_configs.py"))
    configs = importlib.util.module_from_spec(file)
    file.loader.exec_module(configs)
    theirs = {name.lower(): not one.get("lower_better", False) for name, one in configs.DEFAULT_CONFIGS.items()}
    assert len(theirs) > 50
    assert {name: HIGHER_IS_BETTER.get(name) for name in theirs} == theirs


@pytest.fixture(scope="module")
def tracked(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tracker, str, str]:
    """A store with a pipeline's run and, nested in it, a trainer's with the curves of `curve`."""
    root = tmp_path_factory.mktemp("runs")
    tracker = Tracker(default_uri(str(root)), "nano", artifact_root=default_artifact_root(str(root)))
    with tracker.start_pipeline("quick") as parent, tracker.stage_run(parent.run_id, "pretrain") as child:
        columns = curve()
        for i in range(LENGTH):
            values = {f"validation/{name}": column[i] for name, column in columns.items()}
            child.log_metrics(EVERY * (i + 1), {**values, "train/loss": 1 / (i + 1), "psnr_y": 0.0})
    return root, tracker, parent.run_id, child.run_id


def test_a_run_of_mlflow_gives_what_its_csv_gives(tracked, csv):
    root, tracker, _, run_id = tracked
    expected = answer(csv)
    found = answer("--run", run_id, "--storage", root)
    assert found["metrics"] == {f"validation/{name}": one for name, one in sorted(expected["metrics"].items())}
    # The order of metrics may end in another last digit of the reason; the decision is the same.
    assert [found[key] for key in ("knee_step", "confirmed_at", "state")] == [
        expected[key] for key in ("knee_step", "confirmed_at", "state")
    ]
    one = answer("--run", run_id, "--tracking-uri", tracker.uri, "--metric", "psnr_y", "--metric", "train/loss:lower")
    assert [*one["metrics"]] == ["psnr_y", "train/loss"]
    assert [*answer("--run", run_id, "--storage", root, "--metric", "lpips")["metrics"]] == ["validation/lpips"]


def test_runs_without_curves_and_unknown_runs_are_told(tracked, tmp_path):
    root, _, parent_id, child_id = tracked
    for arguments, part in (
        (("--run", "0" * 32, "--storage", root), "0" * 32),
        (("--run", parent_id, "--storage", root), f"pretrain {child_id}"),
        (("--run", child_id, "--storage", tmp_path), "mlflow.db"),
        (("--run", child_id, "--storage", root, "--metric", "musiq"), "'musiq'"),
        ((tmp_path / "c.csv", "--run", child_id), "both"),
    ):
        code, out, err = run(*arguments)
        assert (code, out) == (2, ""), err
        assert part in err


def test_a_history_keeps_the_latest_of_a_step_and_the_first_divergence(tracked):
    _, tracker, parent_id, _ = tracked
    with tracker.stage_run(parent_id, "experts") as again:
        for at_s, step, value in ((1.0, 100, 1.0), (2.0, 200, 2.0), (3.0, 300, math.nan), (9.0, 200, 2.5), (4.0, 400, 4.0)):
            again.log_metrics(step, {"validation/psnr_y": value}, at_s=at_s)
    points = metric_histories(tracker.client, again.run_id, ["validation/psnr_y"])
    assert [step for step, _ in points] == [100, 200, 300, 400]
    values = [value for _, one in points for value in one.values()]
    assert values[:2] + values[3:] == [1.0, 2.5, 4.0]
    assert math.isnan(values[2])
