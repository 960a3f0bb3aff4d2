"""The compose files, the launcher's files and monitoring: valid, shut, pinned, and about things that exist."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib.resources import files as package_files
from pathlib import Path
from typing import Any

import jsonschema
import promql_parser
import pytest
import yaml
from moto.server import ThreadedMotoServer
from ray.autoscaler._private.resource_demand_scheduler import _fits
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts import scripts

from linearsr_platform.cluster.capacity import share_of_worker
from linearsr_platform.cluster.gauges import METRICS
from linearsr_platform.recipe.load import load_recipe
from linearsr_platform.stages.activations import worker_bytes

COMPOSE = ["mlflow", "monitoring"]
DRIVER = 580
"""Oldest driver for CUDA 13, which the wheel of torch on PyPI is built with. Source: CUDA's release notes."""
LAUNCHER = ["aws", "gcp", "onpremise"]
METRIC = re.compile(r"\b(?:ray_\w+|up)\b(?=\{|\)|\[| |$)")
OURS = {spec.exposed(name): {"run", "job", *spec.labels} for name, spec in METRICS.items()}
Document = dict[str, Any]


def _load(path: Path) -> Any:
    return yaml.safe_load(path.read_text())


@pytest.fixture(scope="module")
def dashboards(root: Path) -> dict[str, Document]:
    return {path.stem: json.loads(path.read_text()) for path in sorted((root / "infra/monitoring/grafana/dashboards").glob("*.json"))}


@pytest.fixture(scope="module")
def rules(root: Path) -> list[Document]:
    groups = _load(root / "infra/monitoring/rules/linearsr.yaml")["groups"]
    return [rule for group in groups for rule in group["rules"]]


@pytest.fixture(scope="module")
def metrics_of_ray() -> set[str]:
    """Names in the dashboards that Ray itself generates."""
    folder = package_files("ray.dashboard.modules.metrics.dashboards")
    texts = [file.read_text() for file in folder.iterdir() if file.name.endswith("_panels.py")]
    return {name for text in texts for name in re.findall(r"\bray_\w+", text)}


def _expressions(dashboards: dict[str, Document], rules: list[Document]) -> Iterator[tuple[str, str]]:
    for name, dashboard in dashboards.items():
        for panel in dashboard["panels"]:
            for target in panel["targets"]:
                yield f"{name}: {panel['title']}", target["expr"]
    for rule in rules:
        yield rule["alert"], rule["expr"]


@pytest.mark.parametrize("name", COMPOSE)
def test_a_compose_file_fits_the_specification(root: Path, name: str) -> None:
    schema = json.loads(package_files("check_jsonschema").joinpath("builtin_schemas/vendor/compose-spec.json").read_text())
    compose = _load(root / f"infra/{name}/compose.yaml")
    jsonschema.Draft202012Validator(schema).validate(compose)
    compose["services"]["broken"] = {"imag": "x"}
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.Draft202012Validator(schema).validate(compose)


@pytest.mark.parametrize("name", COMPOSE)
def test_services_are_pinned_checked_and_open_to_this_machine_alone(root: Path, name: str) -> None:
    pins = dict(re.findall(r"^([\w-]+)==(.+)$", (root / "infra/images/constraints.txt").read_text(), re.MULTILINE))
    compose = _load(root / f"infra/{name}/compose.yaml")
    for title, service in compose["services"].items():
        tag = service["image"].rpartition(":")[2]
        assert re.match(r"v?\d+\.\d+", tag), title
        if "linearsr-mlflow" in service["image"]:
            assert tag == pins["mlflow"]
        else:
            assert service["healthcheck"]["test"], title
        assert [port for port in service.get("ports", []) if not port.startswith("${BIND:-127.0.0.1}:")] == [], title
        for mount in service.get("volumes", []):
            source = mount.partition(":")[0]
            assert source in compose["volumes"] or source == "/tmp/ray" or (root / f"infra/{name}" / source).exists(), mount
        for other in service.get("depends_on", {}):
            assert other in compose["services"]


def test_the_example_of_an_environment_has_every_variable_that_must_be_set(root: Path) -> None:
    wanted = set(re.findall(r"\$\{(\w+):\?", (root / "infra/mlflow/compose.yaml").read_text()))
    example = dict(re.findall(r"^(\w+)=(.*)$", (root / "infra/mlflow/example.env").read_text(), re.MULTILINE))
    assert wanted == example.keys()
    assert {value for key, value in example.items() if re.search("PASSWORD|SECRET", key)} == {"REPLACE_ME"}


@pytest.mark.parametrize("name", LAUNCHER)
def test_a_launcher_file_passes_rays_own_check(root: Path, name: str) -> None:
    config = _load(root / f"infra/launcher/{name}.yaml")
    prepared = prepare_config(config)
    validate_config(prepared)
    assert prepared["max_workers"] == 4
    with pytest.raises(jsonschema.ValidationError, match="max_worker"):
        validate_config({**prepared, "max_worker": 4})


