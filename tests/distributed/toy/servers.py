"""Real servers on loopback for tests: MLflow, and PostgreSQL under a user that it accepts."""

import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest
from ports import free_port

from linearsr_platform.errors import UserError
from linearsr_platform.tracking.store import check_reachable

START_TIMEOUT_S = 180.0


@contextmanager
def mlflow_server(
    folder: Path, backend: str, artifacts: str, environment: Mapping[str, str] | None = None
) -> Iterator[tuple[str, "subprocess.Popen[bytes]"]]:
    """URI and process of a server that keeps records in `backend` and serves the files in `artifacts` itself."""
    port = free_port()
    options = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    stores = ["--backend-store-uri", backend, "--artifacts-destination", artifacts]
    quiet = {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_DISABLE_TELEMETRY": "true"}
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *options, *stores],
            cwd=folder,
            env={**os.environ, **quiet, **(environment or {})},
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    uri = f"http://127.0.0.1:{port}"
    try:
        wait_until_up(uri, process, folder / "log")
        yield uri, process
    finally:
        stop(process)


@contextmanager
def postgres_server() -> Iterator[str]:
    """URI of an empty database; its server runs as nobody where the test runs as root, which PostgreSQL refuses."""
    folder = _programs()
    user = {"user": "nobody", "group": pwd.getpwnam("nobody").pw_gid, "extra_groups": []} if os.geteuid() == 0 else {}
    # Not under pytest's own folder, which others may not enter.
    data = Path(tempfile.mkdtemp(prefix="linearsr-postgres-"))
    try:
        if user:
            shutil.chown(data, "nobody")
        port = free_port()
        make = [folder / "initdb", "--pgdata", data / "db", "--username", "mlflow", "--auth", "trust", "--encoding", "UTF8", "--no-sync"]
        done = subprocess.run(make, cwd=data, check=False, capture_output=True, text=True, **user)
        assert done.returncode == 0, done.stderr
        settings = [f"port={port}", "listen_addresses=127.0.0.1", "unix_socket_directories=", "fsync=off", "max_connections=40"]
        options = [word for setting in settings for word in ("-c", setting)]
        with (data / "log").open("wb") as log:
            process = subprocess.Popen([folder / "postgres", "-D", data / "db", *options], cwd=data, stdout=log, stderr=log, **user)
        # With the driver: without it SQLAlchemy 2.1 takes psycopg 3.
        uri = f"postgresql+psycopg2://mlflow@127.0.0.1:{port}/postgres"
        try:
            wait_until_up(uri, process, data / "log")
            yield uri
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(timeout=20)
    finally:
        shutil.rmtree(data, ignore_errors=True)


def _programs() -> Path:
    """Folder of `initdb` and `postgres`; Debian keeps them out of the PATH."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    found = shutil.which("initdb") or (str(debian[-1]) if debian else None)
    if found is None:
        pytest.skip("PostgreSQL is not installed (Debian, Ubuntu: apt install postgresql)")
    return Path(found).resolve().parent


def wait_until_up(uri: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    give_up = time.monotonic() + START_TIMEOUT_S
    while True:
        try:
            return check_reachable(uri, timeout_s=1.0)
        except UserError:
            if process.poll() is not None or time.monotonic() > give_up:
                pytest.fail(f"the server did not start: {log.read_text()}")
            time.sleep(0.2)


def stop(process: "subprocess.Popen[bytes]") -> None:
    """End a server and the workers of its own process group."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
