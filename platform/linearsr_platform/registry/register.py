"""Bundle folder -> version of a registered model, with its lineage and its evaluation."""

import hashlib
import json
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from linearsr.bundle import MANIFEST, Bundle, BundleError, load_bundle
from linearsr_platform.errors import UserError
from linearsr_platform.recipe.promote_schema import PromoteSection
from linearsr_platform.registry.evaluation import Evaluation
from linearsr_platform.registry.models import (
    BUNDLE_IN_MODEL,
    CHALLENGER,
    DIGEST_TAG,
    EVALUATION_FILE_TAG,
    EVALUATION_TAG,
    RULES_TAG,
    ModelVersion,
    ensure_model,
    find_by_digest,
    find_version,
    read_evaluation,
    registry_errors,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.models import ModelSignature

EVALUATIONS = "evaluations"
"""Folder of evaluations inside a version's files."""


def register(
    client: "MlflowClient",
    bundle_folder: Path,
    *,
    name: str,
    evaluation: Evaluation | None,
    run_id: str,
    rules: PromoteSection | None = None,
    tags: Mapping[str, str] | None = None,
) -> int:
    """Make a bundle a version of a registered model with the alias `challenger`.

    A bundle that is registered already keeps its version; its evaluation is brought up to date.

    Args:
        client: client of the registry.
        bundle_folder: a bundle, see `linearsr.bundle`.
        name: of the registered model, made if new.
        evaluation: the numbers the promotion gate will read; None if it was not evaluated yet.
        run_id: run that registers it; keeps the files.
        rules: the gate it is meant for, which `promote` takes unless told otherwise.
        tags: lineage beyond what the bundle itself carries.

    Returns: the number of the version.

    Raises:
        UserError: if the folder holds no intact bundle.
        StageError: if MLflow refuses.
    """
    try:
        bundle = load_bundle(bundle_folder)
    except BundleError as error:
        raise UserError(f"register: {error}") from error
    every_tag = dict(tags or {}) | ({} if rules is None else {RULES_TAG: rules.model_dump_json()})
    with registry_errors(f"registering {bundle_folder} as {name!r}"):
        ensure_model(client, name)
        known = find_by_digest(client, name, bundle.digest)
        if known is not None:
            version = known.version
            for key, value in every_tag.items():
                client.set_model_version_tag(name, str(version), key, value)
        else:
            every_tag |= {**_lineage_tags(client, run_id, bundle), DIGEST_TAG: bundle.digest}
            source = _upload(client, bundle_folder, run_id, f"model-{bundle.digest[:12]}", bundle.digest)
            version = int(client.create_model_version(name, source, run_id, tags=every_tag, await_creation_for=0).version)
        if evaluation is not None:
            attach_evaluation(client, find_version(client, name, version), evaluation)
        client.set_registered_model_alias(name, CHALLENGER, str(version))
    return version


def attach_evaluation(client: "MlflowClient", version: ModelVersion, evaluation: Evaluation) -> None:
    """Store the numbers of a version with it; tables of protocols it was measured under before stay, unless measured again.

    Raises:
        UserError: if the version's run is unknown, so that there is no place for the file.
        StageError: if MLflow refuses.
    """
    if version.run_id is None:
        raise UserError(f"{version.label}: got no run; expected the run that registered it; fix: register the bundle again")
    before = read_evaluation(client, version)
    tables = {**({} if before is None else before.tables), **evaluation.tables}
    whole = Evaluation(tables=tables)
    text = whole.to_json(with_values=True)
    # Named by its content, so that a file that a tag names is never written twice.
    file = f"{EVALUATIONS}/{hashlib.sha256(text.encode()).hexdigest()}.json"
    with registry_errors(f"storing the evaluation of {version.label}"):
        client.log_text(version.run_id, text, f"{version.source.rstrip('/').rsplit('/', 1)[-1]}/{file}")
        client.set_model_version_tag(version.name, str(version.version), EVALUATION_TAG, whole.to_json(with_values=False))
        client.set_model_version_tag(version.name, str(version.version), EVALUATION_FILE_TAG, file)


def _lineage_tags(client: "MlflowClient", run_id: str, bundle: Bundle) -> dict[str, str]:
    """Write what a bundle is and came from as tags, with the pipeline's run beside it."""
    lineage = {**bundle.lineage, "experts": _experts(bundle)}
    tags = {f"lineage.{key}": value if isinstance(value, str) else json.dumps(value) for key, value in lineage.items()}
    routing = {"boundaries": list(bundle.boundaries), "sampler": bundle.sampler.to_plain()}
    tags |= {f"bundle.{key}": json.dumps(value) for key, value in routing.items()}
    tags |= {"bundle.precision": bundle.precision, "bundle.codec": bundle.codec_digest}
    parent = client.get_run(run_id).data.tags.get("mlflow.parentRunId")
    return tags if parent is None else {**tags, "parent_run": parent}


def _experts(bundle: Bundle) -> list[dict[str, object]]:
    """Return what each expert came from, with the hash of its weights; bundles from before that was kept have the hash alone."""
    files = json.loads((bundle.folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    known = {expert["name"]: expert for expert in bundle.lineage.get("experts", [])}
    return [{"name": path.stem, **known.get(path.stem, {}), "sha256": files[path.name]} for path in bundle.experts]


def _upload(client: "MlflowClient", bundle_folder: Path, run_id: str, model_folder: str, digest: str) -> str:
    """Store a bundle as an MLflow model in a folder of a run's artifacts; returns its URI.

    MLflow would copy the weights twice before it uploads them, so the model is saved around the bundle's manifest alone and the rest goes
    straight to where the model expects it.
    """
    import mlflow.pyfunc

    with tempfile.TemporaryDirectory(prefix="linearsr-") as temporary:
        stand_in, model = Path(temporary, Path(BUNDLE_IN_MODEL).name), Path(temporary, model_folder)
        stand_in.mkdir()
        shutil.copy(bundle_folder / MANIFEST, stand_in)
        with warnings.catch_warnings():
            # The signature is written out, so there is nothing to infer from an example.
            warnings.filterwarnings("ignore", message=".*input example was not provided")
            mlflow.pyfunc.save_model(
                path=str(model),
                python_model=str(Path(__file__).with_name("pyfunc_model.py")),
                artifacts={"bundle": str(stand_in)},
                signature=_signature(),
                pip_requirements=_requirements(),
                model_config={"device": "cpu", "bundle_digest": digest},
            )
        client.log_artifacts(run_id, str(model), model_folder)
    client.log_artifacts(run_id, str(bundle_folder), f"{model_folder}/{BUNDLE_IN_MODEL}")
    return f"{client.get_run(run_id).info.artifact_uri}/{model_folder}"


def _signature() -> "ModelSignature":
    """Describe input and output: batches of RGB images in [0, 1], and what may be chosen for each call."""
    import numpy as np
    from mlflow.models import ModelSignature
    from mlflow.types import ParamSchema, ParamSpec, Schema, TensorSpec

    images = Schema([TensorSpec(np.dtype("float32"), (-1, 3, -1, -1))])
    params = ParamSchema(
        [
            ParamSpec("seed", "long", 0),
            ParamSpec("steps", "long", 0),
            ParamSpec("estimate", "string", "routed"),
            ParamSpec("tags", "string", [], shape=(-1,)),
        ]
    )
    return ModelSignature(inputs=images, outputs=images, params=params)


def _requirements() -> list[str]:
    """Name the packages that load a model, at the versions that made it."""
    return [f"linearsr=={metadata.version('linearsr')}", f"torch=={metadata.version('torch')}"]
