"""What the client of a cluster's jobs decides by itself: how a log is followed across lost connections, and which Python runs a job."""

import asyncio
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
import requests
from ray.job_submission import JobDetails, JobStatus, JobType
from typer.testing import CliRunner

from linearsr_platform.cli.app import app
from linearsr_platform.cluster import jobs
from linearsr_platform.cluster.jobs import RUN, Job, JobClient, default_python
from linearsr_platform.errors import StageError, UserError

LOG = "step 1\nstep 2\nstep 3\n"


class Connection:
    """Stands in for Ray's client: the log's connection breaks after a number of characters, and then nobody answers for a while."""

    def __init__(self, *breaks: int, unanswered: int = 0, silent_s: float = 0.0, forgets: bool = False) -> None:
        self.breaks, self.unanswered, self.silent_s, self.forgets = list(breaks), unanswered, silent_s, forgets
        self.away = False

    async def tail_job_logs(self, job_id: str) -> AsyncIterator[str]:
        if self.away:
            raise requests.exceptions.ConnectionError
        length = self.breaks.pop(0) if self.breaks else len(LOG)
        yield LOG[:length]
        await asyncio.sleep(self.silent_s)
        if length < len(LOG):
            raise RuntimeError("WebSocket connection closed unexpectedly with close code 1006")

    def list_jobs(self) -> list[JobDetails]:
        self.away = self.unanswered > 1
        if self.unanswered:
            self.unanswered -= 1
            raise requests.exceptions.ConnectionError
        if self.forgets:
            return []
        status = JobStatus.RUNNING if self.breaks else JobStatus.SUCCEEDED
        return [
            JobDetails(type=JobType.SUBMISSION, submission_id="linearsr-a-1", status=status, entrypoint="", metadata={RUN: "s3://runs/a"})
        ]

    def get_job_logs(self, job_id: str) -> str:
        return LOG


def follow(connection: Connection, *, tell: Callable[[str], None] = lambda _: None) -> str:
    client = JobClient.__new__(JobClient)
    client._client, client._address = connection, "http://head:8265"  # type: ignore[assignment]
    job = Job(
        id="linearsr-a-1",
        run="s3://runs/a",
        kind="run",
        state="RUNNING",
        user="",
        recipe_hash="",
        started_s=None,
        ended_s=None,
        exit_code=None,
        message="",
    )
    return "".join(client.follow(job, tell=tell))


def test_a_log_comes_whole_and_once_across_lost_connections(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "RECONNECT_S", 0.0)
    assert follow(Connection()) == LOG
    assert follow(Connection(9, 4, 12, unanswered=5)) == LOG


def test_a_cluster_that_stays_away_is_named_at_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "RECONNECT_S", 0.01)
    monkeypatch.setattr(jobs, "PATIENCE_S", 0.1)
    with pytest.raises(UserError, match="which does not answer"):
        follow(Connection(9, unanswered=10**6))


def test_a_job_that_printed_nothing_for_long_before_its_connection_was_lost_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "RECONNECT_S", 0.01)
    monkeypatch.setattr(jobs, "PATIENCE_S", 0.5)
    assert follow(Connection(9, unanswered=2, silent_s=0.6)) == LOG


def test_each_time_that_a_cluster_does_not_answer_is_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "RECONNECT_S", 0.01)
    told: list[str] = []
    assert follow(Connection(9, 4, unanswered=3), tell=told.append) == LOG
    assert told == ["http://head:8265 does not answer; waiting for it, 300 s at most"]


def test_a_job_that_a_new_head_does_not_know_is_no_mistake_of_who_follows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "RECONNECT_S", 0.0)
    with pytest.raises(StageError, match=r"linearsr-a-1: http://head:8265 knows it no more.*submit the recipe again"):
        follow(Connection(9, unanswered=2, forgets=True))


@pytest.mark.parametrize("option", [True, False])
def test_a_token_file_that_is_no_text_is_named(option: bool, tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_bytes(b"\x80\xff")
    arguments = ["list", "--address", "http://127.0.0.1:9", *(["--token-file", str(file)] if option else [])]
    done = CliRunner(env={"RAY_AUTH_TOKEN": "", "RAY_AUTH_TOKEN_PATH": str(file)}).invoke(app, arguments)
    assert done.exit_code == 2
    assert f"got {str(file)!r}, whose bytes are not UTF-8; expected the token of the cluster" in done.output


def test_the_head_decides_which_python_where_its_address_may_be_a_forwarded_port(monkeypatch: pytest.MonkeyPatch) -> None:
    def shown(word: str) -> str:
        return subprocess.run(f"echo {word}", shell=True, capture_output=True, text=True, check=True).stdout.strip()

    assert default_python("http://head:8265") == "python"
    assert shown(default_python("http://127.0.0.1:8265")) == sys.executable
    monkeypatch.setattr(sys, "executable", "/of another/machine/python")
    assert shown(default_python("http://localhost:8265")).endswith("python")
    assert "another" not in shown(default_python("http://localhost:8265"))
