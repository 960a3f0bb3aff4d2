"""The progress display: what a terminal shows, what a log file gets, and that the cursor always comes back."""

import io
import threading

import pytest
from rich.console import Console

from linearsr_platform.cli.progress import LiveDisplay, PlainDisplay, clock_time, display_beside_result, make_display
from linearsr_platform.cli.search_table import print_search
from linearsr_platform.report.search_model import Comparison, SearchReport, TrialRow, ranked

SHOW_CURSOR, HIDE_CURSOR = "\x1b[?25h", "\x1b[?25l"


class Clock:
    """A clock that moves when told to."""

    def __init__(self):
        self.now_s = 100.0

    def __call__(self):
        return self.now_s


@pytest.fixture
def clock():
    return Clock()


def terminal(width=120):
    return Console(file=io.StringIO(), force_terminal=True, width=width, height=40, color_system=None)


def screen(display, width=120):
    console = Console(file=io.StringIO(), width=width, color_system=None)
    console.print(display.render())
    return console.file.getvalue()


def row_of(display, name, width=120):
    return next(line.split() for line in screen(display, width).splitlines() if name in line)


def test_plain_text_tells_stages_and_validations_and_little_else(clock):
    console = Console(file=io.StringIO(), width=40)
    with PlainDisplay(console, clock) as display:
        display.stage_skipped("prepare", "13 shards")
        display.stage_started("experts")
        for step in range(10, 101, 10):
            clock.now_s += 1
            display.trainer_event("expert-1", "metrics", step, {"loss": 0.5, "samples_per_s": 8.0}, total_steps=200, max_seconds=60.0)
        display.trainer_event("expert-1", "validation", 100, {"loss": 0.4, "psnr_y": 24.913, "gmsd": 0.12884})
        display.trainer_event("expert-1", "checkpoint", 100, {})
        display.stage_finished("experts", 65.0, "knee at [80]")
    assert console.file.getvalue().splitlines() == [
        "[0:00] prepare: skipped: 13 shards",
        "[0:00] experts: started",
        "[0:10] experts expert-1: step 100/200, loss 0.5000, PSNR-Y 24.91, GMSD 0.1288, 8.0 samples/s, at most 10 s left",
        "[0:10] experts: done in 1 min 05 s: knee at [80]",
    ]


def test_plain_text_is_rate_limited_between_validations(clock):
    console = Console(file=io.StringIO(), width=200)
    display = PlainDisplay(console, clock)
    display.stage_started("prepare")
    display.task("images", 100, "images")
    for done in range(1, 101):
        clock.now_s += 0.5
        display.update("images", done)
        display.trainer_event("pretrain", "metrics", done, {"loss": 0.5})
    lines = console.file.getvalue().splitlines()
    assert [line.split(": ")[1] for line in lines if "images:" in line] == [
        "30/100 images",
        "60/100 images",
        "90/100 images",
        "100/100 images",
    ]
    assert sum("pretrain:" in line for line in lines) == 3


def test_plain_text_tells_a_state_once(clock):
    console = Console(file=io.StringIO(), width=200)
    display = PlainDisplay(console, clock)
    display.stage_started("experts")
    for _ in range(3):
        display.trainer_event("expert-4", "state", 0, {}, state="queued")
    display.trainer_event("expert-4", "metrics", 10, {"loss": 0.5})
    display.trainer_event("expert-4", "state", 120, {}, state="knee@80")
    told = [line.split("expert-4: ")[1] for line in console.file.getvalue().splitlines()[1:]]
    assert told == ["step 0, queued", "step 120, loss 0.5000, knee@80"]


def test_terminal_shows_all_experts_at_once(clock):
    display = LiveDisplay(terminal(), clock)
    display.stage_started("experts")
    for index in (3, 1, 0, 2):
        display.trainer_event(f"expert-{index + 1}", "metrics", 10, {"loss": 0.25 + index, "samples_per_s": 7.5}, total_steps=400)
    display.trainer_event("expert-2", "validation", 20, {"loss": 9.9, "psnr_y": 24.91, "gmsd": 0.1288})
    display.trainer_event("expert-1", "state", 10, {}, state="knee@10")
    clock.now_s += 75
    shown = screen(display)
    assert "experts 1:15" in shown
    rows = [line.split()[0] for line in shown.splitlines() if "expert-" in line]
    assert rows == ["expert-1", "expert-2", "expert-3", "expert-4"]
    assert row_of(display, "expert-1")[-1] == "knee@10"
    assert {"20/400", "1.2500", "24.91", "0.1288", "training"} <= set(row_of(display, "expert-2"))


