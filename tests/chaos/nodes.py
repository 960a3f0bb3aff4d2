"""A cluster of several nodes on this machine, which come and go while something runs on it."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray
from ports import free_port
from ray._private.authentication.authentication_token_setup import enable_token_auth_by_default
from ray.cluster_utils import Cluster
from ray.util.placement_group import PlacementGroup, placement_group, placement_group_table, remove_placement_group
from three_stages import CPUS_PER_WORKER

from linearsr_platform.cluster import session
from linearsr_platform.recipe.schema import ClusterConfig

WORKERS_PER_NODE = 3
NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
TOY = Path(__file__).parents[1] / "distributed" / "toy"


class Nodes:
    """What a test does with nodes. Only the main thread may, because Ray listens to signals meanwhile."""

    def __init__(self, cluster: Cluster, config: ClusterConfig) -> None:
        self.cluster, self.config = cluster, config
        self._fillers: list[PlacementGroup] = []

    def add(self) -> None:
        """Add a node and wait until it is there."""
        self.cluster.add_node(**NODE)

    def lose(self, node: Any) -> str:
        """Kill all processes of a node as a power cut would, and return its name."""
        name = str(node.node_id)
        self.cluster.remove_node(node, allow_graceful=False)
        return name

    def workers(self) -> list[Any]:
        """Return the nodes that trainers may be on."""
        return sorted(self.cluster.worker_nodes, key=lambda node: str(node.node_id))

    def fill(self, groups: int) -> None:
        """Take room for one worker from each of two nodes so many times.

        Ray puts both workers of a trainer on one node while it can; where only one has room on each, it cannot.
        """
        self._fillers = [placement_group([{"CPU": CPUS_PER_WORKER}] * 2, strategy="STRICT_SPREAD") for _ in range(groups)]
        assert all(group.wait(30) for group in self._fillers)

    def make_room(self) -> None:
        """Give back so much that one more trainer than there is has room."""
        placed = sum(group["state"] == "CREATED" for group in placement_group_table().values()) - len(self._fillers)
        while self._fillers and len(self._fillers) > WORKERS_PER_NODE - 1 - placed:
            remove_placement_group(self._fillers.pop())


def homes() -> dict[str, list[int]]:
    """Return of each node the processes of trainers' workers that live there."""
    from ray.util.state import list_actors

    address = ray.get_runtime_context().gcs_address
    found: dict[str, list[int]] = {}
    for actor in list_actors(address, filters=[("class_name", "=", "RayTrainWorker"), ("state", "=", "ALIVE")], detail=True):
        found.setdefault(actor.node_id, []).append(actor.pid)
    return found


@contextmanager
def several_nodes(count: int) -> Iterator[Nodes]:
    """Be connected to a cluster whose head runs no workers, with so many nodes beside it, each with one CPU."""
    config = ClusterConfig(num_cpus=count, cpus_per_worker=1.0, object_store_mb=100)
    before = dict(os.environ)
    os.environ["PYTHONPATH"] = os.pathsep.join([str(TOY), before.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    session._choose_token()
    enable_token_auth_by_default()
    # A process is on one cluster at a time; where tests before this one shared theirs, the tests after it start their own.
    ray.shutdown()
    folder = tempfile.TemporaryDirectory(prefix="linearsr-ray-", dir="/tmp", ignore_cleanup_errors=True)
    try:
        # Ray's cluster utility leaves the address of its head there.
        variables = {**session._local_variables(config, session.package_folders()), "RAY_TMPDIR": folder.name}
        with folder, session._environment(variables):
            Path(folder.name, "ray").mkdir()
            head = {**NODE, "num_cpus": 0, "include_dashboard": True, "dashboard_port": free_port(), "temp_dir": folder.name}
            cluster = Cluster(initialize_head=True, head_node_args=head)
            nodes = Nodes(cluster, config)
            try:
                for _ in range(count):
                    nodes.add()
                ray.init(address=cluster.address, log_to_driver=False, logging_level="ERROR")
                yield nodes
            finally:
                ray.shutdown()
                cluster.shutdown()
    finally:
        os.environ["PYTHONPATH"] = before.get("PYTHONPATH", "")
