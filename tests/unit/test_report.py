"""The run report: one file that needs nothing else, tells the truth about its numbers, and survives whatever a run left out."""

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from linearsr_platform.report import svg
from linearsr_platform.report.html import render_report, write_report
from linearsr_platform.report.markup import Markup, difference, duration, element, number
from linearsr_platform.report.model import (
    EvaluationRow,
    GateRow,
    LineageRow,
    MetricColumn,
    PromotionRecord,
    ProtocolScores,
    QuarantinedImage,
    ReportData,
    StageRecord,
    SweepPoint,
    TrackingRecord,
    TrainerCurve,
    TripRow,
)
from linearsr_platform.report.strips import PhotoStrip, comparison_strip, contact_sheet, detail_box

NAN = float("nan")
VOID = {"img", "input", "meta"}


class Page(HTMLParser):
    """Collects the elements of a page and checks that every one is closed."""

    def __init__(self, html):
        super().__init__()
        self.elements, self.open = [], []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def attributes(self, name):
        return [attributes[name] for _, attributes in self.elements if name in attributes]


def curve(stage, name, knee, values, **changes):
    history = tuple({"step": 10.0 * (i + 1), "seconds": 4.0 * i, "psnr_y": value, "loss": 1.0 / (i + 1)} for i, value in enumerate(values))
    told = {"confirmed_at": None, "reason": "psnr_y stopped rising", "stopped_by": "knee"} | changes
    return TrainerCurve(stage=stage, name=name, history=history, knee_step=knee, **told)


def row(kind, label, psnr_y, gmsd):
    values = {"psnr_y": psnr_y, "gmsd": gmsd}
    return EvaluationRow(kind=kind, label=label, values=values, per_photograph={"coffee": values})


GATE = GateRow(
    rule="better gmsd (routed)",
    asks="gain above 0",
    challenger=0.11,
    champion="<b>",
    difference=-0.02,
    interval=(-0.03, -0.01),
    passed=False,
)


def report(**changes):
    rows = (row("bicubic", "bicubic", 24.77, 0.1313), row("one_step", "one-step", 24.94, 0.1288), row("routed", "routed", 24.31, 0.1132))
    told = {
        "stages": (StageRecord(name="prepare", status="skipped", seconds=0.0), StageRecord(name="pretrain", status="done", seconds=90.0)),
        "trainers": (
            curve("pretrain", "pretrain", 30, (20.0, 23.0, 24.0, 23.9), confirmed_at=40),
            *(curve("finetune", f"expert-{i + 1}", 20, (24.0, 24.5, 24.4)) for i in range(4)),
        ),
        "boundaries": (0.223, 0.875, 0.939),
        "sampling_times": (1.0, 0.9, 0.75, 0.5),
        "metrics": (MetricColumn(name="psnr_y", protocol="Y, 4 px border"), MetricColumn(name="gmsd", protocol="pyiqa 0.1.16")),
        "evaluation": rows,
        "sweep": tuple(SweepPoint(steps=2**i, values={"psnr_y": 24.9 - 0.3 * i, "gmsd": 0.13 - 0.01 * i}) for i in range(3)),
        "splits": {"train": 7},
        "quarantined": (QuarantinedImage(file="broken.jpg", reason="truncated"),),
        "tracking": TrackingRecord(uri="sqlite:///mlflow.db", experiment="quickstart", run_ids={"pipeline": "8b1f"}, model_version="3"),
        "promotion": PromotionRecord(promoted=True, state="promoted", version=3, champion_version=None, reason="first", rules=(GATE,)),
        "lineage": (LineageRow(what="recipe", identity="9f31c0b2"),),
    }
    told |= {"recipe_name": "quickstart", "recipe_hash": "9f31c0b2d6a84ee1", "code_version": "0.1.0", "perceptual": "gmsd"}
    told |= {"started": "2026-01-12T14:03:11+00:00", "finished": "2026-01-12T14:10:01+00:00"}
    return ReportData(**(told | changes))


def photograph(rng):
    original = Image.fromarray(rng.integers(0, 256, (160, 240, 3), dtype=np.uint8))
    small = original.resize((60, 40), Image.Resampling.BOX)
    return PhotoStrip(name="coffee", images={"LR": small, "bicubic": small.resize(original.size), "original": original})


