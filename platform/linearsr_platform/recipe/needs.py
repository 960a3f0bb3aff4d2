"""What a recipe needs that no Python package brings: weights of metrics, codec, text encoder, tagger, and those to start from.

Imports no torch; nothing is read from disk or network.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import PurePosixPath

from linearsr.metric_table import METRICS
from linearsr_platform import storage
from linearsr_platform.errors import UserError
from linearsr_platform.recipe.schema import Recipe
from linearsr_platform.recipe.weight_sources import (
    AUTOENCODERS,
    CLIP,
    DC_AE,
    HUB_ID,
    METRIC_FILES,
    TAGGER_FILES,
    TEXT_ENCODERS,
    FileSource,
    HubSource,
)

KINDS = ("metrics", "codec", "text-encoder", "tagger", "init-weights")
"""Kinds of weights, as `linearsr prefetch --what` names them."""
RAM = ("ram_swin_large_14m.pth", "ram_tag_list.txt", "ram_tag_list_threshold.txt")
TAGGERS: dict[str, tuple[str, ...]] = {"ram": RAM, "dape": (*RAM, "DAPE.pth"), "clip": ()}
"""Taggers that need weights, with their files; `clip` is a folder."""
ALTERNATIVES = {"niqe_modelparameters.mat": "niqe_pris_params.npz"}
"""Other files that do as well: BasicSR's parameters of NIQE."""
FOLDER_PARTS = ("config.json", "*.safetensors", "*.safetensors.index.json")
"""Files of a folder that diffusers or transformers saved, as patterns."""
TEXT_PARTS = (*FOLDER_PARTS, "*.json", "*.model", "*.txt")


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """One file or folder of weights."""

    kind: str
    """One of `KINDS`."""
    target: str
    """Where `linearsr prefetch` puts it: path below its folder, with `/`."""
    needed_by: tuple[str, ...]
    """Settings that ask for it, as in `lpips in validation.metrics`."""
    key: str
    """Setting that says where it is looked for; "" for what a recipe does not name."""
    value: str | None
    """What that setting says: a path, a URL, or a hub id."""
    path: str | None
    """Where the file or folder itself is looked for; None if nobody says, or for a hub id."""
    source: FileSource | HubSource | None = None
    """Where it is published; None if that is not known."""
    parts: tuple[str, ...] = ()
    """Of a folder, the patterns of the files that belong to it; () is a file."""

    @property
    def name(self) -> str:
        """Name of the file or folder."""
        return PurePosixPath(self.target).name

    @property
    def setting_folder(self) -> str:
        """What `key` must name below the folder that `linearsr prefetch` fills."""
        return str(PurePosixPath(self.target).parent) if self.kind == "metrics" else self.target


def needs_of(recipe: Recipe, taggers: Iterable[str] = (), hubs: Mapping[str, str] | None = None) -> list[Need]:
    """Return all that a recipe needs, in the order of `KINDS`.

    Args:
        recipe: a valid recipe.
        taggers: names of taggers to be used beside it; no recipe names one.
        hubs: repositories of the Hugging Face hub by kind, instead of the known ones.

    Raises:
        UserError: for a tagger, or a kind in `hubs`, that is not known.
    """
    chosen = dict(hubs or {})
    for kind in chosen:
        if kind not in ("codec", "text-encoder"):
            raise UserError(f"--hub: got {kind!r}; expected codec=ORG/NAME or text-encoder=ORG/NAME")
    tagger_needs = [need for name in dict.fromkeys(taggers) for need in _tagger(name)]
    unique = {need.target: need for need in tagger_needs}
    return [*_metrics(recipe), *_codec(recipe, chosen), *_text(recipe, chosen), *unique.values(), *_first_weights(recipe)]


def measured_metrics(recipe: Recipe) -> dict[str, tuple[str, ...]]:
    """Return the metrics that a recipe measures, by the setting that asks for them."""
    names = dict.fromkeys(name for protocol in recipe.evaluate.protocols for name in recipe.evaluate.measured(protocol))
    where = "evaluate.protocols" if recipe.evaluate.metrics is None else "evaluate.metrics"
    return {"validation.metrics": recipe.validation.metrics, where: tuple(names)}


def _metrics(recipe: Recipe) -> Iterator[Need]:
    users: dict[str, list[str]] = {}
    for where, names in measured_metrics(recipe).items():
        for name in names:
            for file in METRICS[name].weights_files:
                users.setdefault(file, []).append(f"{name} in {where}")
    folder = recipe.validation.weights
    for file, needed_by in users.items():
        yield Need(
            kind="metrics",
            target=f"metrics/{file}",
            needed_by=tuple(dict.fromkeys(needed_by)),
            key="validation.weights",
            value=folder,
            path=None if folder is None else storage.join(folder, file),
            source=METRIC_FILES.get(file),
        )


def _codec(recipe: Recipe, hubs: Mapping[str, str]) -> Iterator[Need]:
    codec = recipe.model.codec
    if codec.source is None:
        return
    yield Need(
        kind="codec",
        target=storage.name_of(codec.source),
        needed_by=(f"{codec.kind} in model.codec",),
        key="model.codec.source",
        value=codec.source,
        path=codec.source,
        source=_hub(hubs.get("codec")) or _autoencoder(codec.source),
        parts=FOLDER_PARTS,
    )


def _autoencoder(source: str) -> HubSource | None:
    """Return where an autoencoder of that name is published; a path of two parts and a hub id look the same."""
    name = storage.name_of(source)
    if name == "dc-ae":
        return DC_AE
    if AUTOENCODERS.fullmatch(name):
        return _hub(f"mit-han-lab/{name}")
    return _hub(source) if HUB_ID.fullmatch(source) else None


def _hub(repository: str | None) -> HubSource | None:
    return None if repository is None else HubSource(repository=repository, licence="see the model card")


def _text(recipe: Recipe, hubs: Mapping[str, str]) -> Iterator[Need]:
    text = recipe.model.text
    if text is None:
        return
    name = storage.name_of(text.folder)
    yield Need(
        kind="text-encoder",
        target=name,
        needed_by=(f"{text.kind} in model.text",),
        key="model.text.folder",
        value=text.folder,
        path=text.folder,
        source=_hub(hubs.get("text-encoder")) or TEXT_ENCODERS.get(name),
        parts=TEXT_PARTS,
    )


def _tagger(name: str) -> Iterator[Need]:
    if name not in TAGGERS:
        raise UserError(f"--tagger: got {name!r}; expected one of {', '.join(TAGGERS)}; the others need no weights")
    user = (f"linearsr tag --tagger {name}",)
    if name == "clip":
        target = storage.name_of(CLIP.repository)
        yield Need(kind="tagger", target=target, needed_by=user, key="", value=None, path=None, source=CLIP, parts=TEXT_PARTS)
    for file in TAGGERS[name]:
        yield Need(kind="tagger", target=f"ram/{file}", needed_by=user, key="", value=None, path=None, source=TAGGER_FILES[file])


def _first_weights(recipe: Recipe) -> Iterator[Need]:
    url = recipe.model.init_weights
    if url is None:
        return
    folder = storage.name_of(storage.parent(url))
    made = FileSource(page="`linearsr import-sana SANA OUT` writes it", licence="that of SANA's weights")
    yield Need(
        kind="init-weights",
        target=f"{folder}/{storage.name_of(url)}",
        needed_by=("model.init_weights",),
        key="model.init_weights",
        value=url,
        path=url,
        source=made if storage.is_local(url) else FileSource(urls=(url,), licence="your own"),
    )
