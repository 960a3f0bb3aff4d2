"""Captions of a batch: which a sample is trained with, and what stands for none.

Shape suffixes: B batch, T tokens, E width of the text encoder.
"""

from collections.abc import Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from linearsr.conditioning import TextEmbedding
from linearsr.config import TagsConfig, TextSource
from linearsr.constants import Constant
from linearsr.tags import Caption, encode_tags

Array = NDArray[np.generic]
_T = TypeVar("_T")


class Captions:
    """Turns what samples say in words into what a network takes: tag ids, or embeddings that were made with the data."""

    def __init__(self, tags: TagsConfig, text: TextSource | None) -> None:
        """Keep both.

        Raises:
            ValueError: if a network that reads prompts has no source of embeddings, or one of tag ids has one.
        """
        if (tags.encoder == "text") != (text is not None):
            raise ValueError(
                f"captions: got tags.encoder {tags.encoder!r} and {'no' if text is None else 'a'} source of embeddings; "
                "expected one for 'text', none for 'learned'; fix: prepare the data with `model.text`"
            )
        self.tags, self.text = tags, text
        self._null = None if text is None else _null(text)

    def example(self, caption: Sequence[str] | Caption, *, at_inference: bool = False) -> dict[str, Array]:
        """Return the arrays of one example: `tags` ids (T,), or `text` float16 (T, E) and `text_tokens` (); with LR tags in the mix also
        the same of the LR image, under names that end in `_lr`.

        Args:
            caption: what the sample says in words.
            at_inference: whether a picture is restored with it, so that prompts end with the encoder's suffix; in training none does.

        Raises:
            ValueError: if the sample lacks what the mix needs, or its embedding is by another encoder or of a prompt of another suffix.
        """
        if not isinstance(caption, Caption):
            caption = Caption(tags=caption)
        if self.text is None:
            arrays: dict[str, Array] = {"tags": encode_tags(caption.tags, self.tags)}
            if self.tags.from_lr:
                arrays["tags_lr"] = encode_tags(_there(caption.tags_lr), self.tags)
            return arrays
        if caption.encoder != self.text.digest:
            raise ValueError(
                f"text: got embeddings of encoder {caption.encoder or 'none'}; expected {self.text.digest}; "
                "fix: run the stage `prepare` again with this recipe's `model.text`"
            )
        suffix = self.text.encoder.suffix if at_inference else ""
        if caption.suffix != suffix:
            raise ValueError(
                f"text: got embeddings of prompts with suffix {caption.suffix!r}; expected {suffix!r}; "
                "fix: run the stage `prepare` again with this recipe's `model.text`"
            )
        arrays = self._padded("text", caption.text)
        return arrays | self._padded("text_lr", _there(caption.text_lr)) if self.tags.from_lr else arrays

    def all(self, batch: Mapping[str, Tensor]) -> Tensor | TextEmbedding:
        """Return the captions of the photographs of a batch."""
        return batch["tags"] if self.text is None else _embedding(batch, "text")

    def at_inference(self, batch: Mapping[str, Tensor]) -> Tensor | TextEmbedding:
        """Return the captions that say no more of a batch than inference knows: those of the LR images if the mix has some, else `all`."""
        return self._of_lr(batch) if self.tags.from_lr else self.all(batch)

    def null(self, count: int, device: torch.device) -> Tensor | TextEmbedding:
        """Return what stands for no tags, `count` times."""
        if self.text is None or self._null is None:
            return torch.zeros((count, self.tags.max_tags), dtype=torch.int64, device=device)
        values, mask = (part.on(device) for part in self._null)
        return TextEmbedding(values.expand(count, -1, -1), mask.expand(count, -1))

    def mix(self, batch: Mapping[str, Tensor], draws_B: Tensor) -> Tensor | TextEmbedding:
        """Return the captions that a batch is trained with: none, those of the LR image, or those of the photograph.

        Args:
            batch: of examples.
            draws_B: (B,) uniform in [0, 1): below `dropout` none, below `dropout + from_lr` those of LR. Source: method.md 7 #10.
        """
        chosen, tags = self.all(batch), self.tags
        device = chosen.device if isinstance(chosen, Tensor) else chosen.mask.device
        if tags.from_lr:
            chosen = _where((draws_B < tags.dropout + tags.from_lr).to(device), self._of_lr(batch), chosen)
        return _where((draws_B < tags.dropout).to(device), self.null(len(draws_B), device), chosen)

    def _of_lr(self, batch: Mapping[str, Tensor]) -> Tensor | TextEmbedding:
        return batch["tags_lr"] if self.text is None else _embedding(batch, "text_lr")

    def _padded(self, name: str, embedding: NDArray[np.float16] | None) -> dict[str, Array]:
        assert self.text is not None  # noqa: S101 (only called where there is one)
        if embedding is None or embedding.shape[1] != self.text.width:
            got = None if embedding is None else embedding.shape
            raise ValueError(
                f"{name}: got an embedding of shape {got}; expected (tokens, {self.text.width}); fix: run the stage `prepare` again"
            )
        values = np.zeros((self.text.encoder.max_tokens, self.text.width), dtype=np.float16)
        values[: len(embedding)] = embedding
        return {name: values, f"{name}_tokens": np.asarray(len(embedding))}


def _null(text: TextSource) -> tuple[Constant, Constant]:
    """Return the null prompt, padded: values (T, E) and mask (T,)."""
    values = torch.zeros((text.encoder.max_tokens, text.width))
    values[: len(text.null)] = torch.tensor(text.null)
    return Constant(values), Constant(torch.arange(len(values)) < len(text.null))


def _there(words: _T | None) -> _T:
    if words is None:
        raise ValueError(
            "tags_lr: got a sample without tags of its LR image; expected some for every sample; fix: `linearsr tag FOLDER --lr`"
        )
    return words


def _embedding(batch: Mapping[str, Tensor], name: str) -> TextEmbedding:
    values, tokens = batch[name], batch[f"{name}_tokens"]
    return TextEmbedding(values.float(), torch.arange(values.shape[1], device=values.device) < tokens[:, None])


def _where(first_B: Tensor, first: Tensor | TextEmbedding, second: Tensor | TextEmbedding) -> Tensor | TextEmbedding:
    """Take each sample's captions from `first` where `first_B`, else from `second`; both are of one kind."""
    if isinstance(first, TextEmbedding) and isinstance(second, TextEmbedding):
        values = torch.where(first_B[:, None, None], first.values, second.values)
        return TextEmbedding(values, torch.where(first_B[:, None], first.mask, second.mask))
    assert isinstance(first, Tensor)  # noqa: S101 (of one kind)
    assert isinstance(second, Tensor)  # noqa: S101
    return torch.where(first_B[:, None], first, second)
