"""A cluster on this machine with a real autoscaler, which starts nodes of one CPU as they are asked for and ends idle ones."""

import json
import os
import secrets
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
from ports import free_ports
from ray.autoscaler._private.fake_multi_node.node_provider import FakeMultiNodeProvider

HEAD_ID = "f" * 51 + "00000"
"""How Ray's provider of nodes on this machine calls the head."""
IDLE_S = 12.0


class NodesHere(FakeMultiNodeProvider):
    """Starts nodes as processes of this machine. Their memory is what an autoscaler counts with, and Ray's provider would refuse it."""

    def _create_node_with_resources_and_labels(self, node_config, tags, count, resources, labels):
        here = {name: amount for name, amount in resources.items() if name != "memory"}
        super()._create_node_with_resources_and_labels(node_config, tags, count, here, labels)


def _autoscaling(address: str, nodes: int) -> dict[str, object]:
    """Return what the autoscaler is started with: a head without CPUs, and nodes of one that come and go."""
    small = {"CPU": 1, "memory": 8 * 10**9, "object_store_memory": 80 * 2**20}
    provider = {
        # What Ray calls `fake_multinode` needs a file that its package leaves out.
        "type": "external",
        "module": f"{__name__}.{NodesHere.__name__}",
        "gcs_address": address,
        "head_node_id": HEAD_ID,
        "launch_multiple": True,
        "disable_node_updaters": True,
    }
    commands = ("initialization", "setup", "head_setup", "worker_setup", "head_start_ray", "worker_start_ray")
    return {
        "cluster_name": "growing",
        "max_workers": nodes,
        "upscaling_speed": 100.0,
        "idle_timeout_minutes": IDLE_S / 60,
        "provider": provider,
        "head_node_type": "ray.head.default",
        "available_node_types": {
            "ray.head.default": {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0},
            "small": {"resources": small, "node_config": {}, "min_workers": 0, "max_workers": nodes},
        },
        **{name: {} for name in ("auth", "docker", "file_mounts")},
        **{f"{name}_commands": [] for name in commands},
        "cluster_synced_files": [],
    }


@contextmanager
def growing_cluster(nodes: int) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield a cluster's address and the environment of a process that may join it and import what is beside this file.

    The autoscaler is Ray's second, which KubeRay runs.

    Args:
        nodes: at most, beside the head.
    """
    port, dashboard, client, agent, metrics = free_ports(5)
    address = f"127.0.0.1:{port}"
    path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep)
    joining = {**os.environ, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "PYTHONPATH": path}
    heading = {**joining, "RAY_USAGE_STATS_ENABLED": "0", "RAY_FAKE_CLUSTER": "1", "AUTOSCALER_UPDATE_INTERVAL_S": "1"}
    heading |= {"RAY_enable_autoscaler_v2": "1", "RAY_CLOUD_INSTANCE_ID": HEAD_ID, "RAY_OVERRIDE_NODE_ID_FOR_TESTING": HEAD_ID}
    # In /tmp itself: Ray puts sockets below it, whose path has little room.
    with tempfile.TemporaryDirectory(prefix="lsr-", dir="/tmp", ignore_cleanup_errors=True) as folder:
        config = Path(folder, "autoscaling.json")
        config.write_text(json.dumps(_autoscaling(address, nodes)))
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--num-cpus=0", "--node-ip-address=127.0.0.1"]
        command += [f"--port={port}", f"--dashboard-port={dashboard}", f"--ray-client-server-port={client}", f"--temp-dir={folder}"]
        command += [f"--dashboard-agent-listen-port={agent}", f"--metrics-export-port={metrics}", "--object-store-memory=100000000"]
        command += [f"--autoscaling-config={config}", "--min-worker-port=0", "--max-worker-port=0"]
        with Path(folder, "head.log").open("w") as log:
            process = subprocess.Popen(command, env=heading, stdout=log, stderr=log)
        try:
            yield address, joining
        finally:
            # Nodes are processes of the autoscaler, which is one of the head's. Asked to end they take half a minute.
            children = psutil.Process(process.pid).children(recursive=True)
            for one in (process, *children):
                one.kill()
            process.wait()
            psutil.wait_procs(children, timeout=20)
