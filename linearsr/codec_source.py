"""What a codec is made of: where its weights are, and the hash that says which codec made a model. Imports no torch."""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

from linearsr.config import DC_AE_CHANNELS, DC_AE_FACTOR, CodecConfig

EXTRA = "sana"
"""The extra that brings diffusers."""
VERSION = 1
"""Of the embedded transforms: raised when one of them gives other latents than before."""
SETTINGS = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
INDEX = f"{WEIGHTS}.index.json"
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_FILE_NAME = re.compile(r"[\w.-]+\.safetensors")


class CodecError(ValueError):
    """A codec's weights are missing or are others than expected; the message says what to do."""


@dataclass(frozen=True, slots=True)
class AutoencoderFiles:
    """The files of a DC-AE on disk, its settings checked, its weights not read."""

    folder: Path
    settings: Mapping[str, object]
    """Content of `config.json`."""
    weights: tuple[Path, ...]
    """Every safetensors file, in order of name."""

    @property
    def scaling_factor(self) -> float:
        """What a latent is multiplied by. Source: `scaling_factor` of the settings, 0.41407 in SANA; method.md 1.7."""
        value = self.settings["scaling_factor"]
        if not isinstance(value, int | float) or not value > 0:
            raise CodecError(_wrong(self.folder, f"scaling_factor {value!r}", "a positive number"))
        return float(value)

    @property
    def stamp(self) -> tuple[tuple[str, int, int], ...]:
        """Name, bytes and time of change of every file: differs when a file is replaced."""
        return tuple((str(path), *_stamp(path)) for path in (self.folder / SETTINGS, *self.weights))


def find_autoencoder(source: str | None) -> AutoencoderFiles:
    """Return the files of the DC-AE in a local folder, or of a hub id in the local cache. Downloads nothing.

    Raises:
        CodecError: if they are not there, or are of another autoencoder than f32c32.
    """
    folder = _folder(source or "")
    try:
        settings = json.loads((folder / SETTINGS).read_bytes())
    except (OSError, ValueError) as error:
        raise CodecError(_wrong(folder, f"no readable {SETTINGS} ({error})", f"diffusers' {SETTINGS}")) from error
    if not isinstance(settings, dict) or settings.get("_class_name") != "AutoencoderDC":
        got = settings.get("_class_name") if isinstance(settings, dict) else type(settings).__name__
        raise CodecError(_wrong(folder, f"{SETTINGS} of {got}", "that of an AutoencoderDC"))
    try:
        stages = (len(settings["encoder_block_out_channels"]), len(settings["decoder_block_out_channels"]))
        found = {"latent channels": settings["latent_channels"], "factors": tuple(2 ** (count - 1) for count in stages)}
        settings["scaling_factor"]
    except (KeyError, TypeError) as error:
        raise CodecError(_wrong(folder, f"{SETTINGS} without {error}", "every setting of an AutoencoderDC")) from error
    if found != {"latent channels": DC_AE_CHANNELS, "factors": (DC_AE_FACTOR, DC_AE_FACTOR)}:
        raise CodecError(_wrong(folder, f"{found}", f"{DC_AE_CHANNELS} latent channels and factor {DC_AE_FACTOR}"))
    return AutoencoderFiles(folder, settings, _weights(folder))


def check_codec(config: CodecConfig) -> None:
    """Refuse a codec that could not be used here; costs milliseconds, reads no weights.

    Raises:
        CodecError: if files are missing or foreign, or diffusers is not installed.
    """
    if config.kind == "dc-ae":
        files = find_autoencoder(config.source)
        if find_spec("diffusers") is None:
            raise CodecError(f'codec.source: got {str(files.folder)!r} but no diffusers; fix: pip install "linearsr[{EXTRA}]"')


def codec_digest(config: CodecConfig, *, version: int = VERSION) -> str:
    """Return the SHA-256 of everything that decides a codec's function: the same digest gives the same latents.

    It is that of kind, factor and version for an embedded transform, and of settings and weights for a DC-AE, wherever they lie.
    Neither the place nor `tile` counts. Files are read once a process unless they change.

    Args:
        config: Any codec.
        version: Of the embedded transforms.

    Raises:
        CodecError: if the weights are not there.
    """
    if config.kind != "dc-ae":
        return _hash({"kind": config.kind, "factor": config.factor, "version": version})
    files = find_autoencoder(config.source)
    # Notes of the writer, like its version, begin with an underscore.
    settings = {name: value for name, value in files.settings.items() if not name.startswith("_")}
    weights = {path.name: _file_hash(path, *_stamp(path)) for path in files.weights}
    return _hash({"kind": config.kind, "settings": settings, "weights": weights})


def verify_codec(config: CodecConfig, expected: str) -> None:
    """Refuse a codec that is not the one something was made with.

    Raises:
        CodecError: with both digests.
    """
    got = codec_digest(config)
    if got != expected:
        where = config.source or f"{config.kind}, factor {config.factor}"
        raise CodecError(f"codec {where}: got SHA-256 {got}; expected {expected}; fix: use the weights that the model was made with")


def _folder(source: str) -> Path:
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if _HUB_ID.fullmatch(source):
        try:
            hub = import_module("huggingface_hub")
        except ModuleNotFoundError as error:
            fix = f'fix: pip install "linearsr[{EXTRA}]"'
            raise CodecError(f"codec.source: got {source!r}, no local folder; expected diffusers to look it up; {fix}") from error
        found = hub.try_to_load_from_cache(source, SETTINGS)
        # Other than a path it is None, or a mark that the file is known not to exist.
        if isinstance(found, str):
            return Path(found).parent
        fix = f"fix: name a folder, or bring it once, where there is a network: `linearsr prefetch RECIPE`, or `hf download {source}`"
        raise CodecError(f"codec.source: got {source!r}; expected a local folder, or a hub id that is in the local cache; {fix}")
    fix = "fix: name the folder of the DC-AE, or bring it with `linearsr prefetch RECIPE`"
    raise CodecError(f"codec.source: got {source!r}; expected a local folder, which is not there; {fix}")


def _weights(folder: Path) -> tuple[Path, ...]:
    names = [WEIGHTS]
    if (folder / INDEX).is_file():
        try:
            names = sorted(set(json.loads((folder / INDEX).read_bytes())["weight_map"].values()))
        except (KeyError, AttributeError, TypeError, ValueError) as error:
            raise CodecError(_wrong(folder, f"{INDEX} that cannot be read ({error})", "an index of safetensors")) from error
    absent = [name for name in names if not _FILE_NAME.fullmatch(name) or not (folder / name).is_file()]
    if absent:
        raise CodecError(_wrong(folder, f"no file {', '.join(absent)}", "the weights as safetensors"))
    return tuple(folder / name for name in names)


def _wrong(folder: Path, got: str, expected: str) -> str:
    return f"codec.source: {folder}: got {got}; expected {expected}; fix: name the folder of a DC-AE f32c32 that diffusers has saved"


def _stamp(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _hash(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


@lru_cache(maxsize=64)
def _file_hash(path: Path, size: int, changed_ns: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
