"""Runs as jobs of a real Ray head with a dashboard and token authentication, by the command line alone."""

import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from ports import free_ports

pytestmark = [pytest.mark.ray, pytest.mark.slow]
ROOT = Path(__file__).parents[2]
SMOKE = str(ROOT / "pipelines" / "smoke.yaml")
SECRET = "not-for-everybody"


@dataclass(frozen=True)
class Head:
    """A Ray head of its own."""

    address: str
    gcs: str
    token: str

    def linearsr(self, *arguments: str, token: str | None = None, seconds: float = 300) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "linearsr_platform", *arguments, "--address", self.address]
        return subprocess.run(command, capture_output=True, text=True, check=False, env=self.env(token), timeout=seconds)

    def env(self, token: str | None = None) -> dict[str, str]:
        given = self.token if token is None else token
        # Without what other tests have told Ray in this process.
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        return {**kept, **({"RAY_AUTH_TOKEN": given} if given else {}), "HOME": "/nonexistent"}

    def log_has(self, job: str, text: str, seconds: float = 300) -> bool:
        """Follow a job's log until it has the text; a process for every look would take a core from the job."""
        command = [sys.executable, "-m", "linearsr_platform", "logs", job, "-f", "--address", self.address]
        with subprocess.Popen(command, env=self.env(), stdout=subprocess.PIPE, text=True) as follower:
            late = threading.Timer(seconds, follower.kill)
            late.start()
            assert follower.stdout is not None
            try:
                return any(text in line for line in follower.stdout)
            finally:
                late.cancel()
                follower.kill()


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    port, dashboard, client, agent, metrics = free_ports(5)
    token = secrets.token_hex(32)
    # In /tmp itself: Ray puts sockets below it, whose path has little room.
    with tempfile.TemporaryDirectory(prefix="lsr-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=2", "--include-dashboard=true"]
        command += [f"--port={port}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}", f"--temp-dir={folder}"]
        command += [f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}", "--object-store-memory=100000000"]
        env = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token, "RAY_USAGE_STATS_ENABLED": "0"}
        process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        started = Head(f"http://127.0.0.1:{dashboard}", f"127.0.0.1:{port}", token)
        try:
            end = time.monotonic() + 180
            while started.linearsr("list").returncode and time.monotonic() < end:
                time.sleep(1)
            yield started
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)


