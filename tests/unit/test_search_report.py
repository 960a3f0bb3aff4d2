"""The end of a boundary search: an order that compares like with like, a verdict no stronger than its numbers, a page, pictures."""

import json
import re
from dataclasses import replace
from datetime import UTC, datetime
from html.parser import HTMLParser
from types import SimpleNamespace

import numpy as np
import pytest
import yaml
from PIL import Image

from linearsr.experts import bisect_boundaries, noise_level
from linearsr.noise_profile import NoiseProfile
from linearsr.partition import Proposal
from linearsr_platform import storage
from linearsr_platform.recipe.schema import ExpertsSection
from linearsr_platform.report.search_model import Comparison, SearchReport, TrialRow, conclusions, ranked, score_text
from linearsr_platform.report.search_page import render_search
from linearsr_platform.report.search_plots import plot_axis, plot_profile
from linearsr_platform.stages import search

VERMILION = (213, 94, 0)  # The best trial, the least-conflict cuts.
MIDDLE = (0.2, 0.5, 0.8)
EVIL = "<script>alert(1)</script>"


def trial(name, score=24.9, **changes):
    told = {"boundaries": MIDDLE, "origin": "search", "state": "done", "rung": 800, "rungs": 800, "score": score, "score_error": 0.01}
    return TrialRow(name=name, **(told | {"trained": 3, "cached": 1, "seconds": 60.0} | changes))


def comparison(label, difference=None, verdict="reference", boundaries=MIDDLE):
    interval = None if difference is None else (difference - 0.02, difference + 0.01)
    told = {"seeds": 3, "score": 24.9 + (difference or 0.0), "score_error": 0.01, "interval": interval, "verdict": verdict}
    return Comparison(label=label, boundaries=boundaries, difference=difference, **told)


def profile(levels=12, **changes):
    edges = np.linspace(-7, 9, levels + 1)
    apart = np.subtract.outer(np.arange(levels) // 4, np.arange(levels) // 4) != 0
    affinity = np.where(apart, -0.3, 0.8)
    np.fill_diagonal(affinity, 1.0)
    told = {
        "edges": tuple(edges.tolist()),
        "mass": (1 / levels,) * levels,
        "loss": tuple(np.linspace(0.1, 0.5, levels).tolist()),
        "gradient_norm": tuple(np.geomspace(1, 0.01, levels).tolist()),
        "loss_error": (0.01,) * levels,
        "gradient_norm_error": (0.002,) * levels,
        "affinity": tuple(tuple(row) for row in affinity.tolist()),
        "affinity_error": ((0.05,) * levels,) * levels,
        "samples": 32,
    }
    return NoiseProfile(**(told | changes))


def report(**changes):
    trials = (trial("trial-000", 24.91), trial("trial-001", 24.80), trial("trial-002", None, state="failed", rung=0, reason="worker lost"))
    told = {"name": "quickstart", "metric": "psnr_y", "higher_is_better": True, "trials": trials, "best": trials[0], "comparisons": ()}
    told |= {
        "proposals": (Proposal(name="least-conflict", boundaries=MIDDLE, note="leaves 40%"),),
        "profile": None,
        "trained": 9,
        "cached": 3,
    }
    return SearchReport(**(told | {"seconds": 900.0, "started": "2026-01-12T14:03:11+00:00"} | changes))


def test_scores_of_different_rungs_are_never_compared():
    early = trial("early", 30.0, rung=400, state="stopped")
    trials = [early, trial("low", 24.0), trial("nan", float("nan")), trial("broken", 31.0, state="failed"), trial("high", 25.0)]
    assert [row.name for row in ranked(trials, True)] == ["high", "low", "early", "nan", "broken"]
    assert [row.name for row in ranked(trials, False)] == ["low", "high", "early", "nan", "broken"]


@pytest.mark.parametrize(("start", "said"), [(24.85, "1 of 2 trials are better."), (25.0, "0 of 2 trials are better, so .* not pay yet")])
def test_trials_that_are_worse_than_what_they_started_from_are_told_to_be(start, said):
    comparisons = (comparison("best found"), comparison("paper", -0.1, "worse"))
    assert re.search(f"scores {start:.2f} PSNR-Y by itself: {said}", conclusions(report(comparisons=comparisons, start=start))[-1])


def test_json_is_strict_and_keeps_the_profile():
    value = report(profile=profile(), best=trial("t", float("nan"))).to_json()
    read = json.loads(json.dumps(value, allow_nan=False))
    assert NoiseProfile.from_json(read["profile"]) == profile()
    assert read["best"]["score"] is None
    assert read["trials"][0]["boundaries"] == list(MIDDLE)


def test_differences_are_told_from_the_side_of_the_best_found_and_against_the_paper_first():
    rows = (comparison("best found"), comparison("trial-007", 0.01, "no difference"), comparison("paper", -0.05, "worse"))
    paper, other = report(comparisons=rows).contrasts()
    assert (paper.label, paper.verdict, other.verdict) == ("paper", "better", "no difference")
    assert (paper.difference, paper.interval) == (pytest.approx(0.05), pytest.approx((0.04, 0.07)))


def test_the_best_found_wins_unless_others_are_better_beyond_noise():
    rows = (comparison("best found"), comparison("trial-007", 0.01, "no difference"), comparison("paper", -0.05, "worse"))
    assert report(comparisons=rows).winner.label == "best found"
    assert report(comparisons=(*rows, comparison("uniform in t", 0.05, "better"))).winner.label == "uniform in t"
    assert report().winner is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"comparisons": (comparison("best found"), comparison("paper", -0.05, "worse"))},
            r"^The best .* are better than the paper's .*: PSNR-Y \+0.050",
        ),
        (
            {"comparisons": (comparison("best found"), comparison("paper", 0.05, "better"))},
            r"^The best .* are worse than the paper's .*: PSNR-Y -0.050",
        ),
        (
            {"comparisons": (comparison("best found"), comparison("paper", 0.0, "no difference"))},
            r"^No difference beyond noise .* the paper's",
        ),
        ({}, r"not compared .* trial-000 .* may be luck"),
        ({"best": None}, r"^No boundaries were found: none of 3 trials has a score, 1 failed"),
    ],
)
def test_the_verdict_says_no_more_than_was_measured(changes, said):
    assert re.search(said, conclusions(report(**changes))[0])


