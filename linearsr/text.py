"""Text encoders: from prompts to embeddings that the network attends to.

Nothing is ever downloaded: an encoder is a local folder of safetensors, JSON and a tokenizer, as transformers saves it.
Shape suffixes: B batch, T tokens, E width of the encoder.
"""

import hashlib
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from linearsr.conditioning import TextEmbedding
from linearsr.config import TextEncoderConfig

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
BATCH = 32
"""Prompts encoded in one forward."""
HASHED_SUFFIXES = (".json", ".model", ".safetensors", ".txt")
"""Files of a folder that decide what its encoder gives: configs, tokenizers, weights."""


class TextEncoderError(ValueError):
    """A text encoder cannot be loaded; the message says which folder, and what to do."""


class TextEncoder(Protocol):
    """Turns prompts into embeddings of a fixed width."""

    width: int
    """Channels of an embedding, E."""
    max_tokens: int
    """Tokens a prompt, T; longer prompts are cut, shorter ones padded and masked."""
    digest: str
    """SHA-256 of everything that decides the embeddings."""

    def encode(self, prompts: Sequence[str]) -> TextEmbedding:
        """Return embeddings (B, T, E) float32 and their mask (B, T), on the CPU; B is at least 1. "" is the null prompt."""
        ...


class TransformersEncoder:
    """Last hidden states of a transformers model that reads text, padded on the right.

    Of an encoder-decoder, as T5, it is the encoder; of a model with two towers, as CLIP, the one for text.
    """

    def __init__(self, config: TextEncoderConfig, device: str | torch.device = "cpu") -> None:
        """Load tokenizer and weights from `config.folder`.

        Raises:
            TextEncoderError: if transformers is not installed, or the folder does not hold an encoder of such prompts.
        """
        self.config, self.device = config, torch.device(device)
        self.max_tokens = config.max_tokens
        self.digest = encoder_digest(config)
        transformers = _import_transformers()
        try:
            self.tokenizer: Any = transformers.AutoTokenizer.from_pretrained(config.folder, local_files_only=True)
            self.model: Any = _text_part(
                transformers.AutoModel.from_pretrained(
                    config.folder, local_files_only=True, use_safetensors=True, dtype=DTYPES[config.precision]
                )
            )
        except (OSError, ValueError) as error:
            raise TextEncoderError(
                f"{config.folder}: got a folder that transformers cannot load: {error}; "
                "expected config.json, a tokenizer and *.safetensors; fix: name such a folder in `model.text.folder`"
            ) from error
        if (reason := self._unusable()) is not None:
            raise TextEncoderError(f"{config.folder}: got a model that cannot encode prompts: {reason}; fix: name another folder")
        self.model.eval().to(self.device)
        self.tokenizer.padding_side = "right"
        self.width = int(self.model.config.hidden_size)

    def _unusable(self) -> str | None:
        """Say what keeps this model from giving embeddings of prompts, the empty one among them."""
        settings = self.model.config
        if not isinstance(getattr(settings, "hidden_size", None), int):
            return f"{settings.model_type!r} says no hidden_size"
        most = getattr(settings, "max_position_embeddings", None)
        if isinstance(most, int) and most < self.max_tokens:
            return f"it reads at most {most} tokens, and `model.text.max_tokens` is {self.max_tokens}"
        if self.tokenizer.pad_token is None:
            return "its tokenizer has no padding token"
        return None if self.tokenizer("")["input_ids"] else "its tokenizer makes no token of the empty prompt"

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> TextEmbedding:
        """Return embeddings (B, T, E) float32 and their mask (B, T), on the CPU; B is at least 1.

        A prompt's numbers depend on the rest of the batch by rounding only.
        """
        chunks = [self._encode(prompts[start : start + BATCH]) for start in range(0, len(prompts), BATCH)]
        values, masks = zip(*chunks, strict=True)
        return TextEmbedding(torch.cat(values), torch.cat(masks))

    def _encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        return self._hidden_states(list(prompts), self.max_tokens)

    def _hidden_states(self, prompts: list[str], length: int) -> tuple[Tensor, Tensor]:
        """Return the last hidden states of prompts padded, or cut, to `length` tokens, and their mask."""
        inputs = self.tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        mask = inputs["attention_mask"].to(self.device)
        states = self.model(input_ids=inputs["input_ids"].to(self.device), attention_mask=mask)[0]
        return states.float().cpu(), mask.bool().cpu()