def test_googles_machines_say_their_memory_which_trainers_reserve_and_ray_does_not_look_up(root: Path) -> None:
    recipe = load_recipe(str(root / "pipelines/quickstart.yaml"), overrides=["cluster.gpus_per_worker=1", "cluster.num_gpus=1"]).recipe
    share = share_of_worker(recipe.cluster, memory_bytes=max(worker_bytes(recipe, recipe.pretrain).values()))
    machine = _load(root / "infra/launcher/gcp.yaml")["available_node_types"]["gpu"]["resources"]
    assert share.resources["memory"] > 1e9
    assert _fits(machine, share.resources)
    assert not _fits({name: amount for name, amount in machine.items() if name != "memory"}, share.resources)


@pytest.mark.parametrize("name", LAUNCHER)
def test_commands_of_a_launcher_file_are_rays_and_keep_authentication_on(root: Path, name: str) -> None:
    config = _load(root / f"infra/launcher/{name}.yaml")
    start = scripts.cli.commands["start"]
    for key, flag in (("head_start_ray_commands", "--head"), ("worker_start_ray_commands", "--address=$RAY_HEAD_IP:6379")):
        words = config[key][1].partition("ray start ")[2].split()
        assert flag in words
        context = start.make_context("start", [], resilient_parsing=True)
        context.resilient_parsing = False
        _, rest, _ = start.make_parser(context).parse_args(words)
        assert rest == []
    assert any("RAY_AUTH_MODE=token" in command for command in config["setup_commands"])
    assert "~/.ray/auth_token" in config["file_mounts"]
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][1]


@pytest.mark.parametrize("name", LAUNCHER)
def test_a_second_launch_installs_the_newest_wheel_even_over_the_same_version(root: Path, tmp_path: Path, name: str) -> None:
    pip = tmp_path / "venv/bin/pip"
    pip.parent.mkdir(parents=True)
    pip.write_text('#!/bin/sh\nfor word; do printf "%s " "$word"; done\necho\n')
    pip.chmod(0o755)
    for modified_s, version in ((2, "0.2.0"), (1, "0.10.0")):
        wheel = tmp_path / f"linearsr-wheel/linearsr-{version}-py3-none-any.whl"
        wheel.parent.mkdir(exist_ok=True)
        wheel.touch()
        os.utime(wheel, (modified_s, modified_s))
    commands = [one for one in _load(root / f"infra/launcher/{name}.yaml")["setup_commands"] if "/pip install" in one]
    environment = {"HOME": str(tmp_path), "PATH": os.environ["PATH"]}
    done = subprocess.run(["bash", "-c", " && ".join(commands)], check=True, capture_output=True, text=True, env=environment)
    wheels = [[word for word in line.split() if ".whl" in word] for line in done.stdout.splitlines()]
    assert {found.partition("[")[0] for (found,) in wheels} == {f"{tmp_path}/linearsr-wheel/linearsr-0.2.0-py3-none-any.whl"}
    assert any("--force-reinstall --no-deps" in " ".join(sorted(line.split())) for line in done.stdout.splitlines())
    assert any("[platform," in line for line in done.stdout.splitlines())


