"""What the outbox does when MLflow is away, hangs or refuses, with a store that a test switches; and what its journal keeps."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from threading import Event

import pytest
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, TEMPORARILY_UNAVAILABLE

from linearsr_platform.errors import StageError, UserError
from linearsr_platform.tracking.journal import Journal, outbox_folder, outbox_folders
from linearsr_platform.tracking.operations import Operation
from linearsr_platform.tracking.outbox import Outbox, Patience
from linearsr_platform.tracking.replay import replay
from linearsr_platform.tracking.runs import Tracker

SOON = Patience(notice_s=0.1, retry_s=0.01, longest_retry_s=0.05, answer_s=0.5, tries=5)
URI = "http://store"


class Store:
    """Takes writes while it is up; `error` is what it raises, `free` lets go of a call that hangs."""

    def __init__(self) -> None:
        self.up, self.error, self.free = True, None, Event()
        self.hangs = False
        self.got: list[tuple[int, bytes | None]] = []
        self.calls = 0

    def send(self, operation: Operation, file: Path) -> None:
        self.calls += 1
        if self.hangs:
            self.free.wait(10)
        if not self.up:
            raise ConnectionError("refused")
        if self.error is not None and operation.metrics[0][3] == 7:
            raise self.error
        self.got.append((operation.metrics[0][3], file.read_bytes() if operation.file else None))

    @property
    def steps(self) -> list[int]:
        return [step for step, _ in self.got]


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def told() -> list[str]:
    return []


@pytest.fixture
def outbox(store: Store, told: list[str], tmp_path: Path) -> Outbox:
    probe = lambda: store.up and not store.hangs  # noqa: E731
    return Outbox(URI, tmp_path / "outbox", send=store.send, probe=probe, tell=told.append, patience=SOON)


def point(step: int) -> Operation:
    return Operation(run_id="r", doing=f"logging step {step}", metrics=(("loss", 0.1 + step, 1_700_000_000_000 + step, step),))


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def test_a_store_that_answers_has_everything_when_a_call_returns(outbox: Outbox, store: Store, told: list[str], tmp_path: Path) -> None:
    for step in range(3):
        outbox.put(point(step))
        assert store.steps == list(range(step + 1))
    assert outbox.ask("counting", lambda: len(store.got)) == 3
    assert outbox.close(1.0) == 0
    assert told == []
    assert not (tmp_path / "outbox").exists()


def test_what_is_written_while_the_store_is_away_arrives_later_in_order_and_once(outbox: Outbox, store: Store, told: list[str]) -> None:
    outbox.put(point(0))
    store.up = False
    started_s = time.monotonic()
    for step in range(1, 200):
        outbox.put(point(step))
    assert time.monotonic() - started_s < 2, "nobody waits for a store that is known to be away"
    assert outbox.waiting == 199
    assert len(told) == 1
    assert "does not answer" in told[0]
    store.up = True
    assert outbox.close(10.0) == 0
    assert store.steps == list(range(200))
    assert told[1:] == [f"MLflow at {URI} is back: what waited was sent, 199 writes"]


def test_a_store_that_hangs_holds_nobody_up(outbox: Outbox, store: Store, told: list[str]) -> None:
    store.hangs = True
    started_s = time.monotonic()
    for step in range(50):
        outbox.put(point(step))
    assert time.monotonic() - started_s < 2
    assert told == [f"MLflow at {URI} does not answer (no answer); what is logged meanwhile is kept, and sent when it is back"]
    assert store.calls == 1, "it is not asked again while the first call hangs"
    store.hangs = False
    store.free.set()
    assert outbox.close(10.0) == 0
    assert store.steps == list(range(50))


def test_a_call_that_is_only_slow_is_waited_for(outbox: Outbox, store: Store, told: list[str]) -> None:
    assert outbox.ask("sleeping", lambda: time.sleep(0.5) or "done") == "done"
    assert told == []


REFUSAL = MlflowException("no such run", error_code=INVALID_PARAMETER_VALUE)
FAILURE = MlflowException("database is locked", error_code=TEMPORARILY_UNAVAILABLE)


def test_a_refusal_is_raised_to_who_waits_and_told_if_nobody_does(outbox: Outbox, store: Store, told: list[str]) -> None:
    store.error = REFUSAL
    with pytest.raises(StageError, match=r"^tracking: logging step 7 failed: no such run$"):
        outbox.put(point(7))
    store.up = False
    for step in (6, 7, 8):
        outbox.put(point(step))
    store.up = True
    assert outbox.close(10.0) == 0
    assert store.steps == [6, 8]
    assert "MLflow refused logging step 7: no such run; it is left out" in told


def test_a_store_that_lives_and_always_fails_one_write_does_not_block_the_others(outbox: Outbox, store: Store, told: list[str]) -> None:
    store.error = FAILURE
    for step in (6, 7, 8):
        outbox.put(point(step))
    assert outbox.close(10.0) == 0
    assert store.steps == [6, 8]
    assert store.calls == 2 + SOON.tries
    assert any("refused logging step 7: database is locked" in line for line in told)


def test_a_request_waits_for_the_store_but_not_for_ever(outbox: Outbox, store: Store, told: list[str]) -> None:
    asked = 0

    def answer() -> str:
        nonlocal asked
        asked += 1
        if not store.up:
            raise ConnectionError("refused")
        return "here"

    store.up = False
    with pytest.raises(StageError, match=f"starting run 'x': got no answer from {URI} for 0 s"):
        outbox.ask("starting run 'x'", answer)
    assert "starting run 'x': waits for MLflow" in told[1]
    before = asked
    outbox.put(point(1))
    store.up = True
    assert outbox.ask("again", answer) == "here"
    assert store.steps == [1], "a request comes after what was written before it"
    assert asked == before + 1, "who gave up is not served any more"


KILLED = """
import os, signal, sys
from pathlib import Path
from test_outbox import SOON, URI, Outbox, Store, point
from linearsr_platform.tracking.operations import Operation
store = Store()
outbox = Outbox(URI, Path(sys.argv[1]), send=store.send, probe=lambda: store.up, tell=lambda line: None, patience=SOON)
outbox.put(point(0))
store.up = False
outbox.put(point(1))
outbox.put(Operation(**{**vars(point(2)), "file": "notes.txt", "folder": "a"}), b"kept")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_has_left_is_sent_by_the_next_and_only_that(store: Store, told: list[str], tmp_path: Path) -> None:
    folder = tmp_path / "outbox"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    done = subprocess.run([sys.executable, "-c", KILLED, str(folder)], env=environment, check=False)
    assert done.returncode == -signal.SIGKILL
    (lines,) = folder.glob("*/operations.jsonl")
    with lines.open("ab") as file:
        # What a full disk or a power cut leaves of a line.
        file.write(b'{"number":4,"run_id":"r","doi')
    held = next(Journal.orphans(folder))
    assert list(Journal.orphans(folder)) == [], "a journal has one owner"
    held[0].release()

    outbox = Outbox(URI, folder, send=store.send, probe=lambda: True, tell=told.append, patience=SOON)
    assert outbox.adopt(Journal.orphans(folder)) == 2
    outbox.put(point(3))
    assert store.got == [(1, None), (2, b"kept"), (3, None)]
    assert outbox.close(1.0) == 0
    assert not folder.exists()


