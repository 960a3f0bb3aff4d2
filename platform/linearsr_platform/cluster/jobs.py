"""Runs as jobs of a Ray cluster: submitted once, watched, stopped. Talks to the cluster's dashboard by HTTP; starts no Ray here."""

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from shlex import quote

import aiohttp
import requests
from ray.exceptions import AuthenticationError
from ray.job_submission import JobDetails, JobStatus, JobSubmissionClient, JobType

from linearsr_platform.cluster.session import package_folders
from linearsr_platform.errors import StageError, UserError
from linearsr_platform.recipe.identity import stable_hash

RUN, RECIPE, USER, KIND = "linearsr.run", "linearsr.recipe", "linearsr.user", "linearsr.kind"
"""Keys of a job's metadata, which everybody with access to the cluster can read."""
ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
UNANSWERED = (ConnectionError, requests.exceptions.ConnectionError, requests.exceptions.Timeout)
"""What says that there is nobody at an address, or not now."""
POLL_S = 0.5
RECONNECT_S = 2.0
PATIENCE_S = 300.0
"""How long a log is waited for that was lost on the way, s."""
STOP_S = 45
"""How long a stopped job gets to write what it has to before it is killed, s: Ray's 3 s end it half-way."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """One submission of a run."""

    id: str
    run: str
    """Storage and name of the run: what must not be doubled."""
    kind: str
    """`run` or `search`."""
    state: str
    """Ray's: PENDING, RUNNING, SUCCEEDED, FAILED, STOPPED."""
    user: str
    recipe_hash: str
    started_s: float | None
    """Seconds since the epoch."""
    ended_s: float | None
    exit_code: int | None
    message: str
    """What Ray says of the state."""

    @property
    def ended(self) -> bool:
        """Whether it is over, well or not."""
        return self.state in ENDED


@dataclass(frozen=True, kw_only=True)
class Submission:
    """What is to be run."""

    folder: Path
    """Holds the recipe and what it needs; becomes the job's working directory."""
    command: Sequence[str]
    """Arguments of `python -m linearsr_platform`."""
    run: str
    kind: str
    name: str
    """Of the run; part of the job's id."""
    recipe_hash: str
    user: str
    python: str = "python"
    """Interpreter on the cluster's head, as its shell finds it."""
    env: Mapping[str, str]
    """Environment variables of the job; everybody with access to the cluster can read them."""
    cpus: float = 0.0
    """CPUs that the driver reserves; it mostly waits."""


class JobForgotten(StageError):
    """The cluster does not know a job that it knew."""


