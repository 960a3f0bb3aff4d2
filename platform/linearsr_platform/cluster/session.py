"""Start a Ray cluster on this machine or join an existing one, and stop at the end what was started."""

import json
import logging
import os
import re
import secrets
import shutil
import socket
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import ray
from ray._private.ray_logging import stdout_deduplicator
from ray.exceptions import RayError

import linearsr
import linearsr_platform
from linearsr_platform.errors import UserError
from linearsr_platform.recipe.schema import ClusterConfig
from linearsr_platform.scratch import remove_abandoned

MIN_OBJECT_STORE_MB = 75
"""Ray refuses a smaller object store."""
MAX_TEMPORARY_ROOT = 20
"""Characters a folder for temporary files may have: Ray puts sockets below it, whose whole path may have 107."""
ALWAYS = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    # A worker that asked for no GPU does not see any; Ray by itself lets it see all.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
    # Threads of a worker that wait for each other sleep instead of spinning in other workers' time.
    "OMP_WAIT_POLICY": "PASSIVE",
    # Torch asks for huge pages for large tensors, see `linearsr_platform.cli.environment`.
    "THP_MEM_ALLOC_ENABLE": "1",
    # DeepSpeed refuses to start without it; Ray Train sets it anew in its workers, a lone process of another kind has nobody who does.
    "LOCAL_RANK": "0",
    # Without a workspace of its own cuBLAS may add in another order every time; `doctor resume` compares bits. Source: torch's notes on
    # randomness.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
    # Tune by itself prints what it is about to do and every error, writes results into three kinds of log, and swallows Ctrl-C.
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",
}
LOCAL_TRAIN = {
    # Ray Train's default of 2 s between polls is 2 s at the end of every trainer and at every checkpoint.
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # One process less a trainer (1.6 CPU seconds, 125 MB): a local cluster has no node that could be preempted.
    "RAY_TRAIN_ENABLE_PREEMPTION_WATCHER": "0",
}
LOCAL_RAY = {
    # Ray's log monitor looks for new files ten times a second while there are fewer than this many: 1.3 % of a core on a new cluster
    # instead of 0.4, and 4 % after many workers. Nobody waits for their lines.
    "RAY_LOG_MONITOR_MANY_FILES_THRESHOLD": "0",
    "LOG_NAME_UPDATE_INTERVAL_S": "2",
}
CONNECT_S = 10.0
REMOTE_TRAIN = {"RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
CHATTER = re.compile("worker processes have been started on node|A worker died or was killed while executing a task")
"""What Ray prints to the driver's standard output whatever its log level. Several trainers on a small machine are meant to be, and a
dead worker is restarted or reported."""
SHIPPED = "py_modules_files"
"""Folder on a node in which Ray unpacks packages that were shipped to it, each in a folder of its own."""
SECRETS = "LINEARSR_SECRETS"
"""Environment variable that brings references to secrets, as JSON, to the workers of a cluster."""
JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Environment variable in which Ray tells a job what it was submitted with."""
REFUSED = "InvalidAuthToken"
"""In what Ray says of a token that is missing or another than the cluster's."""
STRANGER = "No node info found"
"""In what Ray says to a process on a machine without a node of the cluster, after a minute."""
QUEUE_POLL_S = 10.0
"""How long Ray Train waits for room before it looks up: it does not react to anything meanwhile."""

CLEANER = 'cat; for pause in 3 5 120; do sleep "$pause"; rm -rf "$1"; done'
"""Shell script that deletes a folder once its standard input ends, which it does with the process that holds the other end. Ray's own
processes notice that after some seconds, two of them after up to two minutes, and write until then."""

logger = logging.getLogger(__name__)


@contextmanager
def cluster_session(config: ClusterConfig, *, verbose: bool = False) -> Iterator[None]:
    """Be connected to a Ray cluster inside the block.

    Without an address a cluster is started on this machine and stopped at the end; with one it is joined and left. If the
    process is connected already, that cluster is used and kept. Environment variables that the user has set are respected.

    Args:
        config: where, and how much of this machine.
        verbose: show Ray's logs and keep those of a local cluster.

    Raises:
        UserError: if the cluster cannot be reached or the two packages come from different places.
    """
    if ray.is_initialized():
        yield
        return
    remove_abandoned()
    folders = package_folders()
    skipped = stdout_deduplicator.skip_re
    stdout_deduplicator.skip_re = skipped if verbose else CHATTER
    try:
        if config.address is None:
            with _local_cluster(config, folders, verbose):
                yield
        else:
            with _existing_cluster(config.address, config, folders, verbose):
                yield
    finally:
        stdout_deduplicator.skip_re = skipped


def package_folders() -> tuple[Path, Path]:
    """Return where `linearsr` and `linearsr_platform` are imported from.

    Raises:
        UserError: if they belong to different installations; workers could then run other code than the driver.
    """
    method, machinery = Path(linearsr.__path__[0]).resolve(), Path(linearsr_platform.__path__[0]).resolve()
    shipped = method.parents[1].name == SHIPPED and method.parents[1] == machinery.parents[1]
    if not shipped and machinery.parent not in (method.parent, method.parent / "platform"):
        raise UserError(
            f"installation: got linearsr from {method} and linearsr_platform from {machinery}; expected one checkout or one "
            "installation; fix: install again (`pip install -e .`) or clear PYTHONPATH"
        )
    return method, machinery


@contextmanager
def _local_cluster(config: ClusterConfig, folders: tuple[Path, Path], verbose: bool) -> Iterator[None]:
    if config.object_store_mb < MIN_OBJECT_STORE_MB:
        raise UserError(
            f"cluster.object_store_mb: got {config.object_store_mb}; expected at least {MIN_OBJECT_STORE_MB}; "
            "fix: raise cluster.object_store_mb"
        )
    with _ray_folder(keep=verbose) as folder:
        _choose_token()
        with _environment(_local_variables(config, folders)):
            ray.init(
                address="local",
                num_cpus=config.num_cpus,
                num_gpus=config.num_gpus,
                object_store_memory=config.object_store_mb * 2**20,
                # With it comes Ray's State API, which says what runs on the cluster.
                include_dashboard=True,
                log_to_driver=verbose,
                logging_level=logging.INFO if verbose else logging.ERROR,
                _temp_dir=str(folder),
            )
            try:
                yield
            finally:
                ray.shutdown()


@contextmanager
def _ray_folder(*, keep: bool) -> Iterator[Path]:
    """Make a folder for what Ray writes, deleted at the end unless it is kept, and in any case if this process is killed."""
    folder = Path(tempfile.mkdtemp(prefix="linearsr-ray-", dir=_temporary_root()))
    command = ["/bin/sh", "-c", CLEANER, "sh", str(folder)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True) as cleaner:  # noqa: S603 (nothing in it is a user's)
        try:
            yield folder
        finally:
            cleaner.kill()
            if keep:
                logger.info("Ray's logs are kept in %s", folder)
            else:
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _existing_cluster(address: str, config: ClusterConfig, folders: tuple[Path, Path], verbose: bool) -> Iterator[None]:
    # Nodes may hold another version of the packages, or none: all workers get the driver's.
    variables = {**_accelerator(config), **_waiting(config), **REMOTE_TRAIN, **ALWAYS}
    runtime_env = _runtime_env({**variables, **_set_by_user(variables), SECRETS: json.dumps(config.secrets)}, folders)
    with _environment(variables):
        try:
            _require_listener(address)
            ray.init(
                address=address,
                runtime_env=runtime_env,
                log_to_driver=verbose,
                logging_level=logging.INFO if verbose else logging.ERROR,
            )
        except (OSError, ValueError, RuntimeError, RayError) as error:
            raise _not_connected(address, error) from error
        try:
            yield
        finally:
            ray.shutdown()


def _not_connected(address: str, error: Exception) -> UserError:
    """Say why a cluster cannot be joined. Of all causes Ray speaks as of an address where nobody is."""
    if REFUSED in str(error.__cause__):
        return UserError(
            f"cluster.address: got {address!r}, whose cluster refused the token of {socket.gethostname()}; expected the token that the "
            "cluster was started with; fix: export RAY_AUTH_MODE=token here, and put the token into ~/.ray/auth_token or RAY_AUTH_TOKEN"
        )
    if STRANGER in str(error.__cause__):
        return UserError(
            f"cluster.address: got {address!r}, a cluster that {socket.gethostname()} is no node of; expected the command on one of its "
            "nodes; fix: from here `linearsr submit RECIPE --address http://HOST:8265`, or make this machine a node with `ray start`"
        )
    return UserError(
        f"cluster.address: got {address!r}: {error}; expected the address of a running Ray cluster; "
        "fix: start it, or leave cluster.address out to start one here"
    )


def _runtime_env(variables: Mapping[str, str], folders: tuple[Path, Path]) -> dict[str, object]:
    """Return what workers get. A job's workers have what it was submitted with already, and Ray refuses to be told twice."""
    job: dict[str, Any] = json.loads(os.environ.get(JOB_CONFIG, "{}")).get("runtime_env") or {}
    new = {name: value for name, value in variables.items() if name not in job.get("env_vars", {})}
    shipped = {} if job.get("py_modules") else {"py_modules": [str(folder) for folder in folders]}
    return {**shipped, "env_vars": new, "worker_process_setup_hook": f"{__name__}.{bring_worker_secrets.__name__}"}


def bring_secrets(references: Mapping[str, str]) -> None:
    """Set environment variables to the secrets that they refer to, in this process.

    Args:
        references: variable to `env:NAME` or `file:PATH`, see `ClusterConfig.secrets`.

    Raises:
        UserError: if there is no such variable or file on this machine.
    """
    for name, reference in references.items():
        kind, _, where = reference.partition(":")
        if kind == "env" and where not in os.environ:
            raise UserError(f"cluster.secrets.{name}: got {reference!r}; expected a variable that is set on {socket.gethostname()}")
        try:
            value = os.environ[where] if kind == "env" else Path(where).read_text(encoding="utf-8").strip()
        except OSError as error:
            raise UserError(
                f"cluster.secrets.{name}: got {reference!r}; expected a file that can be read on {socket.gethostname()}: {error.strerror}"
            ) from error
        os.environ[name] = value


def bring_worker_secrets() -> None:
    """Do `bring_secrets` in a worker of a cluster; Ray calls it when the process starts."""
    bring_secrets(json.loads(os.environ.get(SECRETS, "{}")))


def meet_by(interface: str) -> None:
    """Make torch's gloo use a network interface in this process, unless the machine's own environment names one."""
    os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def _require_listener(address: str) -> None:
    """Raise at once where Ray would try for five minutes: for `host:port` and `ray://host:port` that nobody listens at.

    Raises:
        OSError: if no connection can be made.
        ValueError: if the port is not a number.
    """
    url = urlsplit(address if "://" in address else f"//{address}")
    if url.hostname is not None and url.port is not None:
        socket.create_connection((url.hostname, url.port), timeout=CONNECT_S).close()


def _local_variables(config: ClusterConfig, folders: tuple[Path, Path]) -> dict[str, str]:
    """Return the environment of a cluster on this machine; every process of it inherits the driver's."""
    variables = {**_accelerator(config), **_waiting(config), **LOCAL_TRAIN, **LOCAL_RAY, **ALWAYS}
    # Workers must import the very same tree, also where it is not installed. Site-packages come by themselves, and put here
    # they would go before the standard library.
    parents = dict.fromkeys(str(folder.parent) for folder in folders if str(folder.parent) != sysconfig.get_path("purelib"))
    before = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    paths = [path for path in dict.fromkeys([*parents, *before]) if path]
    return {**variables, **({"PYTHONPATH": os.pathsep.join(paths)} if paths else {})}


def _choose_token() -> None:
    """Make a token for local clusters, because Ray would write one into the user's home folder.

    Ray itself switches token authentication on for a new local cluster, and warns only if it is off. It reads the mode when it
    is imported, so setting RAY_AUTH_MODE here would have no effect, and the token once a process, so it outlives the session.
    """
    if not os.environ.get("RAY_AUTH_TOKEN_PATH"):
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def _accelerator(config: ClusterConfig) -> dict[str, str]:
    """Return what keeps DeepSpeed from looking for accelerators that this run does not use."""
    return {} if config.gpus_per_worker else {"DS_ACCELERATOR": "cpu"}


def _waiting(config: ClusterConfig) -> dict[str, str]:
    return {"RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": str(min(QUEUE_POLL_S, config.queue_timeout_s))}


def _set_by_user(names: Mapping[str, str]) -> dict[str, str]:
    return {name: os.environ[name] for name in names if name in os.environ}


@contextmanager
def _environment(variables: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables inside the block, those that the user has set excepted; `PYTHONPATH` holds the user's."""
    before = dict(os.environ)
    os.environ.update({**variables, **{name: value for name, value in _set_by_user(variables).items() if name != "PYTHONPATH"}})
    try:
        yield
    finally:
        for name in variables:
            os.environ.pop(name, None)
        os.environ.update({name: before[name] for name in variables if name in before})


def _temporary_root() -> str:
    root = tempfile.gettempdir()
    return root if len(root) <= MAX_TEMPORARY_ROOT else "/tmp"  # noqa: S108 (the shortest there is, and mkdtemp makes it safe)