@pytest.mark.parametrize("width", [80, 100, 120, 200])
def test_terminal_rows_fit_the_width(clock, width):
    display = LiveDisplay(terminal(width), clock)
    display.stage_started("experts")
    for index in range(4):
        name = f"expert-{index + 1}"
        display.trainer_event(name, "metrics", 1200, {"loss": 0.25, "samples_per_s": 7.5}, total_steps=9999, max_seconds=3000.0)
        display.trainer_event(name, "validation", 1300, {"psnr_y": 24.91, "ssim_y": 0.699, "gmsd": 0.1288}, state="knee@1100")
    lines = screen(display, width).splitlines()
    assert max(map(len, lines)) <= width
    assert all("knee@1100" in line for line in lines if "expert-" in line)


def test_time_left_is_the_shorter_of_steps_and_budget(clock):
    display = LiveDisplay(terminal(), clock)
    display.stage_started("pretrain")
    display.trainer_event("t", "state", 0, {}, total_steps=400, max_seconds=120.0, state="queued")
    clock.now_s += 500
    display.trainer_event("t", "metrics", 100, {"loss": 1.0, "seconds": 30.0})
    assert display._trainers["t"].left_s(clock()) == 90
    clock.now_s += 10
    display.trainer_event("t", "metrics", 200, {"loss": 1.0, "seconds": 40.0})
    assert display._trainers["t"].left_s(clock()) == 20
    clock.now_s += 5
    assert display._trainers["t"].left_s(clock()) == 15
    clock.now_s += 100
    assert display._trainers["t"].left_s(clock()) == 0
    display.trainer_event("t", "state", 200, {}, state="done")
    assert display._trainers["t"].left_s(clock()) is None


def test_a_trainer_that_begins_again_measures_its_pace_anew(clock):
    display = PlainDisplay(Console(file=io.StringIO()), clock)
    display.trainer_event("t", "start", 0, {}, 400)
    clock.now_s += 10
    display.trainer_event("t", "metrics", 200, {"loss": 1.0})
    clock.now_s += 500
    display.trainer_event("t", "start", 100, {})
    clock.now_s += 30
    display.trainer_event("t", "metrics", 200, {"loss": 1.0})
    assert display._trainers["t"].left_s(clock()) == 60


def test_time_left_is_unknown_without_a_pace_or_a_budget(clock):
    display = PlainDisplay(Console(file=io.StringIO()), clock)
    display.trainer_event("t", "metrics", 10, {"loss": 1.0}, total_steps=400)
    assert display._trainers["t"].left_s(clock()) is None


def test_ended_stages_stay_and_the_cursor_comes_back_after_an_exception(clock):
    console = terminal()
    display = LiveDisplay(console, clock)

    def run():
        with display:
            display.stage_skipped("prepare", "13 shards")
            display.stage_started("pretrain")
            display.stage_finished("pretrain", 92.0, "knee at step 180")
            display.stage_started("experts")
            raise RuntimeError("worker lost")

    with pytest.raises(RuntimeError, match="worker lost"):
        run()
    written = console.file.getvalue()
    assert written.rindex(SHOW_CURSOR) > written.rindex(HIDE_CURSOR)
    for mark, stage, told in (
        ("\u21b7", "prepare", "13 shards"),
        ("\u2714", "pretrain", "knee at step 180"),
        ("\u2718", "experts", "RuntimeError"),
    ):
        assert any(mark in line and stage in line and told in line for line in written.splitlines())


def test_failed_stage_is_told_once(clock):
    console = Console(file=io.StringIO(), width=200)

    def run():
        with PlainDisplay(console, clock) as display:
            display.stage_started("experts")
            clock.now_s += 12
            display.stage_failed("experts", "expert-3: worker lost three times")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        run()
    assert console.file.getvalue().count("failed") == 1
    assert "experts: failed after 12 s: expert-3: worker lost three times" in console.file.getvalue()


def test_events_from_threads_while_it_redraws():
    console = terminal()
    display = LiveDisplay(console)

    def report(index):
        for step in range(200):
            display.trainer_event(f"expert-{index}-{step % 20}", "validation", step, {f"m{step % 5}": 1.0}, total_steps=200)
            display.update(f"task-{index}-{step % 20}", step, 200)
            if step % 50 == 0:
                display.message(f"[note] {index}")

    with display:
        display.stage_started("experts")
        threads = [threading.Thread(target=report, args=(index,)) for index in range(4)]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            display.render()
            display._live.refresh()
        for thread in threads:
            thread.join(timeout=10)
        assert len(display._trainers) == 80
    assert console.file.getvalue().count("[note]") == 16


