"""Whether all machines of a cluster see the same folder."""

import time
from pathlib import Path
from uuid import uuid4

import ray
from ray.exceptions import RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from linearsr_platform import storage
from linearsr_platform.errors import UserError

ANSWER_S = 60.0
"""How long machines get to say whether they see a file, s. Most of it is the start of a process; who is silent passes."""
APPEAR_S = 5.0
"""How long a file may take to appear on a shared disk, s."""
POLL_S = 0.2


def require_shared_folder(url: str) -> None:
    """Refuse a storage root that is a folder of this machine alone, where workers would look for shards in vain.

    A folder has to be at the same path everywhere. Asked are the machines that the cluster has now and that workers can run on.

    Args:
        url: of the storage root; one of a store is not looked at.

    Raises:
        UserError: naming the machines that do not see it.
    """
    here = ray.get_runtime_context().get_node_id()
    nodes: list[dict[str, object]] = ray.nodes()  # type: ignore[no-untyped-call]
    others = [node for node in nodes if node["Alive"] and node["NodeID"] != here and _runs_workers(node)]
    if not others or not storage.is_local(url):
        return
    probe = storage.join(url, f"seen-test-{uuid4().hex}")
    storage.write_bytes(probe, b"")
    try:
        blind = [_name(node) for node, sees in zip(others, _ask(others, probe), strict=True) if not sees]
    finally:
        storage.remove(probe)
    if blind:
        raise UserError(
            f"storage: got {url!r}, a folder that {', '.join(sorted(blind))} of the cluster cannot see; expected a place that every "
            "machine sees; fix: a disk that all mount at this path, or a store: --set storage=s3://BUCKET/..."
        )


def _runs_workers(node: dict[str, object]) -> bool:
    resources = node["Resources"]
    assert isinstance(resources, dict)  # noqa: S101 (Ray's own table)
    return any(resources.get(kind, 0.0) > 0 for kind in ("CPU", "GPU"))


def _name(node: dict[str, object]) -> str:
    return f"{node['NodeManagerHostname']} ({node['NodeManagerAddress']})"


def _ask(nodes: list[dict[str, object]], path: str) -> list[bool]:
    """Return of each machine whether it sees a file; one that is lost meanwhile, or does not answer, counts as one that does."""
    look = ray.remote(num_cpus=0, max_retries=0)(_sees)
    asked = [
        look.options(scheduling_strategy=NodeAffinitySchedulingStrategy(str(node["NodeID"]), soft=False)).remote(path) for node in nodes
    ]
    answered, _ = ray.wait(asked, num_returns=len(asked), timeout=ANSWER_S)
    return [reference not in answered or _answer(reference) for reference in asked]


def _answer(reference: "ray.ObjectRef[bool]") -> bool:
    try:
        return bool(ray.get(reference))
    except RayError:
        return True


def _sees(path: str) -> bool:
    """Run in a worker."""
    end = time.monotonic() + APPEAR_S
    while not Path(path).exists():
        if time.monotonic() >= end:
            return False
        time.sleep(POLL_S)
    return True
