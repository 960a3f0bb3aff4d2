"""The progress display: what a terminal shows, what a log file gets, and that the cursor always comes back."""

import io
import threading

import pytest
from rich.console import Console

from linearsr_platform.cli.progress import LiveDisplay, PlainDisplay, clock_time, make_display

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
