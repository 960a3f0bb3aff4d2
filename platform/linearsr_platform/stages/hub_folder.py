"""A folder of weights from the Hugging Face hub, by its own client, which comes with diffusers and transformers."""

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path

from linearsr_platform.errors import StageError, UserError
from linearsr_platform.stages.weights_folder import unfinished


def bring_from_hub(repository: str, target: Path, patterns: Sequence[str], *, endpoint: str | None = None) -> str:
    """Bring the files directly inside a repository that match a pattern; returns the repository with its revision.

    The client takes up what was cut off, and looks for a token where it always does (`hf auth login`).

    Args:
        repository: `ORG/NAME`.
        target: local folder; made if need be.
        patterns: of file names.
        endpoint: address of the hub; None is the client's own, which `HF_ENDPOINT` may change.

    Raises:
        UserError: if the client is not installed.
        StageError: if the repository cannot be had.
    """
    try:
        hub = import_module("huggingface_hub")
        errors = import_module("huggingface_hub.errors")
    except ModuleNotFoundError as error:
        raise UserError(
            f'{repository}: got no huggingface_hub; expected its client; fix: pip install "linearsr[sana]", or --from'
        ) from error
    try:
        info = hub.HfApi(endpoint=endpoint).model_info(repository)
        options = {"allow_patterns": list(patterns), "ignore_patterns": ["*/*"], "endpoint": endpoint}
        with unfinished(target):
            hub.snapshot_download(repository, revision=info.sha, local_dir=str(target), **options)
    except (OSError, ValueError, errors.HTTPError) as error:
        reason = " ".join(str(error).split())[:300]
        raise StageError(f"hub {repository}: {type(error).__name__}: {reason}") from error
    return f"hub {repository}@{info.sha}"