def text_of(html):
    return re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", html.split("<body>")[1]))


def test_page_is_well_formed_and_refers_to_nothing_outside_itself():
    page = Page(render_report(report(), [photograph(np.random.default_rng(0))]))
    references = page.attributes("src") + page.attributes("href") + page.attributes("srcset")
    assert references
    assert all(reference.startswith(("data:", "#")) for reference in references)
    assert not [tag for tag, _ in page.elements if tag in {"script", "link", "iframe", "object"}]
    sections = ("photographs", "scores", "trade-off", "training", "experts", "stages", "data", "release")
    assert all(f"#{key}" in references for key in sections)


def test_style_sheet_loads_nothing():
    html = render_report(report(), [])
    style = re.search(r"<style>(.*?)</style>", html, re.DOTALL).group(1)
    assert "url(" not in style
    assert "@import" not in style
    assert {"prefers-color-scheme: dark", "@media print"} <= set(re.findall(r"prefers-color-scheme: dark|@media print", style))


def test_every_picture_and_chart_has_a_text_alternative():
    page = Page(render_report(report(), [photograph(np.random.default_rng(0))]))
    assert all(attributes["alt"] for tag, attributes in page.elements if tag == "img")
    assert all(attributes["aria-label"] for _, attributes in page.elements if attributes.get("role") == "img")
    labels = page.attributes("aria-label")
    assert any("24.00 at the knee, step 30" in label for label in labels)
    assert any("bicubic 0.1313" in label for label in labels)
    assert any("expert-1 owns t 0.939 to 1.000" in label for label in labels)


def test_of_many_photographs_the_first_are_shown_and_the_rest_counted():
    rows = tuple(replace(row, per_photograph={str(number): {} for number in range(30)}) for row in report().evaluation)
    many = render_report(report(evaluation=rows), [photograph(np.random.default_rng(0))])
    assert "The first 1 of 30 photographs; all are in" in many
    assert "photographs; all are in" not in render_report(report(), [photograph(np.random.default_rng(0))])


def test_text_from_outside_is_escaped():
    evil = "<script>alert(1)</script>"
    stages = (StageRecord(name=evil, status="failed", seconds=1.0, summary=evil),)
    html = render_report(report(recipe_name=evil, stages=stages, quarantined=(QuarantinedImage(file=evil, reason='"><img src=x>'),)), [])
    assert "<script" not in html
    assert "<img src=x" not in html


def test_best_value_is_bold_whichever_way_is_better():
    html = render_report(report(), [])
    bold = re.findall(r"<td><b>([^<]*)</b>", html)
    assert bold == ["24.94", "0.1132"] * 2
    assert re.search(r'<b>0.1132</b><small class="good">\u22120.0181</small>', html)
    assert re.search(r'24.31<small class="bad">\u22120.46</small>', html)


@pytest.mark.parametrize(("gmsd", "verdict"), [(0.1132, "on GMSD. It does."), (0.1400, "on GMSD. It does not.")])
def test_claim_made_beforehand_is_judged(gmsd, verdict):
    rows = (row("bicubic", "bicubic", 24.77, 0.1313), row("routed", "routed", 24.31, gmsd))
    assert verdict in text_of(render_report(report(evaluation=rows), []))


def test_bare_run_leaves_sections_out():
    bare = ReportData(
        recipe_name="quickstart",
        recipe_hash="9f31",
        code_version="0.1.0",
        started="2026-01-12T14:03:11+00:00",
        finished="2026-01-12T14:03:12+00:00",
        perceptual="gmsd",
        stages=(StageRecord(name="prepare", status="failed", seconds=1.0, summary="no image in photos/"),),
    )
    page = Page(render_report(bare, []))
    assert [reference for reference in page.attributes("href") if reference.startswith("#")] == ["#stages"]
    assert "Run failed at prepare no image in photos/" in text_of(render_report(bare, []))


def test_curves_that_never_rose_or_broke_are_drawn():
    trainers = (
        curve("pretrain", "pretrain", None, (24.0, 24.0, 24.0), stopped_by="max_steps"),
        curve("finetune", "expert-1", 10, (24.0,)),
        curve("finetune", "expert-2", 20, (24.0, NAN, 23.0)),
        curve("finetune", "expert-3", None, (NAN, NAN)),
        curve("finetune", "expert-4", None, ()),
    )
    html = render_report(report(trainers=trainers), [])
    Page(html)
    assert "no knee found" in html
    assert "nan" not in html.lower().split("<body>")[1].split("<footer>")[0]


