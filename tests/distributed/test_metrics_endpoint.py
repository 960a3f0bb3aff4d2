"""What a worker shows reaches the metrics endpoint of Ray's agent under the names that infra/monitoring uses."""

import time
from pathlib import Path
from urllib.request import urlopen

import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from linearsr_platform.cluster.gauges import METRICS

pytestmark = pytest.mark.ray
DEADLINE_S = 60.0


def _scrape(run: str) -> dict[str, list[tuple[dict[str, str], float]]]:
    (node,) = ray.nodes()
    # Ray's agent listens on the node's own address.
    with urlopen(f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics", timeout=10) as answer:
        text = answer.read().decode()
    # The cluster is shared: values of trainers before stay for some seconds under the same names.
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(text):
        for sample in (sample for sample in family.samples if sample.labels.get("run") == run):
            found.setdefault(sample.name, []).append((sample.labels, sample.value))
    return found


def test_every_declared_metric_is_scraped_with_its_labels_and_value(cluster, tmp_path: Path) -> None:
    from metered_toy import MeteredToy

    worker = ray.remote(num_cpus=0)(MeteredToy).remote("run-1", "expert-1")
    told, values, state = ray.get(worker.train.remote())
    assert told == [("start", 5), ("metrics", 20), ("validation", 20), ("trip", 20), ("checkpoint", 20)]
    assert (values, state) == ([0.0, 1.0, 50.0], {"at": 7})

    wanted = {spec.exposed(name) for name, spec in METRICS.items()}
    end = time.monotonic() + DEADLINE_S
    while not wanted <= (found := _scrape("run-1")).keys() and time.monotonic() < end:
        time.sleep(1.0)
    assert wanted - found.keys() == set()

    def value(name: str, **labels: str) -> float:
        (one,) = [value for have, value in found[name] if {"job": "expert-1", **labels}.items() <= have.items()]
        return one

    assert value("ray_linearsr_train_step") == 20
    assert value("ray_linearsr_train_loss") == 0.5
    assert value("ray_linearsr_train_samples_per_second") == 12.5
    assert value("ray_linearsr_validation", metric="psnr_y") == 28.0
    assert {state: value("ray_linearsr_knee_state", state=state) for state in ("improving", "plateau", "confirmed", "diverging")} == {
        "improving": 0,
        "plateau": 1,
        "confirmed": 0,
        "diverging": 0,
    }
    assert value("ray_linearsr_knee_step") == 10
    assert value("ray_linearsr_guard_trips") == 1
    assert value("ray_linearsr_checkpoint_step") == 20
    assert value("ray_linearsr_data_wait_seconds_total", rank="0") == pytest.approx(3.0)
    ray.kill(worker)
