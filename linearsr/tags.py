"""Tags: from words to the ids that the network embeds, or to the prompt that a text encoder reads. Imports no torch."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from linearsr.config import TagsConfig


@dataclass(frozen=True, kw_only=True)
class Caption:
    """Everything a sample says in words, for networks that need more than its tags."""

    tags: Sequence[str] = ()
    """What the photograph shows."""
    tags_lr: Sequence[str] | None = None
    """What a tagger sees in an LR image of it, seldom the very one that the sample is degraded to; None if nobody asked one."""
    text: NDArray[np.float16] | None = None
    """Embedding (tokens, width) of the prompt of `tags`."""
    text_lr: NDArray[np.float16] | None = None
    """The same of `tags_lr`."""
    encoder: str = ""
    """Digest of the text encoder that made the embeddings."""
    suffix: str = ""
    """Words that the prompts of the embeddings end with, as at inference; samples that are trained on have none."""


def normalise_tag(tag: str) -> str:
    """Return the tag as the vocabulary spells it: lower case, single spaces."""
    return " ".join(tag.lower().split())


def split_tags(text: str) -> list[str]:
    """Split tags written in one text, separated by `;`, `,` or new lines."""
    return re.split(r"[;,\n]", text)


def vocabulary_of(tag_lists: Iterable[Sequence[str]]) -> tuple[str, ...]:
    """Return the distinct tags of all samples in alphabetical order."""
    return tuple(sorted({normalise_tag(tag) for tags in tag_lists for tag in tags} - {""}))


def encode_tags(tags: Sequence[str], config: TagsConfig) -> NDArray[np.int64]:
    """Return ids (max_tags,): 1 .. V in the order given, then 0 for padding. Unknown and repeated tags are left out."""
    index = {tag: position for position, tag in enumerate(config.vocabulary, start=1)}
    known = dict.fromkeys(index[name] for name in map(normalise_tag, tags) if name in index)
    ids = np.zeros(config.max_tags, dtype=np.int64)
    kept = list(known)[: config.max_tags]
    ids[: len(kept)] = kept
    return ids


def prompt_of(tags: Sequence[str], suffix: str = "") -> str:
    """Return the prompt of tags: distinct tags in the order given, joined by ", "; without tags and suffix the null prompt "".

    Args:
        tags: words in any spelling.
        suffix: more words, put last, as SeeSR does with "clean, high-resolution, 8k" when it restores.

    Source: SeeSR (arXiv 2311.16518), test_seesr.py; method.md 2.9.
    """
    return ", ".join(dict.fromkeys(filter(None, [*map(normalise_tag, tags), suffix.strip()])))


def prompt_at_inference(tags: Sequence[str], suffix: str) -> str:
    """Return the prompt that a picture is restored with: tags and suffix, or without tags the null prompt "", which has no suffix."""
    return prompt_of(tags, suffix) if prompt_of(tags) else ""
