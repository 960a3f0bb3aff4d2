"""`linearsr boundaries` as a user meets it: proposals without a network, more with a profile, one clear sentence for each mistake."""

import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from linearsr.experts import bisect_boundaries, log_snr
from linearsr_platform.cli.app import app

CUTS = (-4.0, 1.0, 6.0)  # Log-SNR between which the planted gradients agree, and across which they do not.
LEVELS = 32


@pytest.fixture
def profile(tmp_path):
    edges = np.linspace(-7, 9, LEVELS + 1)
    regime = np.searchsorted(CUTS, (edges[1:] + edges[:-1]) / 2)
    affinity = np.where(np.subtract.outer(regime, regime) == 0, 1.0, -0.5)
    zeros = [0.0] * LEVELS
    value = {"edges": edges.tolist(), "mass": [1 / LEVELS] * LEVELS, "loss": [1.0] * LEVELS, "loss_error": zeros, "samples": 16}
    value |= {"gradient_norm": [1.0] * LEVELS, "gradient_norm_error": [0.01] * LEVELS, "source": {"weights": "knee"}}
    value |= {"affinity": affinity.tolist(), "affinity_error": [zeros] * LEVELS}
    path = tmp_path / "profile.json"
    path.write_text(json.dumps(value))
    return path


def run(*arguments):
    result = CliRunner().invoke(app, ["boundaries", *map(str, arguments)])
    return result.exit_code, result.stdout, result.stderr


def answer(*arguments):
    code, out, err = run(*arguments, "--json")
    assert (code, err) == (0, "")
    return json.loads(out)


def test_without_a_profile_there_are_the_proposals_that_need_none():
    found = answer()
    assert [one["name"] for one in found["proposals"]] == ["bisection", "uniform-time", "uniform-log-snr"]
    assert found["proposals"][0]["boundaries"] == pytest.approx(bisect_boundaries())
    assert found["least_conflict"] is None
    for one in found["proposals"]:
        assert one["draws"] is None
        assert one["log_snr"] == pytest.approx([log_snr(t) for t in one["boundaries"]])
        assert one["intervals"][0][1] == 1
        assert one["intervals"][-1][0] == 0


def test_a_profile_adds_proposals_the_draws_of_each_expert_and_what_conflict_is_left(profile):
    found = answer(profile)
    last = found["proposals"][-1]
    assert last["name"] == "least-conflict"
    assert sorted(last["log_snr"]) == pytest.approx(CUTS)
    # Draws are uniform, so an expert's share is its width, of 16 in log-SNR together.
    assert last["draws"] == pytest.approx([3 / 16, 5 / 16, 5 / 16, 3 / 16])
    assert last["conflict"] == min(one["conflict"] for one in found["proposals"]) < 0.1
    least = list(found["least_conflict"].values())
    assert list(found["least_conflict"]) == ["1", "2", "3", "4", "5", "6"]
    assert least[0] == 1
    assert least == sorted(least, reverse=True)


def test_people_see_every_expert_and_how_many_are_worth_it(profile):
    code, out, _ = run(profile, "--experts", 4)
    assert code == 0
    assert sum(line.split()[:1] == ["expert"] for line in out.splitlines()) == 4 * len(answer(profile)["proposals"])
    assert "log-SNR below -4.00" in out
    assert "18.8% of training draws" in out
    assert any(line.startswith("how many experts") and line.split()[-1] == "6" for line in out.splitlines())
    assert max(map(len, out.splitlines())) <= 100


def test_one_expert_has_no_boundaries(profile):
    (only,) = answer(profile, "--experts", 1)["proposals"]
    assert (only["boundaries"], only["intervals"], only["draws"], only["conflict"]) == ([], [[0.0, 1.0]], [1.0], 1.0)


def test_the_least_width_is_kept(profile):
    for one in answer(profile, "--experts", 3, "--min-width", 5)["proposals"]:
        if one["name"] == "least-conflict":
            assert min(abs(np.diff([-7, *sorted(one["log_snr"]), 9]))) >= 5


def test_the_plot_is_a_picture(profile, tmp_path):
    code, _, err = run(profile, "--plot", tmp_path / "drawn.png")
    assert (code, err) == (0, "")
    with Image.open(tmp_path / "drawn.png") as image:
        assert image.format == "PNG"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["missing.json"], "there is no such file"),
        (["."], "expected a profile.json that can be read"),
        (["bogus://profile.json"], "fsspec"),
        (["--experts", "0"], "expected at least 1"),
        (["--experts", "99"], "fewer experts or a smaller min_width"),
        (["--min-width", "nan"], "--min-width: got nan"),
        (["--step", "0"], "--step: got 0.0"),
        (["--plot", "drawn.png"], "--plot: got no profile"),
        (["--plot", "drawn.jpg"], "ends in .png"),
    ],
)
def test_mistakes_end_with_a_sentence_and_exit_code_2(arguments, said):
    code, out, err = run(*arguments)
    assert (code, out) == (2, "")
    assert said in err
    assert "fix:" in err


@pytest.mark.parametrize("content", [b"step,loss\n1,2\n", b"\xff\xfe", b"[]", b'{"edges": []}', b"[" * 100000])
def test_a_file_that_is_no_profile_is_named(tmp_path, content):
    path = tmp_path / "other.json"
    path.write_bytes(content)
    code, _, err = run(path)
    assert code == 2
    assert str(path) in err


def test_proposals_need_no_torch():
    code = (
        "import sys, linearsr_platform.cli.app as a; a.app(['boundaries', '--json'], standalone_mode=False); print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, "False"), done.stderr
