"""What shards may hold beside pictures: embeddings of prompts, and latents."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray

from linearsr.codec import Codec, make_codec
from linearsr.codec_source import verify_codec
from linearsr.config import CodecConfig, TextEncoderConfig, TextSource
from linearsr.tags import prompt_at_inference
from linearsr.text import TextEncoder, make_encoder
from linearsr_platform.data.images import Pixels
from linearsr_platform.data.manifest import LatentSource
from linearsr_platform.errors import StageError, UserError

KEPT_PROMPTS = 4096
"""Embeddings that are remembered, the last ones used: some 115 kB each of 25 tokens of Gemma-2, and most photographs have their own."""


class TextCache:
    """Embeds prompts once each, as shards keep them. Pickled, it is only its config: who unpickles it loads the encoder."""

    def __init__(self, config: TextEncoderConfig, encoder: TextEncoder, device: str = "cpu") -> None:
        """Keep the loaded encoder of a config; `device` says where who unpickles the cache has it."""
        self.config, self.digest, self._device = config, encoder.digest, device
        self._encoder: TextEncoder | None = encoder
        self._known: dict[str, NDArray[np.float16]] = {}

    def embed(self, tags: Sequence[str], suffix: str = "") -> NDArray[np.float16]:
        """Return the embedding (tokens, width) of the prompt of tags, at inference with the encoder's suffix.

        Raises:
            UserError: if it does not fit into float16.
        """
        prompt = prompt_at_inference(tags, suffix)
        if prompt not in self._known:
            self._known[prompt] = self._embedding(prompt)
        else:
            self._known[prompt] = self._known.pop(prompt)
        while len(self._known) > KEPT_PROMPTS:
            del self._known[next(iter(self._known))]
        return self._known[prompt]

    @property
    def source(self) -> TextSource:
        """What a network must know of the embeddings."""
        null = tuple(tuple(float(value) for value in token) for token in self.embed(()))
        return TextSource(encoder=self.config, digest=self.digest, null=null)

    def let_go(self) -> None:
        """Forget the encoder, which may take gigabytes, where others embed prompts: what `source` needs is known then."""
        self.embed(())
        self._encoder = None

    def _embedding(self, prompt: str) -> NDArray[np.float16]:
        if self._encoder is None:
            self._encoder = _encoder_of(self.config, self.digest, "cpu")
        with one_thread():
            embedding = self._encoder.encode([prompt])
        values: NDArray[np.float16] = embedding.values[0][embedding.mask[0]].half().numpy()
        if not np.isfinite(values).all():
            raise UserError(f"model.text.folder: got an embedding of {prompt!r} beyond 65504; expected an encoder that float16 can hold")
        return values

    def __reduce__(self) -> tuple[object, tuple[TextEncoderConfig, str, str]]:
        """Travel without the weights."""
        return _cache_of, (self.config, self.digest, self._device)


@lru_cache(maxsize=1)
def _cache_of(config: TextEncoderConfig, digest: str, device: str) -> TextCache:
    """Load the encoder, once a process."""
    return TextCache(config, _encoder_of(config, digest, device), device)


def _encoder_of(config: TextEncoderConfig, digest: str, device: str) -> TextEncoder:
    """Load an encoder, and refuse another one than the driver has."""
    encoder = make_encoder(config, device)
    if encoder.digest != digest:
        raise StageError(
            f"{config.folder}: got an encoder of hash {encoder.digest}; expected {digest}, as the driver has; fix: copy it here"
        )
    return encoder


@dataclass(frozen=True)
class LatentMaker:
    """Encodes pictures with the recipe's codec; picklable, weights are loaded by who uses it."""

    config: CodecConfig
    digest: str
    """`codec_digest(config)` of the driver."""
    device: str = "cpu"

    def encode(self, pixels: Pixels) -> NDArray[np.float16]:
        """Return the latent (c, H // f, W // f) of a picture (H, W, 3), not normalised, that of its largest part at the upper left.

        On a CPU one picture gives the same bytes in every process: sums run in one thread.

        Raises:
            UserError: if it does not fit into float16.
            CodecError: if this machine has another codec.
        """
        factor = self.config.factor
        height, width = (side // factor * factor for side in pixels.shape[:2])
        part = torch.from_numpy(pixels[:height, :width].copy()).to(self.device).permute(2, 0, 1)[None].float() / 127.5 - 1
        with one_thread(), torch.no_grad():
            latent = _codec_of(self.config, self.digest).encode(part)[0]
        values: NDArray[np.float16] = latent.half().cpu().numpy()
        if not np.isfinite(values).all():
            raise UserError("data.latents: got a latent beyond 65504 or not finite; expected a codec that float16 can hold")
        return values

    @property
    def source(self) -> LatentSource:
        """What a reader must know of the latents."""
        return LatentSource(codec=self.digest, channels=self.config.latent_channels, factor=self.config.factor)


@lru_cache(maxsize=1)
def _codec_of(config: CodecConfig, digest: str) -> Codec:
    verify_codec(config, digest)
    return make_codec(config)


@contextmanager
def one_thread() -> Iterator[None]:
    """Keep torch to one thread inside the block: the order of sums, hence their last bits, depends on the number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
