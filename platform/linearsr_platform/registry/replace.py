"""A new bundle from an old one with one expert replaced: the other experts, the boundaries and the routing stay what they are."""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from linearsr.bundle import MANIFEST, Bundle, BundleError, load_bundle, save_bundle
from linearsr_platform.errors import UserError
from linearsr_platform.recipe.promote_schema import PromoteSection
from linearsr_platform.registry.models import RULES_TAG, SCHEME, ModelVersion, find_version, registry_errors, resolve
from linearsr_platform.registry.register import register

if TYPE_CHECKING:
    from mlflow import MlflowClient


def replace_expert(base: Bundle, number: int, donor: Path, target: Path, *, base_name: str, donor_name: str) -> Bundle:
    """Write a bundle that is `base` with another expert.

    Args:
        base: the bundle whose other experts stay.
        number: which expert to replace, from 1, the noisiest.
        donor: weights of an expert of the same interval, or a bundle, whose expert of that number is taken.
        target: folder to make.
        base_name: how the lineage names the base, as in `models:/NAME/VERSION`.
        donor_name: how it names the donor, unless that says itself where its expert is from.

    Raises:
        UserError: if there is no such expert, or the donor does not fit: another network, codec, precision, boundary or routing.
    """
    if not 1 <= number <= len(base.experts):
        raise UserError(f"--expert: got {number}; expected 1 to {len(base.experts)}, the experts of {base_name}")
    weights, entry = _from_bundle(base, number, donor) if (donor / MANIFEST).is_file() else (donor, {})
    _same_network(base, base.experts[number - 1], weights)
    name = base.experts[number - 1].stem
    known = {expert["name"]: expert for expert in base.lineage.get("experts", [])}
    experts = [known.get(path.stem, {"name": path.stem}) for path in base.experts]
    experts[number - 1] = {**entry, "name": name, "from": entry.get("from", donor_name)}
    lineage = {
        **base.lineage,
        "experts": [expert if expert["name"] == name else {**expert, "from": expert.get("from", base_name)} for expert in experts],
        "base": {"model": base_name, "digest": base.digest},
        "replaced": name,
    }
    try:
        return save_bundle(
            target,
            config=base.config,
            statistics=base.statistics,
            boundaries=base.boundaries,
            sampler=base.sampler,
            expert_weights=[*base.experts[: number - 1], weights, *base.experts[number:]],
            lineage=lineage,
            precision=base.precision,
            text=base.text,
        )
    except BundleError as error:
        raise UserError(f"replace-expert: {error}") from error


def _from_bundle(base: Bundle, number: int, folder: Path) -> tuple[Path, dict[str, Any]]:
    """Return an expert's weights in another bundle and what they came from, if everything around the expert is the same."""
    try:
        donor = load_bundle(folder)
    except BundleError as error:
        raise UserError(f"--weights: {error}") from error
    for what, ours, theirs in (
        ("boundaries", base.boundaries, donor.boundaries),
        ("routing", base.sampler, donor.sampler),
        ("network", base.config, donor.config),
        ("latent statistics", base.statistics, donor.statistics),
        ("codec", base.codec_digest, donor.codec_digest),
        ("precision", base.precision, donor.precision),
        ("text encoder", None if base.text is None else base.text.digest, None if donor.text is None else donor.text.digest),
    ):
        if ours != theirs:
            raise UserError(f"--weights: {folder}: {what}: got {theirs}; expected {ours}, as in the model whose expert is replaced")
    path = donor.experts[number - 1]
    known = {expert["name"]: expert for expert in donor.lineage.get("experts", [])}
    return path, known.get(path.stem, {})


def _same_network(base: Bundle, ours: Path, theirs: Path) -> None:
    """Return if two files of weights hold the same tensors in shape and kind, for the same codec as far as they say.

    Raises:
        UserError: naming the first difference, or a codec that is not the same.
    """
    expected, got = _outline(ours), _outline(theirs)
    # Not every file of weights says which codec it was trained with; one that does must name this one.
    expected["codec"], got["codec"] = base.codec_digest, got.get("codec", base.codec_digest)
    odd = sorted(name for name in {*expected, *got} if expected.get(name) != got.get(name))
    if odd:
        raise UserError(
            f"--weights: {theirs}: {odd[0]}: got {got.get(odd[0], 'nothing')}; expected {expected.get(odd[0], 'nothing')}; "
            "fix: name the weights of the same network"
        )


def _outline(path: Path) -> dict[str, str]:
    try:
        with safe_open(path, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118 - it is not a dict
            outline = {name: f"{part.get_dtype()} {part.get_shape()}" for name, part in parts.items()}
            return outline | {key: value for key, value in (file.metadata() or {}).items() if key == "codec"}
    except (OSError, SafetensorError) as error:
        raise UserError(f"--weights: got {str(path)!r}; expected safetensors or a folder with a {MANIFEST}: {error}") from error


def register_replacement(client: "MlflowClient", base: ModelVersion, *, number: int, donor: Path, donor_name: str) -> ModelVersion:
    """Register `base` with one expert replaced as a new version of the same model, the challenger; see `replace_expert`.

    Its run is a new one in the experiment of the base's, so that it keeps its own files.

    Raises:
        UserError: if the donor does not fit, or the base cannot be read.
        StageError: if MLflow refuses.
    """
    reference = f"{SCHEME}{base.label}"
    try:
        bundle = load_bundle(resolve(reference, lambda: client))
    except BundleError as error:
        raise UserError(f"{reference}: {error}") from error
    with TemporaryDirectory(prefix="linearsr-") as temporary:
        made = replace_expert(bundle, number, donor, Path(temporary, "bundle"), base_name=reference, donor_name=donor_name)
        if made.digest == bundle.digest or _hash_of(made, number) == _hash_of(bundle, number):
            raise UserError(f"--weights: got the weights that expert {number} of {base.label} has already; expected others")
        with registry_errors(f"starting a run for {base.name!r}"):
            experiment = client.get_run(str(base.run_id)).info.experiment_id
            run = client.create_run(experiment, run_name=f"replace-expert-{number}", tags={"kind": "replace-expert", "base": reference})
        version = register(client, made.folder, name=base.name, evaluation=None, run_id=run.info.run_id, rules=_rules_of(base))
        with registry_errors(f"closing run {run.info.run_id}"):
            client.set_terminated(run.info.run_id)
    return find_version(client, base.name, version)


def _rules_of(version: ModelVersion) -> PromoteSection | None:
    text = version.tags.get(RULES_TAG)
    return None if text is None else PromoteSection.model_validate_json(text)


def _hash_of(bundle: Bundle, number: int) -> str:
    files = json.loads((bundle.folder / MANIFEST).read_text(encoding="utf-8"))["files"]
    return str(files[bundle.experts[number - 1].name])
