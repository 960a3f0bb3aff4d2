"""Whether all machines of a cluster see the same files."""

import socket
import time
from collections.abc import Callable
from pathlib import Path
from uuid import uuid4

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from linearsr_platform import storage
from linearsr_platform.cluster.record import is_claimed
from linearsr_platform.errors import UserError
from linearsr_platform.recipe.schema import Recipe
from linearsr_platform.train.job import TrainJob

ANSWER_S = 60.0
"""How long machines get to say whether they see a file, s. Most of it is the start of a process; who is silent passes."""
APPEAR_S = 5.0
"""How long a file may take to appear on a shared disk, s."""
POLL_S = 0.2


def require_shared_files(recipe: Recipe) -> None:
    """Refuse a storage root, or weights, that are files of this machine alone, where workers would look for them in vain.

    They have to be at the same path everywhere. Asked are the machines that the cluster has now and that workers can run on; for those
    that come later, and to a cluster that grows from nothing all do, see `require_own_folder`.

    Args:
        recipe: complete; what it names in a store is not looked at.

    Raises:
        UserError: naming the setting and the machines that do not see what it names.
    """
    here = ray.get_runtime_context().get_node_id()
    nodes: list[dict[str, object]] = ray.nodes()  # type: ignore[no-untyped-call]
    others = [node for node in nodes if node["Alive"] and node["NodeID"] != here and _runs_workers(node)]
    if not others:
        return
    weights, root = _weights(recipe), storage.absolute(recipe.storage)
    probe = storage.join(root, f"seen-test-{uuid4().hex}") if storage.is_local(root) else None
    if probe is not None:
        storage.write_bytes(probe, b"")
    try:
        answers = _ask(others, [*weights.values(), *([] if probe is None else [probe])])
    finally:
        if probe is not None:
            storage.remove(probe)
    named = {**({} if probe is None else {"storage": (root, probe)}), **{key: (path, path) for key, path in weights.items()}}
    for key, (shown, path) in named.items():
        blind = sorted(_name(node) for node, unseen in zip(others, answers, strict=True) if path in unseen)
        if blind:
            raise _not_shared(key, shown, ", ".join(blind))


def require_own_folder(job: TrainJob) -> None:
    """Refuse, in a worker, to train a job whose folder was claimed where this machine does not see it.

    Raises:
        UserError: naming folder and machine.
    """
    if storage.is_local(job.output_url) and not _appears(lambda: is_claimed(job)):
        raise _not_shared("storage", job.output_url, f"{socket.gethostname()} ({ray.util.get_node_ip_address()})")  # type: ignore[no-untyped-call]


def _not_shared(key: str, shown: str, blind: str) -> UserError:
    other = "a store: --set storage=s3://BUCKET/..." if key == "storage" else "a copy there"
    return UserError(
        f"{key}: got {shown!r}, which {blind} of the cluster cannot see; expected a place that every machine sees; "
        f"fix: a disk that all mount at this path, or {other}"
    )


def _weights(recipe: Recipe) -> dict[str, str]:
    """Return files of this machine that workers read too, by the setting that names them."""
    named = {
        "model.init_weights": recipe.model.init_weights,
        "model.codec.source": recipe.model.codec.source,
        "validation.weights": recipe.validation.weights,
    }
    found = {key: storage.absolute(path) for key, path in named.items() if path is not None and storage.is_local(path)}
    # A codec's source may be the id of a hub, and what is missing here too is told by who needs it.
    return {key: path for key, path in found.items() if Path(path).exists()}


def _runs_workers(node: dict[str, object]) -> bool:
    resources = node["Resources"]
    assert isinstance(resources, dict)  # noqa: S101 (Ray's own table)
    return any(resources.get(kind, 0.0) > 0 for kind in ("CPU", "GPU"))


def _name(node: dict[str, object]) -> str:
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"


def _ask(nodes: list[dict[str, object]], paths: list[str]) -> list[list[str]]:
    """Return of each machine the paths that it does not see; one that is lost meanwhile, or does not answer, counts as one that does."""
    if not paths:
        return [[] for _ in nodes]
    look = ray.remote(num_cpus=0, max_retries=0)(_unseen)
    places = [NodeAffinitySchedulingStrategy(str(node["NodeID"]), soft=False) for node in nodes]
    asked = [look.options(scheduling_strategy=place).remote(paths) for place in places]
    answered, _ = ray.wait(asked, num_returns=len(asked), timeout=ANSWER_S)
    return [_answer(reference) if reference in answered else [] for reference in asked]


def _answer(reference: "ray.ObjectRef[list[str]]") -> list[str]:
    try:
        return ray.get(reference)
    except RayError:
        return []


def _unseen(paths: list[str]) -> list[str]:
    """Run in a worker."""
    _appears(lambda: all(Path(path).exists() for path in paths))
    return [path for path in paths if not Path(path).exists()]


def _appears(seen: Callable[[], bool]) -> bool:
    """Tell whether something comes to be seen within `APPEAR_S`."""
    end = time.monotonic() + APPEAR_S
    while not seen():
        if time.monotonic() >= end:
            return False
        time.sleep(POLL_S)
    return True