def test_missing_scores_become_dashes():
    rows = (row("bicubic", "bicubic", 24.77, NAN), EvaluationRow(kind="routed", label="routed", values={}, per_photograph={}))
    html = render_report(report(evaluation=rows, sweep=(SweepPoint(steps=1, values={"psnr_y": NAN, "gmsd": 0.1}),)), [])
    assert "<td>\u2013<small>" in html
    assert "trade-off" not in Page(html).attributes("id")


@pytest.mark.parametrize(("steps", "named"), [((1, 2), False), ((2, 4), True)])
def test_the_one_step_estimate_has_one_name_among_the_step_counts(steps, named):
    sweep = tuple(SweepPoint(steps=count, values={"psnr_y": 24.9, "gmsd": 0.1 + 0.01 * count}) for count in steps)
    html = render_report(report(sweep=sweep), [])
    assert 'class="point-name bicubic"' in html
    assert ('class="point-name one_step"' in html) is named


def test_sampler_that_never_calls_an_expert_is_told():
    assert "0: never runs" in render_report(report(sampling_times=(1.0, 0.9, 0.5)), [])
    assert "0: never runs" not in render_report(report(sampling_times=(1.0, 0.9, 0.5, 0.1)), [])


def test_weights_that_were_kept_without_a_knee_are_not_called_one():
    trainers = (curve("finetune", "expert-1", 20, (24.0, 24.5), confirmed_at=30), curve("finetune", "expert-2", 0, (24.5, 24.4)))
    told = "Weights kept, step 20 \u00b7 0 finetune: 1 of 2 at a knee, else the best"
    assert told in text_of(render_report(report(trainers=trainers), []))


def test_numbers_travel_inside_the_page():
    html = render_report(report(sweep=(SweepPoint(steps=1, values={"psnr_y": NAN, "gmsd": 0.1}),)), [])
    carried = re.search(r'href="data:application/json;base64,([^"]*)"', html).group(1)
    numbers = json.loads(base64.b64decode(carried))
    assert numbers["evaluation"][1]["values"]["psnr_y"] == 24.94
    assert numbers["sweep"][0]["values"]["psnr_y"] is None


def test_pictures_carry_the_scores_of_their_row():
    html = render_report(report(), [photograph(np.random.default_rng(0))])
    assert "bicubic PSNR-Y 24.77 \u00b7 GMSD 0.1313" in text_of(html)


def test_report_is_written_whole(tmp_path: Path):
    html = render_report(report(), [])
    write_report(html, str(tmp_path / "run" / "report.html"))
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["report.html"]
    assert (tmp_path / "run" / "report.html").read_text(encoding="utf-8") == html


def test_detail_box_finds_the_texture():
    pixels = np.full((320, 480, 3), 90, dtype=np.uint8)
    pixels[160:240, 296:376] = np.random.default_rng(1).integers(0, 256, (80, 80, 3), dtype=np.uint8)
    left, upper, right, lower = detail_box(Image.fromarray(pixels))
    assert (right - left, lower - upper) == (112, 112)
    assert left <= 296
    assert right >= 376
    assert upper <= 160
    assert lower >= 240
    assert left % 8 == upper % 8 == 0


def test_detail_box_of_a_small_picture_is_all_of_it():
    assert detail_box(Image.new("RGB", (50, 30))) == (0, 0, 50, 30)


def test_strip_repeats_pixels_of_lr_and_keeps_order():
    original = Image.new("RGB", (224, 224), (0, 0, 255))
    small = Image.new("RGB", (56, 56), (0, 0, 0))
    small.putpixel((0, 0), (255, 255, 255))
    strip = comparison_strip({"LR": small, "original": original}, column_px=224)
    assert strip.width == 12 + 2 * (224 + 12)
    crop = strip.crop((12, strip.height - 12 - 224, 12 + 224, strip.height - 12))
    assert {crop.getpixel((x, y)) for x in range(8) for y in range(8)} == {(255, 255, 255)}
    assert crop.getpixel((8, 0)) == crop.getpixel((0, 8)) == (0, 0, 0)
    assert strip.getpixel((strip.width - 20, strip.height - 20)) == (0, 0, 255)


