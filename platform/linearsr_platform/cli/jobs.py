"""`linearsr submit`, `status`, `logs`, `stop` and `list`: runs as jobs of a Ray cluster, from any machine that reaches its dashboard."""

import json
import logging
import os
import re
import tempfile
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from linearsr_platform.cli.account import account_name
from linearsr_platform.cli.options import Overrides, Profile, RecipePath, Update, Verbose, known_stage
from linearsr_platform.errors import StageError, UserError
from linearsr_platform.recipe.schema import SEARCH_STAGE_NAMES, STAGE_NAMES

if TYPE_CHECKING:
    from linearsr_platform.cluster.jobs import Job, JobClient

Address = Annotated[
    str,
    typer.Option("--address", envvar="RAY_API_SERVER_ADDRESS", metavar="URL", help="Dashboard of the cluster, http://HOST:8265."),
]
TokenFile = Annotated[
    str | None,
    typer.Option(
        "--token-file", metavar="FILE", help="Token of the cluster; else RAY_AUTH_TOKEN, RAY_AUTH_TOKEN_PATH or ~/.ray/auth_token is taken."
    ),
]
JobName = Annotated[str, typer.Argument(metavar="JOB", help="Id of a job, or name of a run: its latest job.", show_default=False)]
LOOKS_SECRET = re.compile("KEY|SECRET|TOKEN|PASSWORD|CREDENTIAL", re.IGNORECASE)
RAY_LOGGERS = ("ray._private.runtime_env.packaging", "ray.dashboard.modules.dashboard_sdk", "ray.dashboard.modules.job.sdk")
IN_A_JOB = "auto"
"""Address of the cluster as its own jobs see it."""


def submit(
    recipe: RecipePath,
    address: Address,
    profile: Profile = None,
    overrides: Overrides = None,
    search: Annotated[bool, typer.Option("--search", help="Submit `linearsr search` instead of `linearsr run`.")] = False,
    redo_from: Annotated[str | None, typer.Option("--from", metavar="STAGE", help="Do this stage and all after it again.")] = None,
    update: Update = False,
    follow: Annotated[bool, typer.Option("--follow", help="Show what the job prints until it ends; Ctrl-C leaves it running.")] = False,
    env: Annotated[list[str] | None, typer.Option("--env", metavar="NAME=VALUE", help="Environment variable of the job.")] = None,
    python: Annotated[
        str | None, typer.Option("--python", metavar="PATH", help="Interpreter on the cluster's head.", show_default="python")
    ] = None,
    token_file: TokenFile = None,
    verbose: Verbose = False,
) -> None:
    """Run a recipe as a job of a Ray cluster. This code, the recipe and its tables travel; photographs, weights and secrets do not."""
    from linearsr_platform import storage
    from linearsr_platform.cli.environment import quiet_libraries
    from linearsr_platform.recipe.load import load_recipe
    from linearsr_platform.recipe.portable import RECIPE_FILE, write_portable

    quiet_libraries(verbose=verbose)
    loaded = load_recipe(recipe, profile, overrides or [])
    stage = known_stage(redo_from, SEARCH_STAGE_NAMES if search else STAGE_NAMES)
    kind = "search" if search else "run"
    if search and loaded.recipe.search is None:
        raise UserError(f"--search: got {recipe} without a section `search`; expected a recipe of a search; fix: leave --search out")
    variables = _variables(env or [])
    with tempfile.TemporaryDirectory(prefix="linearsr-submit-") as folder:
        write_portable(loaded, Path(folder), address=IN_A_JOB)
        from linearsr_platform.cluster.jobs import Submission, default_python

        client = _connect(address, token_file, verbose=verbose)
        job = client.submit(
            Submission(
                folder=Path(folder),
                command=[kind, RECIPE_FILE, *(["--from", stage] if stage else []), *(["--update"] if update else [])],
                run=storage.join(loaded.recipe.storage, loaded.recipe.name),
                kind=kind,
                name=loaded.recipe.name,
                recipe_hash=loaded.hash,
                user=account_name(),
                python=python or default_python(address),
                env=variables,
            )
        )
    typer.echo(f"submitted {job.id}")
    if follow:
        _follow(client, job)
        return
    for what, command in (
        ("watch it", f"linearsr logs {job.id} -f"),
        ("its state", f"linearsr status {job.id}"),
        ("end it", f"linearsr stop {job.id}"),
    ):
        typer.echo(f"{what:<10} {command} --address {address}")


def status(
    job: JobName,
    address: Address,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    token_file: TokenFile = None,
    verbose: Verbose = False,
) -> None:
    """Show the state of a job."""
    found = _quietly(address, token_file, verbose).find(job)
    if as_json:
        typer.echo(json.dumps(asdict(found), indent=2))
        return
    rows = {
        "job": found.id,
        "run": found.run,
        "state": found.state,
        "by": found.user,
        "started": _time(found.started_s),
        "ended": _time(found.ended_s),
        "exit code": "" if found.exit_code is None else str(found.exit_code),
        "says": found.message.strip().splitlines()[-1] if found.message.strip() else "",
    }
    for name, value in rows.items():
        if value:
            typer.echo(f"{name:<10} {value}")