@pytest.mark.parametrize("name", ["aws", "gcp"])
def test_nodes_of_a_cloud_hold_workers_of_the_cluster_profile(root: Path, name: str) -> None:
    recipe = load_recipe(str(root / "pipelines/quickstart.yaml"), str(root / "pipelines/profiles/cluster.yaml")).recipe
    gpu = _load(root / f"infra/launcher/{name}.yaml")["available_node_types"]["gpu"]
    cpus = max(recipe.cluster.cpus_per_worker, recipe.experts.cpus_per_worker or 0)
    workers = min(gpu["resources"]["CPU"] // cpus, gpu["resources"]["GPU"] // recipe.cluster.gpus_per_worker) * gpu["max_workers"]
    assert workers >= (len(recipe.experts.resolved_boundaries) + 1) * recipe.experts.train.workers


def test_the_head_on_aws_has_a_role_of_its_own_that_may_pass_on_the_workers(root: Path) -> None:
    kinds = _load(root / "infra/launcher/aws.yaml")["available_node_types"]
    profiles = {name: kind["node_config"]["IamInstanceProfile"]["Name"] for name, kind in kinds.items()}
    assert len(set(profiles.values())) == len(kinds), "Ray's own role for a head may not pass on a worker's"


def test_nodes_on_google_reach_their_bucket_and_have_the_driver_that_torch_needs(root: Path) -> None:
    config = _load(root / "infra/launcher/gcp.yaml")
    kinds = config["available_node_types"]
    # The head's account is made by Ray; a worker without one has no credentials.
    (account,) = kinds["gpu"]["node_config"]["serviceAccounts"]
    assert account["scopes"] == ["https://www.googleapis.com/auth/cloud-platform"]
    assert any("/pip install" in command and "gcsfs" in command.split() for command in config["setup_commands"])
    for kind in kinds.values():
        (disk,) = kind["node_config"]["disks"]
        driver = re.search(r"-nvidia-(\d+)$", disk["initializeParams"]["sourceImage"])
        assert driver is not None
        assert int(driver[1]) >= DRIVER


def test_every_expression_parses_and_names_metrics_that_exist(
    dashboards: dict[str, Document], rules: list[Document], metrics_of_ray: set[str], subtests: pytest.Subtests
) -> None:
    for where, expression in _expressions(dashboards, rules):
        with subtests.test(where):
            promql_parser.parse(expression)
            names = set(METRIC.findall(re.sub(r'"[^"]*"|\b(?:by|on|without) \([^)]*\)', "", expression)))
            assert names
            assert names <= OURS.keys() | metrics_of_ray | {"up"}
            ours = names & OURS.keys()
            labels = set(re.findall(r"(\w+)(?:=~?|!=)\"", expression)) | set(
                re.split(r"\W+", " ".join(re.findall(r"by \(([^)]*)\)", expression)))
            )
            if ours:
                assert labels - {""} <= set.union(*(OURS[name] for name in ours))


def test_every_metric_of_ours_is_on_a_dashboard(dashboards: dict[str, Document]) -> None:
    shown = {name for _, expression in _expressions(dashboards, []) for name in METRIC.findall(expression)}
    assert OURS.keys() - shown == set()


def test_rules_say_whom_and_what_they_mean(rules: list[Document]) -> None:
    assert {"GuardTripped", "DataStall", "NoProgress"} <= {rule["alert"] for rule in rules}
    for rule in rules:
        assert rule.keys() <= {"alert", "expr", "for", "labels", "annotations"}
        assert rule["labels"]["severity"] in {"info", "warning", "critical"}
        assert rule["annotations"].keys() == {"summary", "description"}
        assert re.fullmatch(r"\d+[smh]", rule.get("for", "0s"))


def test_dashboards_take_their_source_from_a_variable_and_panels_do_not_overlap(dashboards: dict[str, Document]) -> None:
    assert dashboards.keys() == {"cluster", "training"}
    for dashboard in dashboards.values():
        variables = {one["name"]: one for one in dashboard["templating"]["list"]}
        assert variables["datasource"]["type"] == "datasource"
        used = set(re.findall(r"\$\{?(\w+)", json.dumps([dashboard["panels"], dashboard["templating"]]))) - {"__all"}
        assert used == variables.keys()
        identities = [panel["id"] for panel in dashboard["panels"]]
        assert len(set(identities)) == len(identities)
        taken = set()
        for panel in dashboard["panels"]:
            assert panel["datasource"]["uid"] == "${datasource}"
            grid = panel["gridPos"]
            cells = {(x, y) for x in range(grid["x"], grid["x"] + grid["w"]) for y in range(grid["y"], grid["y"] + grid["h"])}
            assert max(x for x, _ in cells) < 24
            assert cells & taken == set(), panel["title"]
            taken |= cells


def test_the_bucket_is_made_where_it_is_missing_and_left_alone_where_it_is(root: Path) -> None:
    pod = next(one for one in yaml.safe_load_all((root / "infra/mlflow/kubernetes/mlflow.yaml").read_text()) if one["kind"] == "Deployment")
    (init,) = pod["spec"]["template"]["spec"]["initContainers"]
    command = _load(root / "infra/mlflow/compose.yaml")["services"]["bucket"]["command"]
    assert command == init["command"]
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    try:
        host, port = server.get_host_and_port()
        keys = {"AWS_ACCESS_KEY_ID": "none", "AWS_SECRET_ACCESS_KEY": "none", "AWS_DEFAULT_REGION": "us-east-1"}
        for _ in range(2):
            subprocess.run(
                [sys.executable, *command[1:]], check=True, env={**os.environ, **keys, "AWS_ENDPOINT_URL": f"http://{host}:{port}"}
            )
    finally:
        server.stop()


def test_prometheus_scrapes_what_ray_writes_and_reads_the_rules(root: Path) -> None:
    folder = root / "infra/monitoring"
    machine, cluster = _load(folder / "prometheus.yml"), _load(folder / "prometheus-kubernetes.yml")
    template = package_files("ray.dashboard.modules.metrics").joinpath("export/prometheus/prometheus.yml").read_text()
    (path,) = machine["scrape_configs"][0]["file_sd_configs"][0]["files"]
    assert path in template
    for config in (machine, cluster):
        assert config["scrape_configs"][0]["job_name"] == "ray"
        assert config["scrape_configs"][0]["honor_labels"] is True, "or Prometheus calls the trainers' label `job` `exported_job`"
        (pattern,) = config["rule_files"]
        assert list(folder.glob(pattern))
    ports = re.findall(r"name: metrics, containerPort: (\d+)", (root / "infra/kuberay/raycluster.yaml").read_text())
    assert ports == ["8080"] * 3
    policy = (root / "infra/kuberay/network-policy.yaml").read_text()
    assert "port: 8080" in policy