def test_sheet_stacks_photographs_and_nothing_is_refused():
    strip = photograph(np.random.default_rng(2))
    assert contact_sheet([strip, strip]).height == 2 * comparison_strip(strip.images, column_px=256).height
    with pytest.raises(ValueError, match="no photograph"):
        contact_sheet([])
    with pytest.raises(ValueError, match="no version"):
        comparison_strip({})


@given(low=st.floats(-1e4, 1e4), span=st.floats(1e-3, 1e5), at_most=st.integers(2, 9))
def test_ticks_are_inside_even_and_few(low, span, at_most):
    values = svg.ticks(low, low + span, at_most=at_most)
    assert 1 <= len(values) <= at_most
    assert all(low - 1e-6 * span <= value <= low + span * (1 + 1e-6) for value in values)
    assert np.allclose(np.diff(values, 2), 0, atol=1e-9 * max(1.0, abs(low) + span))
    assert len(set(svg.tick_labels(values))) == len(values)


def test_first_points_do_not_flatten_the_plateau():
    low, high = svg.without_outliers([5.0, 24.0, 24.3, 24.4, 24.5, 24.45, 24.4, 24.5])
    assert (low, high) == (24.0, 24.5)
    assert svg.without_outliers([22.0, 24.3, 24.4, 24.35, 24.4]) == (22.0, 24.4)


def test_markup_escapes_all_but_markup():
    written = element("td", "a < b", Markup("<b>c</b>"), title='"', hidden=True, colspan=None)
    assert written == '<td title="&quot;" hidden>a &lt; b<b>c</b></td>'


def test_numbers_read_well():
    assert [number(value) for value in (24.937, 0.10126, -3.2, None, NAN)] == ["24.94", "0.1013", "\u22123.2000", "\u2013", "\u2013"]
    assert difference(24.94, 24.77) == "+0.17"
    assert [duration(seconds) for seconds in (4.24, 59.6, 65, 7380)] == ["4.2 s", "1 min 00 s", "1 min 05 s", "2 h 03 min"]


def test_rollbacks_are_listed_only_if_there_were_any():
    told = {"seen": "loss nan, expected a finite number", "evidence": "gradient of <head> on worker 1: nan", "action": "back to step 100"}
    trips = (
        TripRow(stage="pretrain", trainer="pretrain", step=117, **told),
        TripRow(stage="finetune", trainer="expert-2", step=30, **told),
    )
    html = render_report(report(trips=trips), [])
    Page(html)
    assert "Rollbacks" in html
    assert "gradient of &lt;head&gt; on worker 1: nan" in html
    assert "finetune expert-2" in html
    assert "Rollbacks" not in render_report(report(), [])


def test_each_protocol_has_its_table_with_intervals_count_and_hashes():
    scores = ProtocolScores(
        name="osediff",
        about="osediff: 8 bit; border 0 px cut",
        images=12,
        weights={"psnr_y": "none", "lpips": "0123456789abcdef"},
        values={"routed": {"psnr_y": 24.31, "lpips": 0.25, "fid": NAN}, "bicubic": {"psnr_y": 24.77}},
        intervals={"routed": {"psnr_y": (23.9, 24.8), "lpips": (0.2, 0.3)}},
    )
    html = render_report(report(protocols=(scores,), test_set="fedcba9876543210"), [])
    Page(html)
    told = text_of(html)
    assert "Under osediff, with 95 % intervals" in told
    assert "24.31 23.90 \u2026 24.80" in told
    assert "osediff: 8 bit; border 0 px cut. 12 images; test set fedcba987654; weights LPIPS 0123456789ab." in told
    assert "Under" not in text_of(render_report(report(), []))
    read = "tags told: of an LR image for 2 of 3 (aef2749e4dcd), of the original for 1 of 3"
    told = text_of(render_report(report(protocols=(scores,), test_set="fedcba9876543210", tags_read=read), []))
    assert f"12 images; test set fedcba987654; {read}; weights LPIPS 0123456789ab." in told