def logs(
    job: JobName,
    address: Address,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on until the job ends; Ctrl-C leaves it running.")] = False,
    tail: Annotated[int | None, typer.Option(min=1, help="Only the last lines.", show_default="all")] = None,
    token_file: TokenFile = None,
    verbose: Verbose = False,
) -> None:
    """Show what a job has printed."""
    client = _quietly(address, token_file, verbose)
    found = client.find(job)
    if follow:
        _follow(client, found)
        return
    lines = client.logs(found).splitlines()
    typer.echo("\n".join(lines if tail is None else lines[-tail:]))


def stop(
    job: JobName,
    address: Address,
    wait_s: Annotated[float, typer.Option("--wait", min=0, help="Seconds to wait for its end.")] = 60.0,
    token_file: TokenFile = None,
    verbose: Verbose = False,
) -> None:
    """End a job. Submitted again, it goes on from its last checkpoints."""
    client = _quietly(address, token_file, verbose)
    found = client.find(job)
    if found.ended:
        typer.echo(f"{found.id} is over already: {found.state}")
        return
    now = client.stop(found, wait_s=wait_s)
    if not now.ended:
        raise StageError(f"{now.id}: still {now.state} after {wait_s:g} s; fix: `linearsr status {now.id}` later, or a longer --wait")
    typer.echo(f"{now.id} is over: {now.state}; to go on, submit the recipe again")


def list_jobs(
    address: Address,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    token_file: TokenFile = None,
    verbose: Verbose = False,
) -> None:
    """List the jobs of a cluster that were submitted by this program, the latest last."""
    from rich.console import Console
    from rich.table import Column, Table

    jobs = _quietly(address, token_file, verbose).jobs()
    if as_json:
        typer.echo(json.dumps([asdict(job) for job in jobs], indent=2))
        return
    table = Table(Column("job", overflow="fold"), "state", "by", Column("started", no_wrap=True), "took", box=None, pad_edge=False)
    for job in jobs:
        started = _time(job.started_s)[:16]
        table.add_row(job.id, job.state, job.user, started, _duration(job))
    Console().print(table if jobs else "no jobs")


def _follow(client: "JobClient", job: "Job") -> None:
    """Print a job's log to its end; fails if the job does."""
    try:
        for piece in client.follow(job, tell=lambda text: typer.echo(text, err=True)):
            typer.echo(piece, nl=False)
    except KeyboardInterrupt:
        typer.echo(
            f"\ndetached, {job.id} goes on; `linearsr logs {job.id} -f` watches it again, `linearsr stop {job.id}` ends it", err=True
        )
        return
    over = client.find(job.id)
    if over.state != "SUCCEEDED":
        last = over.message.strip().splitlines()[-1:] or [f"exit code {over.exit_code}"]
        raise StageError(f"{over.id}: {over.state}: {last[0]}; submitted again, it goes on where it was")
    typer.echo(f"{over.id}: {over.state}")


def _quietly(address: str, token_file: str | None, verbose: bool) -> "JobClient":
    from linearsr_platform.cli.environment import quiet_libraries

    quiet_libraries(verbose=verbose)
    return _connect(address, token_file, verbose=verbose)


def _connect(address: str, token_file: str | None, *, verbose: bool) -> "JobClient":
    from linearsr_platform.cluster.jobs import JobClient

    # Ray's modules set the levels of their own loggers when they are imported.
    for name in RAY_LOGGERS:
        logging.getLogger(name).setLevel(logging.INFO if verbose else logging.ERROR)
    return JobClient(address, token=_token(token_file))


def _token(token_file: str | None) -> str | None:
    """Return the token that Ray itself would take, or that of the file; None if there is none."""
    if token_file is None and os.environ.get("RAY_AUTH_TOKEN"):
        return os.environ["RAY_AUTH_TOKEN"].strip()
    named = token_file or os.environ.get("RAY_AUTH_TOKEN_PATH")
    file = Path(named).expanduser() if named else Path.home() / ".ray" / "auth_token"
    if not file.is_file():
        if token_file is not None:
            raise UserError(f"--token-file: got {token_file!r}; expected a file with the token of the cluster")
        return None
    try:
        return file.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        where = "--token-file" if token_file is not None else "token of the cluster"
        raise UserError(
            f"{where}: got {str(file)!r}, whose bytes are not UTF-8; expected the token of the cluster; fix: check the path"
        ) from error


def _variables(assignments: list[str]) -> dict[str, str]:
    """Read `NAME=VALUE` texts."""
    variables = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name.isidentifier():
            raise UserError(f"--env: got {assignment!r}; expected NAME=VALUE")
        if LOOKS_SECRET.search(name):
            raise UserError(
                f"--env: got {name}, whose value everybody with access to the cluster could read; expected no secrets; "
                f"fix: --set cluster.secrets.{name}=env:{name} for a variable that the nodes have, or =file:/PATH"
            )
        variables[name] = value
    return variables


def _time(seconds: float | None) -> str:
    return "" if seconds is None else datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M:%S")


def _duration(job: "Job") -> str:
    if job.started_s is None:
        return ""
    seconds = (job.ended_s or datetime.now().timestamp()) - job.started_s
    return f"{int(seconds // 3600)}:{int(seconds % 3600 // 60):02d}:{int(seconds % 60):02d}"