def test_a_score_shows_two_digits_of_its_error():
    assert [score_text(24.9134, error) for error in (0.00123, 0.0123, 50.0, None)] == [
        "24.9134 \u00b1 0.0012",
        "24.913 \u00b1 0.012",
        "24.91 \u00b1 50.00",
        "24.9134",
    ]


class Page(HTMLParser):
    """Collects what a page refers to, and checks that every element is closed."""

    def __init__(self, html):
        super().__init__()
        self.open, self.references, self.images = [], [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.references += [value for name, value in attrs if name in ("href", "src")]
        self.images += [dict(attrs)["alt"] for _ in range(tag == "img")]
        if tag not in ("meta", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_needs_nothing_but_itself_and_trusts_no_text():
    trials = (trial(EVIL, 24.9, origin=EVIL), trial("b", None, state="failed", reason=EVIL))
    pictures = {"axis": b"\x89PNG", "profile": b"\x89PNG"}
    told = {
        "name": EVIL,
        "trials": trials,
        "best": trials[0],
        "comparisons": (comparison("best found"), comparison(EVIL, 0.1, "better")),
    }
    html = render_search(report(**told, profile=profile(), proposals=(Proposal(name=EVIL, boundaries=MIDDLE, note=EVIL),)), pictures)
    page = Page(html)
    assert all(reference.startswith(("data:", "#")) for reference in page.references)
    assert len(page.images) == 2
    assert all(page.images)
    assert "Content-Security-Policy" in html
    assert "<script" not in html
    assert {"#comparison", "#recipe", "#axis", "#ranking", "#proposals", "#profile", "#cost"} <= set(page.references)
    assert "3 (25%)" in html


def test_a_page_without_scores_or_pictures_is_still_a_page():
    html = render_search(report(trials=(), best=None, proposals=(), trained=0, cached=0), {})
    assert not Page(html).images
    assert "No boundaries were found" in html


@pytest.mark.parametrize("boundaries", [bisect_boundaries(), ()])
def test_the_fragment_to_copy_is_a_valid_part_of_a_recipe(boundaries):
    html = render_search(report(comparisons=(comparison("best found", boundaries=boundaries), comparison("paper", -0.05, "worse"))), {})
    fragment = yaml.safe_load(re.search(r"<pre><code>(.*?)</code></pre>", html, re.DOTALL).group(1))
    section = ExpertsSection.model_validate_json(
        json.dumps(fragment["experts"] | {"train": {"max_steps": 1, "batch_size": 1}}), strict=False
    )
    assert section.boundaries == pytest.approx(boundaries, abs=1e-6)
    assert "boundaries: bisection" not in html


def test_where_nothing_was_gained_the_page_offers_the_paper_s_boundaries():
    html = render_search(report(comparisons=(comparison("best found"), comparison("paper", 0.0, "no difference"))), {})
    assert "score as well within noise" in html
    assert "boundaries: bisection" in html


def test_a_remote_search_is_kept_in_mlflow_without_fetching_its_experts(monkeypatch):
    monkeypatch.setattr(search, "gather", lambda context, **times: report(comparisons=(comparison("best found"),)))
    monkeypatch.setattr(search, "profile_of", lambda context: profile())
    folder, kept = "memory://search-report/mine", {}
    storage.write_bytes(f"{folder}/{search.trials.EXPERTS_FOLDER}/expert-1/weights.safetensors", b"large")

    def keep(file):
        kept[file.name] = [path.name for path in file.parent.rglob("*")]

    context = SimpleNamespace(run_url=folder, pipeline_run=SimpleNamespace(log_artifact=keep))
    search.write(context, started=datetime.now(UTC), seconds=1.0)
    assert kept == {name: [name] for name in ("axis.png", "profile.png", "search.json", "search.html", "boundaries.yaml")}


def pixels(path):
    with Image.open(path) as image:
        assert image.width == 1200
        return np.asarray(image.convert("RGB")).astype(int)


def near(array, colour):
    return np.abs(array - colour).max(axis=2) <= 6


def test_marks_are_where_the_boundaries_are_and_the_best_is_framed(tmp_path):
    # The frame of the best spans the axis from log-SNR -9.5 to 10.5.
    trials = (trial("a", 1.0, boundaries=(0.5,)), trial("b", 2.0, boundaries=(noise_level(4.0),)))
    plot_axis(report(trials=trials, best=trials[1]), str(tmp_path / "axis.png"))
    array = pixels(tmp_path / "axis.png")
    framed = np.flatnonzero(near(array, VERMILION).sum(axis=1) > 600)
    top, bottom = framed.min(), framed.max()
    left, right = np.flatnonzero(near(array, VERMILION)[(top + bottom) // 2])[[0, -1]]

    def mark(row):
        dark = np.flatnonzero(near(array[row : row + 1, left + 5 : right - 5], (34, 34, 34))[0])
        return -9.5 + 20 * (dark.mean() + 5) / (right - left)

    assert mark((top + bottom) // 2) == pytest.approx(4.0, abs=0.1)
    assert mark(bottom + (bottom - top) // 2) == pytest.approx(0.0, abs=0.1)
    plot_axis(report(trials=trials, best=None), str(tmp_path / "none.png"))
    assert not near(pixels(tmp_path / "none.png"), VERMILION).any()


@pytest.mark.parametrize(("count", "scores"), [(0, None), (1, None), (1, 24.9), (60, 24.9), (60, "spread")])
def test_any_number_of_trials_can_be_drawn(tmp_path, count, scores):
    states = ("done", "stopped", "running", "queued", "failed")
    rng = np.random.default_rng(0)
    rows = tuple(
        trial(
            f"trial-{i:03d}",
            float(1e6 * rng.standard_normal()) if scores == "spread" else scores,
            state=states[i % 5],
            boundaries=MIDDLE[: i % 4],
        )
        for i in range(count)
    )
    plot_axis(report(trials=rows, best=rows[0] if rows else None), str(tmp_path / "axis.png"))
    assert pixels(tmp_path / "axis.png").shape[0] > 15 * count


def test_the_profile_shows_the_least_conflict_cuts_if_there_are_any(tmp_path):
    cuts = Proposal(name="least-conflict", boundaries=(0.3, 0.8))
    drawn = {}
    for name, proposals in (("with", (cuts,)), ("without", (replace(cuts, name="uniform-time"),))):
        plot_profile(profile(), proposals, str(tmp_path / name))
        drawn[name] = int(near(pixels(tmp_path / name), VERMILION).sum())
    assert drawn["without"] == 0
    assert drawn["with"] > 1000


@pytest.mark.parametrize(
    "odd",
    [
        profile(1),
        profile(gradient_norm=(0.0,) * 12),
        profile(loss=(0.3,) * 12, loss_error=(0.0,) * 12),
        profile(loss_error=(1e6,) * 12, gradient_norm_error=(1e6,) * 12, affinity_error=((9.0,) * 12,) * 12),
        profile(mass=(1.0, *(0.0,) * 11)),
    ],
    ids=["one level", "no gradient", "flat loss", "huge errors", "all mass in one level"],
)
def test_an_odd_profile_can_be_drawn(tmp_path, odd):
    plot_profile(odd, (Proposal(name="least-conflict", boundaries=()),), str(tmp_path / "profile.png"))
    assert pixels(tmp_path / "profile.png").shape == (760, 1200, 3)