def test_a_run_is_never_doubled_and_goes_on_after_a_stop(head: Head, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(SECRET)
    arguments = ["submit", SMOKE, "--set", f"storage={tmp_path}/runs", "--set", f"cluster.secrets.STORE_SECRET=file:{tmp_path}/secret"]
    first = head.linearsr(*arguments)
    assert first.returncode == 0, first.stderr
    job = first.stdout.split()[1]

    again = head.linearsr(*arguments)
    assert again.returncode == 2
    assert job in again.stderr
    assert "linearsr stop" in again.stderr

    assert head.log_has(job, "pretrain: started")
    # Where tests run in the background, Ctrl-C is ignored, and children would inherit that.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    follower = subprocess.Popen(
        [sys.executable, "-m", "linearsr_platform", "logs", "smoke", "-f", "--address", head.address],
        env=head.env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    signal.signal(signal.SIGINT, before)
    assert follower.stdout is not None
    while "pretrain: started" not in follower.stdout.readline():
        assert follower.poll() is None
    follower.send_signal(signal.SIGINT)
    _, told = follower.communicate(timeout=30)
    assert follower.returncode == 0
    assert f"linearsr stop {job}" in told
    assert json.loads(head.linearsr("status", job, "--json").stdout)["state"] == "RUNNING"

    assert head.linearsr("stop", "smoke").returncode == 0
    assert json.loads(head.linearsr("status", job, "--json").stdout)["state"] == "STOPPED"
    second = head.linearsr(*arguments).stdout.split()[1]
    assert second != job
    assert head.log_has(second, "prepare: skipped")
    assert head.linearsr("stop", second).returncode == 0

    told_of_both = head.linearsr("list", "--json").stdout + "".join(head.linearsr("logs", one).stdout for one in (job, second))
    assert second in told_of_both
    assert SECRET not in told_of_both
    assert head.token not in told_of_both


def test_a_stopped_job_gets_the_time_to_write_what_it_has(head: Head, tmp_path: Path) -> None:
    # Twice as long as Ray would wait by itself.
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\ntrap 'sleep 6; echo all; exit 0' TERM\necho begun\nwhile :; do sleep 0.1; done\n")
    slow.chmod(0o755)
    job = head.linearsr("submit", SMOKE, "--python", str(slow), "--set", f"storage={tmp_path}/runs", "--set", "name=slow").stdout.split()[1]
    assert head.log_has(job, "begun")
    stopped = head.linearsr("stop", job)
    assert stopped.returncode == 0, stopped.stderr
    assert head.linearsr("logs", job).stdout.splitlines()[-1] == "all"


def test_of_two_that_submit_at_once_one_wins(head: Head, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "linearsr_platform", "submit", SMOKE, "--address", head.address]
    command += ["--set", "name=twice", "--set", f"storage={tmp_path}/runs", "--set", "data.sources={none: /nonexistent}"]
    both = [subprocess.Popen(command, env=head.env(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(2)]
    told = [process.communicate(timeout=90) for process in both]
    assert sorted(process.returncode for process in both) == [0, 2], told
    jobs = [job for job in json.loads(head.linearsr("list", "--json").stdout) if job["run"].endswith("/twice")]
    assert len(jobs) == 1

    # This one cannot work, and whoever follows it learns why.
    followed = head.linearsr("logs", "twice", "-f")
    assert followed.returncode == 1
    assert "/nonexistent" in followed.stdout
    assert "FAILED" in followed.stderr


@pytest.mark.parametrize(("token", "said"), [("", "asks for a token"), ("0" * 64, "refused the token")])
def test_without_the_token_nothing_is_told(head: Head, token: str, said: str) -> None:
    done = head.linearsr("list", token=token)
    assert done.returncode == 2
    assert said in done.stderr
    assert done.stdout == ""


def test_a_token_is_asked_for_where_ray_itself_misses_one(head: Head) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "linearsr_platform", "list", "--address", head.address],
        capture_output=True,
        text=True,
        check=False,
        env={**head.env(token=""), "RAY_AUTH_MODE": "token"},
        timeout=120,
    )
    assert done.returncode == 2
    assert "asks for a token" in done.stderr


def test_a_job_that_is_not_there_is_missed_by_name(head: Head) -> None:
    done = head.linearsr("status", "smok")
    assert done.returncode == 2
    assert "smok" in done.stderr


def test_workers_find_secrets_by_reference(head: Head, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text(f"{SECRET}\n")
    script = (
        "import os, ray\n"
        "from linearsr_platform.cluster.session import cluster_session\n"
        "from linearsr_platform.recipe.schema import ClusterConfig\n"
        f"secrets = {{'STORE_SECRET': 'file:{tmp_path}/secret'}}\n"
        f"with cluster_session(ClusterConfig(address={head.gcs!r}, secrets=secrets)):\n"
        "    got = ray.get(ray.remote(lambda: os.environ['STORE_SECRET']).remote())\n"
        "    environment = ray.get_runtime_context().runtime_env\n"
        f"    print(got == {SECRET!r}, {SECRET!r} in str(environment))\n"
    )
    env = {**head.env(), "RAY_AUTH_MODE": "token"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=env, timeout=120)
    assert done.stdout.split() == ["True", "False"], done.stderr


@pytest.mark.parametrize("environment", [{"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "0" * 64}])
def test_who_joins_with_another_token_is_told_so(head: Head, environment: dict[str, str]) -> None:
    script = (
        "from linearsr_platform.cluster.session import cluster_session\n"
        "from linearsr_platform.errors import UserError\n"
        "from linearsr_platform.recipe.schema import ClusterConfig\n"
        "try:\n"
        f"    with cluster_session(ClusterConfig(address={head.gcs!r})):\n"
        "        pass\n"
        "except UserError as error:\n"
        "    print(error)\n"
    )
    env = {**head.env(token=""), **environment}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False, env=env, timeout=120)
    assert f"cluster.address: got {head.gcs!r}, whose cluster refused the token of" in done.stdout, done.stderr
