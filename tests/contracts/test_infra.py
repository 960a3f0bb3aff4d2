"""What is in infra/ for Kubernetes is valid, and says the same as the profile that the command line reads."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jsonschema
import kubernetes_validate
import pytest
import yaml

from linearsr_platform.recipe.load import load_recipe
from linearsr_platform.recipe.schema import Recipe

KUBERNETES = "1.34"
"""The oldest version that still got fixes when this was written."""
OTHERS = {"ray.io", "kueue.x-k8s.io", "kustomize.config.k8s.io"}
"""Groups of APIs whose schemas are not Kubernetes' own."""
UNITS = {"m": 1e-3, "": 1.0, "Mi": 2.0**20, "Gi": 2.0**30}
Document = dict[str, Any]


class _Loader(yaml.SafeLoader):
    """YAML in which a key comes once: the last of two would win in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"{node.start_mark}: a key comes twice"
        return super().construct_mapping(node, deep)


def _documents(path: Path) -> list[Any]:
    return [one for one in yaml.load_all(path.read_text(), _Loader) if one is not None]


@pytest.fixture(scope="module")
def infra(root: Path) -> dict[str, list[Any]]:
    """Documents of every YAML file below infra/, by path."""
    found = {str(path.relative_to(root)): _documents(path) for path in sorted((root / "infra").rglob("*.y*ml"))}
    assert len(found) > 20
    return found


@pytest.fixture(scope="module")
def objects(infra: dict[str, list[Any]]) -> list[Document]:
    """Every object for Kubernetes in them."""
    return [
        one
        for documents in infra.values()
        for one in documents
        if isinstance(one, dict) and {"apiVersion", "kind", "metadata"} <= one.keys()
    ]


@pytest.fixture(scope="module")
def recipe(root: Path) -> Recipe:
    """The quickstart as it runs under KubeRay."""
    return load_recipe(str(root / "pipelines/quickstart.yaml"), str(root / "pipelines/profiles/kuberay.yaml")).recipe


def _group(one: Document) -> str:
    return str(one["apiVersion"]).partition("/")[0]


def _one(objects: list[Document], kind: str, name: str) -> Document:
    (found,) = [one for one in objects if (one["kind"], one["metadata"]["name"]) == (kind, name)]
    return found


def _cluster(one: Document) -> Document:
    spec: Document = one["spec"]["rayClusterSpec"] if one["kind"] == "RayJob" else one["spec"]
    return spec


def _ray(objects: list[Document]) -> tuple[Document, Document]:
    return _one(objects, "RayCluster", "linearsr"), _one(objects, "RayJob", "linearsr-quickstart")


def _gpu_group(one: Document) -> Document:
    (group,) = [group for group in _cluster(one)["workerGroupSpecs"] if group["groupName"] == "gpu"]
    return group


def _pods(one: Any) -> Iterator[Document]:
    """Every pod template inside."""
    if isinstance(one, dict):
        if "containers" in one.get("spec", {}):
            yield one
        for value in one.values():
            yield from _pods(value)
    elif isinstance(one, list):
        for value in one:
            yield from _pods(value)


def _values(one: Any, key: str) -> Iterator[Any]:
    if isinstance(one, dict):
        for name, value in one.items():
            if name == key:
                yield value
            yield from _values(value, key)
    elif isinstance(one, list):
        for value in one:
            yield from _values(value, key)


def _amount(text: object) -> float:
    number, unit = re.fullmatch(r"([0-9.]+)([A-Za-z]*)", str(text)).groups()  # type: ignore[union-attr]
    return float(number) * UNITS[unit]


def _need(pod: Document, resource: str) -> float:
    return sum(_amount(container["resources"]["limits"].get(resource, 0)) for container in pod["spec"]["containers"])


def _check(one: Document, schema: Document) -> None:
    jsonschema.Draft202012Validator(schema).validate(one)
    for pod in _pods(one):
        template = {"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "any"}, "template": pod}
        kubernetes_validate.validate(template, KUBERNETES, strict=True)


def test_every_object_fits_kubernetes_own_schema(objects: list[Document], subtests: pytest.Subtests) -> None:
    plain = [one for one in objects if _group(one) not in OTHERS]
    assert len(plain) > 20
    for one in plain:
        with subtests.test(f"{one['kind']} {one['metadata']['name']}"):
            kubernetes_validate.validate(one, KUBERNETES, strict=True)


def test_ray_clusters_and_jobs_fit_their_schema(root: Path, objects: list[Document]) -> None:
    (schema,) = _documents(root / "tests/contracts/schemas/kuberay.yaml")
    for one in _ray(objects):
        _check(one, schema)
        broken = {**one, "spec": {**one["spec"], "suspendd": True}}
        with pytest.raises(jsonschema.ValidationError, match="suspendd"):
            _check(broken, schema)


@pytest.mark.skipif("LINEARSR_CRDS" not in os.environ, reason="LINEARSR_CRDS names no folder with CustomResourceDefinitions")
def test_objects_of_operators_fit_the_definitions_that_are_given(objects: list[Document], subtests: pytest.Subtests) -> None:
    schemas = {}
    for path in Path(os.environ["LINEARSR_CRDS"]).glob("*.yaml"):
        for crd in yaml.safe_load_all(path.read_text()):
            for version in crd["spec"]["versions"]:
                key = (f"{crd['spec']['group']}/{version['name']}", crd["spec"]["names"]["kind"])
                schemas[key] = _strict({**version["schema"]["openAPIV3Schema"]})
    checked = [one for one in objects if (one["apiVersion"], one["kind"]) in schemas]
    assert checked
    for one in checked:
        with subtests.test(f"{one['kind']} {one['metadata']['name']}"):
            jsonschema.Draft202012Validator(schemas[one["apiVersion"], one["kind"]]).validate(one)


def _strict(schema: Any, *, top: bool = True) -> Any:
    """Refuse what a definition does not name, as `kubectl apply --validate=strict` does."""
    if isinstance(schema, list):
        return [_strict(one, top=False) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = {key: _strict(value, top=False) for key, value in schema.items()}
    if found.get("x-kubernetes-int-or-string"):
        found.pop("type", None)
    if (
        isinstance(found.get("properties"), dict)
        and found.get("type") == "object"
        and not found.get("x-kubernetes-preserve-unknown-fields")
    ):
        found.setdefault("additionalProperties", False)
    if top:
        found["properties"]["metadata"] = {"type": "object"}
    return found


def test_a_worker_of_the_profile_fills_a_gpu_pod(objects: list[Document], recipe: Recipe) -> None:
    shares = {recipe.cluster.cpus_per_worker, recipe.experts.cpus_per_worker or recipe.cluster.cpus_per_worker}
    for one in _ray(objects):
        pod = _gpu_group(one)["template"]
        workers = _need(pod, "nvidia.com/gpu") / recipe.cluster.gpus_per_worker
        assert workers >= 1
        assert workers == int(workers)
        assert {share * workers for share in shares} == {_need(pod, "cpu")}


def test_all_experts_of_the_quickstart_find_room_at_once(objects: list[Document], recipe: Recipe) -> None:
    experts = (len(recipe.experts.resolved_boundaries) + 1) * recipe.experts.train.workers
    cluster, job = _ray(objects)
    for one, replicas in ((cluster, "maxReplicas"), (job, "replicas")):
        group = _gpu_group(one)
        workers = group[replicas] * _need(group["template"], "nvidia.com/gpu") / recipe.cluster.gpus_per_worker
        assert workers >= max(experts, recipe.pretrain.workers)


def test_the_job_runs_the_profile_it_mounts_in_a_cluster_like_the_standing_one(root: Path, objects: list[Document], recipe: Recipe) -> None:
    cluster, job = _ray(objects)
    assert _cluster(job)["headGroupSpec"] == _cluster(cluster)["headGroupSpec"]
    assert _gpu_group(job)["template"] == _gpu_group(cluster)["template"]
    words = job["spec"]["entrypoint"].split()
    assert words[:2] == ["linearsr", "run"]
    assert (root / words[2]).is_file()
    assert words[3] == "--profile"
    mounts = _cluster(job)["headGroupSpec"]["template"]["spec"]["containers"][0]["volumeMounts"]
    folder, name = words[4].rsplit("/", 1)
    assert folder in {mount["mountPath"] for mount in mounts}
    generated = _documents(root / "infra/kuberay/kustomization.yaml")[0]["configMapGenerator"]
    assert generated == [{"name": "linearsr-profile", "files": [f"../../pipelines/profiles/{name}"]}]
    assert recipe.cluster.address == "auto"


def test_tracking_and_storage_of_the_profile_are_the_mlflow_stack(
    objects: list[Document], infra: dict[str, list[Any]], recipe: Recipe
) -> None:
    uri = urlsplit(str(recipe.tracking.uri))
    name, namespace, _ = str(uri.hostname).split(".")
    service = _one(objects, "Service", name)
    assert service["metadata"]["namespace"] == namespace
    assert [port["port"] for port in service["spec"]["ports"]] == [uri.port]
    bucket = urlsplit(recipe.storage).hostname
    text = str([infra["infra/mlflow/kubernetes/mlflow.yaml"], infra["infra/mlflow/compose.yaml"]])
    assert set(re.findall(r"create_bucket\(Bucket=\W+([a-z0-9.-]+)", text)) == {bucket}
    assert set(re.findall(r"s3://([a-z0-9.-]+)", text)) == {bucket}
    hosts = next(value["value"] for value in _env(_one(objects, "Deployment", "mlflow")) if value["name"] == "MLFLOW_SERVER_ALLOWED_HOSTS")
    # Beside the service's, those of a forwarded port.
    assert {f"{uri.hostname}:*", "localhost:*", "127.0.0.1:*"} <= set(hosts.split(","))


def _env(one: Document) -> list[Document]:
    return [entry for entries in _values(one, "env") for entry in entries]


def test_ports_and_hosts_of_secrets_are_services(objects: list[Document]) -> None:
    secrets = {one["metadata"]["name"]: one["stringData"] for one in objects if one["kind"] == "Secret"}
    addresses = [secrets["linearsr-s3"]["AWS_ENDPOINT_URL"], secrets["linearsr-postgres"]["MLFLOW_BACKEND_STORE_URI"]]
    addresses += [f"redis://{_cluster(one)['gcsFaultToleranceOptions']['redisAddress']}" for one in _ray(objects)]
    for address in addresses:
        url = urlsplit(address)
        service = _one(objects, "Service", str(url.hostname).split(".", maxsplit=1)[0])
        assert f"{service['metadata']['name']}.{service['metadata']['namespace']}.svc" == url.hostname
        assert url.port in [port["port"] for port in service["spec"]["ports"]]


def test_every_secret_that_is_named_is_in_the_example_and_none_has_a_value(objects: list[Document]) -> None:
    secrets = {one["metadata"]["name"]: one["stringData"] for one in objects if one["kind"] == "Secret"}
    rest = [one for one in objects if one["kind"] != "Secret" and one["metadata"].get("namespace") == "linearsr"]
    for reference in _values(rest, "secretKeyRef"):
        assert reference["key"] in secrets[reference["name"]]
    named = {reference["name"] for reference in _values(rest, "secretRef")} | set(_values(rest, "secretName"))
    assert named == {"linearsr-s3", "linearsr-ray-token"}
    assert "auth_token" in secrets["linearsr-ray-token"]
    for name, values in secrets.items():
        for key in values:
            if re.search("TOKEN|PASSWORD|SECRET|ACCESS_KEY", key.upper()):
                assert values[key] == "REPLACE_ME", f"{name} {key}"


def test_pods_are_not_root_and_have_limits_and_pinned_images(objects: list[Document], root: Path, subtests: pytest.Subtests) -> None:
    version = re.search(r'^version = "(.+)"$', (root / "pyproject.toml").read_text(), re.MULTILINE)
    assert version is not None
    for pod in _pods(objects):
        for container in [*pod["spec"]["containers"], *pod["spec"].get("initContainers", [])]:
            with subtests.test(f"{container['name']} {container['image']}"):
                assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
                assert pod["spec"]["securityContext"]["runAsUser"] > 0
                assert container["securityContext"]["allowPrivilegeEscalation"] is False
                assert {"cpu", "memory"} <= container["resources"]["limits"].keys()
                _, _, tag = container["image"].partition(":")
                assert re.match(r"v?\d+\.\d+", tag)
                if "/linearsr:" in container["image"]:
                    gpu = "nvidia.com/gpu" in container["resources"]["limits"]
                    assert tag == f"{version[1]}-{'gpu' if gpu else 'cpu'}"


def test_shared_memory_holds_the_object_store_and_fits_the_pod(objects: list[Document]) -> None:
    for one in _ray(objects):
        for group in [_cluster(one)["headGroupSpec"], *_cluster(one)["workerGroupSpecs"]]:
            pod = group["template"]["spec"]
            (volume,) = [volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "shm"]
            assert [m["mountPath"] for m in pod["containers"][0]["volumeMounts"] if m["name"] == "shm"] == ["/dev/shm"]
            assert volume["medium"] == "Memory"
            store = float(group["rayStartParams"]["object-store-memory"])
            assert store < _amount(volume["sizeLimit"]) < _need(group["template"], "memory") / 2


def test_ray_is_the_version_that_the_images_hold_and_head_and_token_are_as_they_must(root: Path, objects: list[Document]) -> None:
    pins = dict(re.findall(r"^([\w-]+)==(.+)$", (root / "infra/images/constraints.txt").read_text(), re.MULTILINE))
    for one in _ray(objects):
        cluster = _cluster(one)
        assert cluster["rayVersion"] == pins["ray"]
        assert cluster["authOptions"]["mode"] == "token"
        assert cluster["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"


def test_the_queue_has_room_for_the_job(objects: list[Document]) -> None:
    _, job = _ray(objects)
    label = job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"]
    queue = _one(objects, "ClusterQueue", _one(objects, "LocalQueue", label)["spec"]["clusterQueue"])
    head, gpu = _cluster(job)["headGroupSpec"]["template"], _gpu_group(job)
    (group,) = queue["spec"]["resourceGroups"]
    quotas = {flavor["name"]: {one["name"]: _amount(one["nominalQuota"]) for one in flavor["resources"]} for flavor in group["flavors"]}
    assert set(quotas) == {one["metadata"]["name"] for one in objects if one["kind"] == "ResourceFlavor"}
    # The quota is given on when the run ends, the nodes when its pods go.
    assert job["spec"]["shutdownAfterJobFinishes"]
    assert job["spec"]["ttlSecondsAfterFinished"] <= 60
    for resource in ("cpu", "memory", "nvidia.com/gpu"):
        assert _need(head, resource) <= quotas["linearsr-cpu"][resource]
        assert gpu["replicas"] * _need(gpu["template"], resource) <= quotas["linearsr-gpu"][resource]


@pytest.mark.parametrize("name", ["kuberay-operator", "kuberay"], ids=["helm", "kustomize"])
def test_the_operator_reaches_the_dashboard_however_it_was_installed(objects: list[Document], name: str) -> None:
    """Labels of its pod in KubeRay's chart and in its config/manager/manager.yaml."""
    labels = {"app.kubernetes.io/name": name, "app.kubernetes.io/component": "kuberay-operator"}
    rules = _one(objects, "NetworkPolicy", "ray-from-this-namespace")["spec"]["ingress"]
    (peer,) = [rule["from"][0] for rule in rules if {"protocol": "TCP", "port": 8265} in rule.get("ports", [])]
    assert peer["podSelector"]["matchLabels"].items() <= labels.items()