@pytest.mark.parametrize(
    ("is_terminal", "ci", "term", "kind"),
    [
        (True, "", "xterm", LiveDisplay),
        (True, "false", "xterm", LiveDisplay),
        (True, "true", "xterm", PlainDisplay),
        (True, "", "dumb", PlainDisplay),
        (False, "", "xterm", PlainDisplay),
    ],
)
def test_display_fits_where_the_output_goes(monkeypatch, is_terminal, ci, term, kind):
    monkeypatch.setenv("CI", ci)
    monkeypatch.setenv("TERM", term)
    assert type(make_display(Console(file=io.StringIO(), force_terminal=is_terminal))) is kind


def test_display_can_be_forced(monkeypatch):
    monkeypatch.setenv("CI", "true")
    assert type(make_display(terminal(), is_terminal=True)) is LiveDisplay
    assert type(make_display(terminal(), is_terminal=False)) is PlainDisplay


@pytest.mark.parametrize("as_json", [True, False])
def test_standard_output_belongs_to_json_whoever_writes_there(capsys, as_json):
    with display_beside_result(as_json=as_json) as display:
        display.message("shown")
        print("a library's line")
    print("the result")
    lines = "[0:00] shown\na library's line\n"
    assert capsys.readouterr() == (("the result\n", lines) if as_json else (f"{lines}the result\n", ""))


def test_clock_reads_minutes_and_hours():
    assert [clock_time(seconds) for seconds in (-3.0, 5.4, 75, 3725)] == ["0:00", "0:05", "1:15", "1:02:05"]


def test_a_rollback_is_told_and_stays_visible(clock):
    console = Console(file=io.StringIO(), width=40)
    with PlainDisplay(console, clock) as plain, LiveDisplay(terminal(), clock) as live:
        for display in (plain, live):
            display.stage_started("pretrain")
            display.trainer_event("pretrain", "start", 0, {}, total_steps=200)
            clock.now_s += 10
            display.trainer_event("pretrain", "validation", 100, {"psnr_y": 24.0, "seconds": 10.0}, state="knee@50")
            display.trainer_event("pretrain", "trip", 40, {})
        assert row_of(live, "40/200")[-3:] == ["training,", "1", "rollback"]
        live.trainer_event("pretrain", "trip", 40, {})
        assert row_of(live, "40/200")[-1] == "rollbacks"
    assert "pretrain: step 40/200, training, 1 rollback" in console.file.getvalue()


def trial(index, state, score=None, **changes):
    told = {"boundaries": (0.223, 0.875, 0.939), "origin": "search", "rung": 0 if score is None else 400, "rungs": 1600}
    told |= {"score_error": None if score is None else 0.012, "trained": 3, "cached": 1, "seconds": 60.0}
    return TrialRow(name=f"trial-{index:03d}", state=state, score=score, **(told | changes))


def forty_trials():
    states = ("done", "stopped", "stopped", "running", "queued", "failed", "done", "running")
    scored = ("done", "stopped")
    return ranked([trial(i, states[i % 8], 24.0 + i / 100 if states[i % 8] in scored else None) for i in range(40)], True)


def test_plain_text_tells_each_event_of_a_trial_once(clock):
    console = Console(file=io.StringIO(), width=40)
    display = PlainDisplay(console, clock)
    display.stage_started("search")
    history = [
        [trial(0, "running"), trial(1, "queued")],
        [trial(0, "running", 24.1), trial(1, "running", doing="expert 2 of 4")],
        [trial(0, "stopped", 24.1), trial(1, "running", doing="expert 3 of 4")],
        [trial(0, "stopped", 24.1), trial(1, "failed", reason="worker lost")],
    ]
    for rows in history:
        for _ in range(3):
            display.trials(rows, total=8, left_s=90.0, best=rows[0])
    lines = console.file.getvalue().splitlines()[1:]
    assert [line.split(": ")[1].split(",")[0].split(";")[0] for line in lines] == [
        "score 24.100 +- 0.012",
        "stopped",
        "failed after 0/1600 steps",
    ]
    assert lines[0] == (
        "[0:00] search trial-000: score 24.100 +- 0.012, step 400/1600, experts trained 3, cached 1, "
        "search at t .223 .875 .939, best so far; 0 of 8 trials, about 1:30 left"
    )
    assert lines[2].endswith("worker lost; 2 of 8 trials, about 1:30 left")


