"""A real MLflow server goes away in the middle of logging: nothing waits, and everything arrives, in order and once."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from mlflow import MlflowClient

from linearsr_platform.tracking.journal import outbox_folder
from linearsr_platform.tracking.outbox import Patience
from linearsr_platform.tracking.runs import Tracker

sys.path.insert(0, str(Path(__file__).with_name("toy")))

from mlflow_server import MlflowServer

pytestmark = pytest.mark.server
LINEARSR = Path(sys.executable).with_name("linearsr")
SOON = Patience(notice_s=1.0, longest_retry_s=1.0)
START_S = 1_700_000_000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MlflowServer]:
    with pytest.MonkeyPatch.context() as patch, MlflowServer(tmp_path_factory.mktemp("server")) as server:
        # As the command line sets it.
        patch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        yield server


def history(client: MlflowClient, run_id: str) -> list[tuple[int, float, float]]:
    """Step, value and seconds since the start of every point there is, in the server's order."""
    return [(point.step, point.value, point.timestamp / 1000 - START_S) for point in client.get_metric_history(run_id, "loss")]


@pytest.mark.parametrize("how", [pytest.param(signal.SIGTERM, marks=pytest.mark.nightly), signal.SIGKILL, signal.SIGSTOP])
def test_training_goes_on_without_the_server_and_nothing_is_lost(server: MlflowServer, how: signal.Signals, tmp_path: Path) -> None:
    told: list[str] = []
    slowest_s = 0.0
    with Tracker(server.uri, "away", journals=tmp_path / "outbox", tell=told.append, patience=SOON) as tracker:
        with tracker.start_pipeline("away", params={"seed": 1}) as run:
            for step in range(60):
                if step == 20:
                    server.signal(how)
                if step == 40:
                    server.signal(signal.SIGCONT) if how == signal.SIGSTOP else server.start()
                started_s = time.monotonic()
                run.log_metrics(step, {"loss": step / 7}, at_s=START_S + step)
                run.flush()
                run.set_tags({"last": step})
                if step == 30:
                    run.log_params({"late": "yes"})
                    run.log_text("written while it was away", "notes/away.txt")
                slowest_s = max(slowest_s, time.monotonic() - started_s)
        client = tracker.client
        assert client.get_run(run.run_id).info.status == "FINISHED", "the client comes after what was written"
        assert history(client, run.run_id) == [(step, step / 7, step) for step in range(60)]
    kept = client.get_run(run.run_id)
    assert (kept.info.status, kept.data.tags["last"], kept.data.params) == ("FINISHED", "59", {"seed": "1", "late": "yes"})
    notes = Path(client.download_artifacts(run.run_id, "notes/away.txt", str(tmp_path)))
    assert notes.read_text() == "written while it was away"
    assert slowest_s < 10
    assert [line.split(" at ")[0] for line in told if "waits for MLflow" not in line] == ["MLflow", "MLflow"]
    assert "does not answer" in told[0]
    assert "is back" in told[-1]
    assert not (tmp_path / "outbox").exists()


class Cutter:
    """Stands between client and server; `cut` makes the next write reach the server, and its answer go down with the connection."""

    def __init__(self, port: int) -> None:
        self._server = ("127.0.0.1", port)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.uri = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self._armed = threading.Event()
        self.cuts = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def arm(self) -> None:
        self._armed.set()

    def wait(self) -> None:
        """Wait until it has cut."""
        end = time.monotonic() + 10
        while self._armed.is_set():
            assert time.monotonic() < end
            time.sleep(0.01)

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            server = socket.create_connection(self._server)
            writes = threading.Event()
            threading.Thread(target=self._pass, args=(client, server, writes, False), daemon=True).start()
            threading.Thread(target=self._pass, args=(server, client, writes, True), daemon=True).start()

    def _pass(self, source: socket.socket, target: socket.socket, writes: threading.Event, answers: bool) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                if data.startswith((b"POST", b"PUT")):
                    writes.set()
                if answers and writes.is_set() and self._armed.is_set():
                    self.cuts += 1
                    self._armed.clear()
                    break
                target.sendall(data)
        for side in (source, target):
            with suppress(OSError):
                side.shutdown(socket.SHUT_RDWR)


def test_an_answer_that_is_lost_doubles_nothing(server: MlflowServer, tmp_path: Path) -> None:
    cutter = Cutter(server.port)
    tracker = Tracker(cutter.uri, "cut", journals=tmp_path / "outbox", tell=lambda line: None, patience=SOON)
    cutter.arm()
    with tracker, tracker.start_pipeline("cut") as run:
        for step in range(6):
            cutter.arm()
            run.log_metrics(step, {"loss": step / 7, "other": 1.0}, at_s=START_S + step)
            run.flush()
            cutter.wait()
        cutter.arm()
        run.log_text("once", "notes.txt")
        cutter.wait()
    assert cutter.cuts == 8
    client = MlflowClient(server.uri)
    assert [found.info.run_id for found in client.search_runs([tracker.experiment_id])] == [run.run_id]
    assert history(client, run.run_id) == [(step, step / 7, step) for step in range(6)]
    assert len(client.get_metric_history(run.run_id, "other")) == 6
    assert [file.path for file in client.list_artifacts(run.run_id)] == ["notes.txt"]


DRIVER = """
import os, signal, sys
from pathlib import Path
from linearsr_platform.tracking.runs import Tracker
uri, folder, server, start = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
run = Tracker(uri, "killed", journals=folder).start_pipeline("killed")
print(run.run_id, flush=True)
for step in range(20):
    if step == 10:
        os.killpg(server, signal.SIGKILL)
    run.log_metrics(step, {"loss": step / 7}, at_s=start + step)
    run.flush()
run.log_text("last words", "words.txt")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_driver_could_not_send_is_sent_by_the_command(server: MlflowServer, tmp_path: Path) -> None:
    assert server.process is not None
    folder = outbox_folder(str(tmp_path / "runs"), "killed")
    command = [sys.executable, "-c", DRIVER, server.uri, str(folder), str(server.process.pid), str(START_S)]
    driver = subprocess.run(command, capture_output=True, text=True, check=False)
    assert driver.returncode == -signal.SIGKILL, driver.stderr
    assert "does not answer" in driver.stderr
    server.process.wait()

    def flush() -> "subprocess.CompletedProcess[str]":
        arguments = [LINEARSR, "tracking", "flush", "--storage", str(tmp_path / "runs")]
        return subprocess.run(arguments, capture_output=True, text=True, check=False, env={**os.environ, "COLUMNS": "200"})

    refused = flush()
    assert refused.returncode == 1
    assert f"tracking.uri: got '{server.uri}'; expected an MLflow that answers" in refused.stdout
    assert "11 writes are still to be sent; they are kept" in refused.stderr
    server.start()
    sent = flush()
    assert sent.returncode == 0, sent.stderr
    assert sent.stdout == f"{server.uri}: 11 of 11 writes were sent\n"
    client, run_id = MlflowClient(server.uri), driver.stdout.strip()
    assert history(client, run_id) == [(step, step / 7, step) for step in range(20)]
    assert [file.path for file in client.list_artifacts(run_id)] == ["words.txt"]
    assert flush().stdout == f"nothing waits under {tmp_path / 'runs'}\n"
    assert not folder.exists()
