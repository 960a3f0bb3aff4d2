"""From words to what a released network takes: tag ids, or a text encoder's embedding of the prompt."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from linearsr.captions import Captions
from linearsr.conditioning import TextEmbedding
from linearsr.config import TagsConfig, TextSource
from linearsr.tags import encode_tags, prompt_at_inference
from linearsr.text import TextEncoder, TextEncoderError, make_encoder


class TagReader:
    """Reads tags for one network; loads its text encoder when it is first needed, if ever."""

    def __init__(
        self,
        tags: TagsConfig,
        text: TextSource | None,
        device: str | torch.device = "cpu",
        known: Mapping[str, TextEmbedding] | None = None,
    ) -> None:
        """Keep what a bundle says of tags, and prompts of which the embedding is `known`; nothing is loaded yet."""
        self._captions, self._device = Captions(tags, text), torch.device(device)
        self._encoder: TextEncoder | None = None
        self._known = dict(known or {})

    def null(self, count: int = 1) -> Tensor | TextEmbedding:
        """Return what stands for no tags, `count` times; needs no encoder."""
        return self._captions.null(count, self._device)

    def learn(self, tags: Sequence[str]) -> None:
        """Read tags once and for all, and let the text encoder go, which may be larger than the network; other tags load it again.

        Raises:
            TextEncoderError: if the encoder is not there, or is another one.
        """
        if (found := self.embedding(tags)) is not None:
            self._known |= [found]
        self._encoder = None

    def embedding(self, tags: Sequence[str]) -> tuple[str, TextEmbedding] | None:
        """Return the prompt of tags and its embedding, on the CPU, for another reader to know; None where no encoder is needed.

        The encoder stays loaded.

        Raises:
            TextEncoderError: if the encoder is not there, or is another one.
        """
        text = self._captions.text
        if text is None or not (prompt := prompt_at_inference(tags, text.encoder.suffix)):
            return None
        known = self._known.get(prompt)
        return prompt, self._encoder_of(text).encode([prompt]) if known is None else known

    @torch.no_grad()
    def read(self, tags: Sequence[str], count: int = 1) -> Tensor | TextEmbedding:
        """Return what the network takes for tags, `count` times.

        A network that knows tags by id ignores those it does not know. One that reads prompts needs the text encoder it was trained
        with, and gets the encoder's suffix too; without tags it needs none.

        Raises:
            TextEncoderError: if the encoder is not there, or is another one.
        """
        if self._captions.text is None:
            return torch.from_numpy(encode_tags(tags, self._captions.tags)).expand(count, -1).to(self._device)
        found = self.embedding(tags)
        if found is None:
            return self.null(count)
        embedding = found[1]
        return TextEmbedding(*(part.expand(count, *part.shape[1:]).to(self._device) for part in (embedding.values, embedding.mask)))

    def _encoder_of(self, text: TextSource) -> TextEncoder:
        if self._encoder is None:
            encoder = make_encoder(text.encoder, self._device)
            if encoder.digest != text.digest:
                raise TextEncoderError(
                    f"{text.encoder.folder}: got a text encoder of digest {encoder.digest}; expected {text.digest}, with which the "
                    "model was trained; fix: name its folder with --text-encoder"
                )
            self._encoder = encoder
        return self._encoder