def test_plain_text_tells_now_and_then_what_a_trial_is_at(clock):
    """A trial of a large network takes hours to its first score."""
    console = Console(file=io.StringIO(), width=40)
    display = PlainDisplay(console, clock)
    display.stage_started("search")
    for percent in (0, 10, 20, 20, 20, 20, 20, 20):
        for name in (0, 1):
            display.trials([trial(name, "running", doing=f"expert 2 of 4, {percent}%")], total=8, left_s=None, best=None)
        clock.now_s += 40
    display.trials([trial(0, "failed", reason="lost")], total=8, left_s=None, best=None)
    clock.now_s += 400
    display.trials([trial(0, "failed", reason="lost")], total=8, left_s=None, best=None)
    lines = console.file.getvalue().splitlines()[1:]
    assert len(lines) == 3
    assert lines[0] == "[1:20] search trial-000: expert 2 of 4, 20%, search at t .223 .875 .939; 0 of 8 trials"
    assert [line.split(":")[2] for line in lines[:2]] == [" expert 2 of 4, 20%, search at t .223 .875 .939; 0 of 8 trials"] * 2


def test_plain_text_does_not_repeat_what_an_earlier_attempt_told(clock):
    console = Console(file=io.StringIO(), width=40)
    display = PlainDisplay(console, clock)
    display.stage_started("search")
    display.trials([trial(0, "done", 24.1), trial(1, "running")], total=8, left_s=None, best=None)
    display.trials([trial(0, "done", 24.1), trial(1, "stopped", 24.0)], total=8, left_s=None, best=None)
    lines = console.file.getvalue().splitlines()[1:]
    assert lines[0] == "[0:00] search: goes on after 1 of 8 trials"
    assert lines[1].startswith("[0:00] search trial-001: stopped, score 24.000")
    assert len(lines) == 2


@pytest.mark.parametrize(("width", "height"), [(80, 24), (80, 12), (140, 40)])
def test_terminal_shows_running_trials_then_the_best_and_counts_the_others(clock, width, height):
    console = Console(file=io.StringIO(), force_terminal=True, width=width, height=height, color_system=None)
    display, rows = LiveDisplay(console, clock), forty_trials()
    display.stage_started("search")
    display.trials(rows, total=48, left_s=200.0, best=rows[0])
    clock.now_s += 20
    lines = screen(display, width).splitlines()
    assert max(map(len, lines)) <= width
    assert len(lines) < height
    shown = [line.split()[0] for line in lines if line.strip().startswith("trial-")]
    running = [row.name for row in rows if row.state == "running"]
    expected = [*running, *(row.name for row in rows if row.state != "running")]
    assert shown == expected[: len(shown)]
    assert len(shown) <= 15
    assert f"and {40 - len(shown)} more: " in lines[-1]
    assert any("best so far: trial-038" in line for line in lines)
    assert any("25 of 48 trials, about 3:00 left" in line for line in lines)


def test_a_new_stage_forgets_the_trials(clock):
    display = LiveDisplay(terminal(), clock)
    display.stage_started("search")
    display.trials(forty_trials(), total=48, left_s=None, best=None)
    assert "25 of 48 trials" in screen(display)
    display.stage_started("compare")
    assert "trial" not in screen(display)


@pytest.mark.parametrize(("encoding", "width"), [("ascii", 80), ("ascii", 100), ("utf-8", 100)])
def test_the_result_of_a_search_fits_any_console(encoding, width):
    written = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    console = Console(file=written, width=width, highlight=False)
    rows = forty_trials()
    told = {"boundaries": (0.223, 0.875, 0.939), "seeds": 3, "score": 24.38, "score_error": 0.008}
    comparisons = (
        Comparison(label="best found", difference=None, interval=None, verdict="reference", **told),
        Comparison(label="single expert", difference=-0.0123, interval=(-0.0234, 0.0012), verdict="no difference", **told),
    )
    print_search(
        SearchReport(
            name="a", metric="psnr_y", higher_is_better=True, trials=tuple(rows), proposals=(), comparisons=comparisons, best=rows[0],
            profile=None, trained=30, cached=10, seconds=60.0, started="2026-01-12T14:03:11+00:00",
        ),
        console,
    )  # fmt: skip
    written.flush()
    lines = written.buffer.getvalue().decode(encoding).splitlines()
    assert lines[0].startswith("No difference beyond noise between the best boundaries found and a single expert: PSNR-Y +0.012")
    assert [line.split()[1] for line in lines if line.strip()[:2] in ("1 ", "2 ")] == [row.name for row in rows[:2]]
    assert all(row.name in "".join(lines) for row in rows)
    assert max(len(line) for line in lines[1:]) <= width