class JobClient:
    """The jobs of one cluster."""

    def __init__(self, address: str, *, token: str | None = None) -> None:
        """Connect.

        Args:
            address: of the cluster's dashboard, `http://HOST:8265`.
            token: of the cluster; None sends none.

        Raises:
            UserError: if nobody answers, or the cluster refuses the token.
        """
        self._address = address if "://" in address else f"http://{address}"
        if not self._address.startswith(("http://", "https://")):
            raise UserError(f"--address: got {address!r}; expected the URL of a Ray dashboard, such as http://HOST:8265")
        self._has_token = token is not None
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        with self._answers():
            self._client = JobSubmissionClient(self._address, headers=headers)

    def submit(self, submission: Submission) -> Job:
        """Start a run as a job, or go on with one whose earlier job is over.

        Raises:
            UserError: if a job of this run is not over yet.
        """
        earlier = [job for job in self.jobs() if job.run == submission.run]
        for job in earlier:
            if not job.ended:
                raise self._running(job.id, submission.run)
        # Not their count: whoever deletes an old job would make the next one have the number of a living one.
        number = 1 + max((int(job.id.rpartition("-")[2]) for job in earlier), default=0)
        job_id = f"linearsr-{submission.name}-{stable_hash(submission.run)[:6]}-{number}"
        metadata = {RUN: submission.run, RECIPE: submission.recipe_hash, USER: submission.user, KIND: submission.kind}
        entrypoint = " ".join([submission.python, "-m", "linearsr_platform", *submission.command])
        with self._answers():
            try:
                self._client.submit_job(
                    entrypoint=entrypoint,
                    submission_id=job_id,
                    runtime_env={
                        "working_dir": str(submission.folder),
                        "py_modules": [str(folder) for folder in package_folders()],
                        "env_vars": {"RAY_JOB_STOP_WAIT_TIME_S": str(STOP_S), **submission.env},
                    },
                    metadata=metadata,
                    entrypoint_num_cpus=submission.cpus or None,
                )
            except RuntimeError as error:
                # Whoever comes second with the same number is told so by the cluster: nobody checks and submits in one step.
                if "already exists" in str(error):
                    raise self._running(job_id, submission.run) from error
                raise
        return self.find(job_id)

    def jobs(self) -> list[Job]:
        """List the jobs that `submit` has started, oldest first."""
        with self._answers():
            found = self._client.list_jobs()
        jobs = [_job(details) for details in found if details.type == JobType.SUBMISSION and RUN in (details.metadata or {})]
        return sorted(jobs, key=lambda job: (job.started_s or 0.0, job.id))

    def find(self, name: str) -> Job:
        """Return a job by its id, or the latest job of a run by the run's name.

        Raises:
            UserError: if there is none; the message names the nearest.
        """
        jobs = self.jobs()
        fitting = [job for job in jobs if job.id == name] or [job for job in jobs if job.run.rsplit("/", 1)[-1] == name]
        if fitting:
            return fitting[-1]
        names = list(dict.fromkeys(known for job in jobs for known in (job.id, job.run.rsplit("/", 1)[-1])))
        if not names:
            raise UserError(f"job: got {name!r}; expected a job of {self._address}, which has none; fix: linearsr submit RECIPE")
        near = get_close_matches(name, names, n=1)
        hint = f"; fix: did you mean {near[0]!r}?" if near else ""
        raise UserError(f"job: got {name!r}; expected one of {', '.join(names)}{hint}")

    def logs(self, job: Job) -> str:
        """Return what a job has printed so far."""
        with self._answers():
            return str(self._client.get_job_logs(job.id))

    def follow(self, job: Job, *, tell: Callable[[str], None] = lambda _: None) -> Iterator[str]:
        """Yield what a job prints, from its beginning to its end, across lost connections.

        Args:
            job: to follow.
            tell: told once of each time that the cluster does not answer.

        Raises:
            UserError, StageError: if the cluster has not answered for `PATIENCE_S`, or knows the job no more.
        """
        seen, unanswered_since = 0, None
        while True:
            position = 0
            try:
                for piece in _synchronously(self._client.tail_job_logs(job.id)):
                    # After a lost connection the log comes from its beginning again.
                    new = piece[max(0, seen - position) :]
                    position += len(piece)
                    if new:
                        seen, unanswered_since = seen + len(new), None
                        yield new
            except (RuntimeError, OSError, aiohttp.ClientError):
                # A forwarded port that is gone for a while is no reason to leave a job that goes on; what else is wrong `jobs` says.
                pass
            try:
                ended, rest = self._after(job, seen)
            except (UserError, StageError) as error:
                # Counted from the first question without an answer: before it, a job may have had nothing to print for hours.
                if unanswered_since is None and _passes(error):
                    tell(f"{self._address} does not answer; waiting for it, {PATIENCE_S:g} s at most")
                unanswered_since = unanswered_since or time.monotonic()
                if not _passes(error) or time.monotonic() - unanswered_since > PATIENCE_S:
                    raise
            else:
                unanswered_since = None
                yield rest
                if ended:
                    return
            time.sleep(RECONNECT_S)

    def _after(self, job: Job, seen: int) -> tuple[bool, str]:
        """Return whether a job has ended, and what it then has printed after so many characters."""
        now = next((known for known in self.jobs() if known.id == job.id), None)
        if now is None:
            raise JobForgotten(
                f"{job.id}: {self._address} knows it no more, as after a new start of the cluster's head, which ends its jobs; "
                "fix: submit the recipe again, it goes on from its checkpoints"
            )
        return now.ended, self.logs(job)[seen:] if now.ended else ""

    def stop(self, job: Job, *, wait_s: float) -> Job:
        """Ask a job to end, and return it when it has ended or the time is up. It goes on from its last checkpoint when submitted again."""
        with self._answers():
            self._client.stop_job(job.id)
        end = time.monotonic() + wait_s
        while not (now := self.find(job.id)).ended and time.monotonic() < end:
            time.sleep(POLL_S)
        return now

    def _running(self, job_id: str, run: str) -> UserError:
        return UserError(
            f"submit: got {run}, which job {job_id} is working on; expected a run that is not running; fix: "
            f"`linearsr logs {job_id} -f` to watch it, `linearsr stop {job_id}` to end it, or --set name=... for another run"
        )

    @contextmanager
    def _answers(self) -> Iterator[None]:
        """Turn what can go wrong between here and the cluster into one sentence."""
        try:
            yield
        except AuthenticationError as error:
            did = "refused the token" if self._has_token else "asks for a token"
            raise UserError(
                f"--address: {self._address} {did}; expected the token of the cluster; "
                "fix: --token-file FILE, RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH, or put it into ~/.ray/auth_token"
            ) from error
        except UNANSWERED as error:
            raise UserError(
                f"--address: got {self._address}, which does not answer; expected the dashboard of a running Ray cluster, "
                "such as http://HOST:8265; fix: start it, or forward its port"
            ) from error
        except (RuntimeError, requests.exceptions.RequestException) as error:
            raise StageError(f"{self._address}: {error}") from error


def _passes(error: UserError | StageError) -> bool:
    """Tell whether an error may be over at the next question."""
    return isinstance(error.__cause__, UNANSWERED) or (isinstance(error, StageError) and not isinstance(error, JobForgotten))


def _job(details: JobDetails) -> Job:
    metadata = details.metadata or {}
    status = details.status
    return Job(
        id=str(details.submission_id),
        run=metadata[RUN],
        kind=metadata.get(KIND, "run"),
        state=status.value if isinstance(status, JobStatus) else str(status),
        user=metadata.get(USER, ""),
        recipe_hash=metadata.get(RECIPE, ""),
        started_s=_seconds(details.start_time),
        ended_s=_seconds(details.end_time),
        exit_code=details.driver_exit_code,
        message=details.message or "",
    )


def _seconds(milliseconds: int | None) -> float | None:
    return milliseconds / 1000 if milliseconds else None


def _synchronously(stream: AsyncIterator[str]) -> Iterator[str]:
    """Iterate an asynchronous stream from ordinary code; Ctrl-C ends it at once."""
    with asyncio.Runner() as runner:
        while True:
            try:
                yield runner.run(anext(stream))  # type: ignore[arg-type]
            except StopAsyncIteration:
                return


def default_python(address: str) -> str:
    """Return the interpreter that a job on the cluster should use, as its head's shell reads it.

    This one where the cluster is on this machine: an address that looks like it may be a forwarded port, so the head looks for itself.
    """
    host = address.partition("://")[2] or address
    is_local = host.startswith(("127.0.0.1", "localhost", "[::1]"))
    return f'"$(command -v {quote(sys.executable)} || command -v python)"' if is_local else "python"