def test_a_journal_for_another_store_is_left_alone(store: Store, tmp_path: Path) -> None:
    store.up = False
    first = Outbox(URI, tmp_path / "outbox", send=store.send, probe=lambda: False, tell=lambda line: None, patience=SOON)
    first.put(point(1))
    assert first.close(0.0) == 1
    other = Outbox("http://other", tmp_path / "outbox", send=store.send, probe=lambda: True, tell=lambda line: None, patience=SOON)
    assert other.adopt(Journal.orphans(tmp_path / "outbox")) == 0
    again = Outbox(URI, tmp_path / "outbox", send=store.send, probe=lambda: True, tell=lambda line: None, patience=SOON)
    store.up = True
    assert again.adopt(Journal.orphans(tmp_path / "outbox")) == 1
    wait_until(lambda: store.steps == [1])


def test_a_journal_does_not_grow_with_what_was_sent(outbox: Outbox, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("linearsr_platform.tracking.journal.SHRINK_BYTES", 2000)
    for step in range(100):
        outbox.put(point(step))
    (lines,) = (tmp_path / "outbox").glob("*/operations.jsonl")
    assert lines.stat().st_size < 2500
    store.up = False
    outbox.put(point(100))
    assert outbox.close(0.0) == 1
    ((_, left),) = list(Journal.orphans(tmp_path / "outbox"))
    assert [operation for _, operation in left] == [point(100)]


def test_journals_of_remote_storage_are_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    folder = outbox_folder("s3://bucket/runs/", "quick")
    assert folder.is_relative_to(tmp_path)
    assert folder != outbox_folder("s3://other/runs", "quick")
    Journal.create(folder, URI).release()
    assert outbox_folders("s3://bucket/runs") == [folder]
    assert outbox_folders(str(tmp_path / "local")) == []


def test_a_flush_sends_to_every_store_that_answers_and_tells_what_was_refused(tmp_path: Path) -> None:
    here, away = f"sqlite:///{tmp_path}/mlflow.db", "http://127.0.0.1:9"
    run = Tracker(here, "flushed").start_pipeline("run")
    folders = [tmp_path / name for name in ("first", "second")]
    for folder, uri, ids in zip(folders, (away, here), ([run.run_id], ["0" * 32, run.run_id]), strict=True):
        journal = Journal.create(folder, uri)
        for one in ids:
            journal.append(Operation(run_id=one, doing="setting tags", tags=(("late", "yes"),)), None, durable=True)
        journal.release()
    said: list[str] = []
    with pytest.raises(
        UserError, match=r"--tracking-uri: got 'http://other'; expected one that writes wait for: http://127.0.0.1:9, sqlite"
    ):
        replay(folders, uri="http://other", tell=said.append, patience=SOON)
    (first,) = replay(folders, uri=away, tell=said.append, patience=SOON)
    assert (first.sent, first.left) == (0, 1)
    first, second = replay(folders, uri=None, tell=said.append, patience=SOON)
    assert (first.uri, first.sent, first.left) == (away, 0, 1)
    assert "expected an MLflow that answers" in first.away
    assert (second.uri, second.sent, second.refused, second.left, second.away) == (here, 1, 1, 0, "")
    assert Tracker(here, "flushed").client.get_run(run.run_id).data.tags["late"] == "yes"
    assert [uri for folder in folders for uri in (journal.uri for journal, _ in Journal.orphans(folder))] == [away]
