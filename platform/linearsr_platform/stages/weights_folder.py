"""Whether a folder, as diffusers or transformers saves one, is complete; nothing of it is loaded."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.txt", "vocab.json", "spiece.model")
UNFINISHED = ".prefetch-unfinished"
"""Name of the file that marks a folder while its files come."""
INDEX = "*.safetensors.index.json"
PIECE = "*-of-*.safetensors"
"""Name of a file of weights that are in several, which an index lists."""


@contextmanager
def unfinished(folder: Path) -> Iterator[None]:
    """Mark a folder, made if need be, until the block ends well: what looks whole may lack a file that its source alone knows of."""
    folder.mkdir(parents=True, exist_ok=True)
    mark = folder / UNFINISHED
    mark.touch()
    yield
    mark.unlink()


def is_part(name: str, patterns: Sequence[str]) -> bool:
    """Tell whether a file directly inside a folder of weights belongs to it; other formats, and files of tools, do not."""
    return "/" not in name and not name.startswith(".") and any(fnmatch(name, pattern) for pattern in patterns)


def folder_problem(folder: Path, kind: str) -> str:
    """Return what a folder of weights lacks, "" if nothing.

    Args:
        folder: local folder.
        kind: one of `linearsr_platform.recipe.needs.KINDS`; all but a codec need a tokenizer.
    """
    if not folder.is_dir():
        return "no such folder"
    if (folder / UNFINISHED).exists():
        return "a part of its files: `linearsr prefetch` was cut off"
    if not (folder / "config.json").is_file():
        return "no config.json"
    weights = {file.name for file in folder.glob("*.safetensors")}
    indices = sorted(folder.glob(INDEX))
    if not weights or (any(fnmatch(name, PIECE) for name in weights) and not indices):
        return "no complete *.safetensors"
    try:
        listed = {str(name) for index in indices for name in json.loads(index.read_bytes())["weight_map"].values()}
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        return f"no index of safetensors that can be read ({error})"
    if listed - weights:
        return f"no {', '.join(sorted(listed - weights))}"
    if kind != "codec" and not any((folder / name).is_file() for name in TOKENIZERS):
        return "no tokenizer"
    return ""
