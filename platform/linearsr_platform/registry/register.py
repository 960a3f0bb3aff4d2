"""Bundle folder -> version of a registered model, with its lineage and its evaluation."""

import json
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

from linearsr.bundle import MANIFEST, BundleError, load_bundle
from linearsr_platform.errors import UserError
from linearsr_platform.registry.models import (
    BUNDLE_IN_MODEL,
    CHALLENGER,
    DIGEST_TAG,
    EVALUATION_TAG,
    Evaluation,
    find_by_digest,
    registry_errors,
)

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.models import ModelSignature


def register(
    client: "MlflowClient",
    bundle_folder: Path,
    *,
    name: str,
    evaluation: Evaluation,
    run_id: str,
    tags: Mapping[str, str] | None = None,
) -> int:
    """Make a bundle a version of a registered model with the alias `challenger`.

    A bundle that is registered already keeps its version; its evaluation is brought up to date.

    Args:
        client: client of the registry.
        bundle_folder: a bundle, see `linearsr.bundle`.
        name: of the registered model, made if new.
        evaluation: the numbers the promotion gate will read.
        run_id: run that registers it; keeps the files.
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
    stored = evaluation.to_json()
    with registry_errors(f"registering {bundle_folder} as {name!r}"):
        _ensure_model(client, name)
        known = find_by_digest(client, name, bundle.digest)
        if known is not None:
            version = str(known.version)
            client.set_model_version_tag(name, version, EVALUATION_TAG, stored)
        else:
            every_tag = {**_lineage_tags(client, run_id, bundle.lineage), **(tags or {}), DIGEST_TAG: bundle.digest, EVALUATION_TAG: stored}
            source = _upload(client, bundle_folder, run_id, f"model-{bundle.digest[:12]}")
            version = str(client.create_model_version(name, source, run_id, tags=every_tag, await_creation_for=0).version)
        client.set_registered_model_alias(name, CHALLENGER, version)
    return int(version)


def _ensure_model(client: "MlflowClient", name: str) -> None:
    """Create a registered model unless it exists."""
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise


def _lineage_tags(client: "MlflowClient", run_id: str, lineage: Mapping[str, object]) -> dict[str, str]:
    """Write what a bundle came from as tags `lineage.<key>`, with the pipeline's run beside it."""
    tags = {f"lineage.{key}": value if isinstance(value, str) else json.dumps(value) for key, value in lineage.items()}
    parent = client.get_run(run_id).data.tags.get("mlflow.parentRunId")
    return tags if parent is None else {**tags, "parent_run": parent}


def _upload(client: "MlflowClient", bundle_folder: Path, run_id: str, model_folder: str) -> str:
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
                model_config={"device": "cpu"},
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