class Gemma2Encoder(TransformersEncoder):
    """Gemma-2 as SANA uses it: lower-cased prompts, and token 0 plus the last T - 1 of the padded sequence.

    The two differ from a plain padded prompt only behind an instruction, whose tokens the selection leaves out.
    Source: SANA (arXiv 2410.10629) section 3.1; method.md 2.6.
    """

    def __init__(self, config: TextEncoderConfig, device: str | torch.device = "cpu") -> None:
        """Load tokenizer and weights.

        Raises:
            TextEncoderError: if the folder does not hold a Gemma-2, or as `TransformersEncoder`.
        """
        super().__init__(config, device)
        kind = self.model.config.model_type
        if kind != "gemma2":
            raise TextEncoderError(
                f"{config.folder}: got a model of type {kind!r}; expected 'gemma2'; fix: `model.text.kind: transformers` for other encoders"
            )

    def _encode(self, prompts: Sequence[str]) -> tuple[Tensor, Tensor]:
        texts = [prompt.lower().strip() for prompt in prompts]
        instruction = self.config.instruction
        if not instruction:
            return self._hidden_states(texts, self.max_tokens)
        length = len(self.tokenizer.encode(instruction)) + self.max_tokens - 2
        chosen = [0, *range(length - self.max_tokens + 1, length)]
        values, mask = self._hidden_states([instruction + text for text in texts], length)
        values, mask = values[:, chosen], mask[:, chosen]
        empty = torch.tensor([not text for text in texts])
        if empty.any():  # The null prompt goes without the instruction.
            null, null_mask = self._hidden_states([""], self.max_tokens)
            values[empty], mask[empty] = null, null_mask
        return values, mask


ENCODERS: dict[str, type[TransformersEncoder]] = {"transformers": TransformersEncoder, "gemma2": Gemma2Encoder}
"""Text encoders by `TextEncoderConfig.kind`."""


def make_encoder(config: TextEncoderConfig, device: str | torch.device = "cpu") -> TextEncoder:
    """Return the encoder that `config` names, ready to use.

    Raises:
        TextEncoderError: if it cannot be loaded.
    """
    return ENCODERS[config.kind](config, device)


def encoder_digest(config: TextEncoderConfig) -> str:
    """Return the SHA-256 of an encoder's files and of the settings that change its embeddings, without loading it.

    Where the folder lies does not matter, nor does the suffix, which is part of the prompt.

    Raises:
        TextEncoderError: if there is no such folder, or no config in it.
    """
    folder = Path(config.folder)
    if not (folder / "config.json").is_file():
        raise TextEncoderError(
            f"{folder}: got no config.json there; expected the folder of a transformers text encoder; "
            "fix: name it in `model.text.folder`; `linearsr prefetch RECIPE` brings it"
        )
    files = {path.name: _sha256(path) for path in sorted(folder.iterdir()) if path.suffix in HASHED_SUFFIXES}
    settings = [config.kind, config.max_tokens, config.precision, config.instruction]
    return hashlib.sha256(json.dumps([settings, files], sort_keys=True).encode()).hexdigest()


def encoder_parameters(config: TextEncoderConfig) -> int:
    """Return the parameters in an encoder's files, by their headers: all of a model of which the text part alone may be used.

    Raises:
        TextEncoderError: if a file of weights is damaged.
    """
    total = 0
    for path in sorted(Path(config.folder).glob("*.safetensors")):
        try:
            with safe_open(path, "pt") as file:
                total += sum(torch.Size(file.get_slice(name).get_shape()).numel() for name in file.keys())  # noqa: SIM118
        except SafetensorError as error:
            raise TextEncoderError(f"{path}: got a file that is not safetensors: {error}; fix: bring it again") from error
    return total


def encoder_bytes(config: TextEncoderConfig) -> int:
    """Return the bytes of an encoder's weights as they are held, see `encoder_parameters`."""
    return encoder_parameters(config) * DTYPES[config.precision].itemsize


def _text_part(model: Any) -> Any:
    return model.get_encoder() if model.config.is_encoder_decoder else getattr(model, "text_model", model)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _import_transformers() -> Any:
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise TextEncoderError(f'text encoder: got {error}; expected transformers; fix: pip install "linearsr[text]"') from error