def test_every_kustomization_names_files_that_are_there(root: Path, infra: dict[str, list[Any]]) -> None:
    found = [(root / path).parent for path in infra if path.endswith("kustomization.yaml")]
    assert len(found) == 4
    for folder in found:
        (one,) = _documents(folder / "kustomization.yaml")
        files = [name for generator in one.get("configMapGenerator", []) for name in generator["files"]]
        files += [*one["resources"], *(patch["path"] for patch in one.get("patches", []))]
        assert [name for name in files if not (folder / name).exists()] == []


def test_commands_make_a_namespace_before_they_use_it_and_wait_for_a_job_before_they_read_its_log(root: Path) -> None:
    blocks = re.findall(r"```sh\n(.*?)```", (root / "infra/README.md").read_text(), re.DOTALL)
    orders = [("kubectl apply ", "kubectl --namespace "), (" wait --for=", " logs --follow ")]
    for before, after in orders:
        both = [block for block in blocks if before in block and after in block]
        assert both
        assert [block for block in both if block.index(before) > block.index(after)] == []


@pytest.mark.skipif(shutil.which("kubectl") is None, reason="there is no kubectl, which renders without a cluster")
@pytest.mark.parametrize("folder", ["kuberay", "kueue", "mlflow/kubernetes", "monitoring"])
def test_a_rendered_kustomization_is_as_valid_as_its_files(folder: str, root: Path) -> None:
    command = ["kubectl", "kustomize", "--load-restrictor", "LoadRestrictionsNone", str(root / "infra" / folder)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rendered = list(yaml.safe_load_all(done.stdout))
    (schema,) = _documents(root / "tests/contracts/schemas/kuberay.yaml")
    for one in rendered:
        if _group(one) == "ray.io":
            _check(one, schema)
            gates = [pod["spec"].get("schedulingGates", []) for pod in _pods(one)]
            assert gates == [[{"name": "kueue.x-k8s.io/elastic-job"}] if folder == "kueue" else []] * 3
        elif _group(one) not in OTHERS:
            kubernetes_validate.validate(one, KUBERNETES, strict=True)
    if folder == "kuberay":
        (profile,) = [one["data"]["kuberay.yaml"] for one in rendered if one["kind"] == "ConfigMap"]
        assert profile == (root / "pipelines/profiles/kuberay.yaml").read_text()
