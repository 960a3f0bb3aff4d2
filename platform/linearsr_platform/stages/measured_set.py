"""Measure a whole test set: pictures go to a crew one by one, what is finished stays finished, and the numbers become tables."""

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch

from linearsr.bundle import BundleError, text_of
from linearsr.codec_source import CodecError
from linearsr.conditioning import TextEmbedding
from linearsr.config import TagsConfig, TextSource
from linearsr.frechet import check_enough, frechet_inception_distance
from linearsr.kernels import Kernels
from linearsr.memory import USABLE, MemoryModel, free_bytes
from linearsr.metric_table import ARTEFACTS, metric_spec
from linearsr.metrics import MetricError, find_weights, weights_digests
from linearsr.protocols import PROTOCOLS
from linearsr.residency import Residency
from linearsr.tag_reader import TagReader
from linearsr.text import TextEncoderError
from linearsr.upscaler import Upscaler
from linearsr_platform import storage
from linearsr_platform.data.crew import Crew
from linearsr_platform.data.extras import one_thread
from linearsr_platform.errors import StageError, UserError
from linearsr_platform.recipe.identity import stable_hash
from linearsr_platform.registry.evaluation import ProtocolTable, by_metric
from linearsr_platform.stages.measuring import Measure, Measured, Measurer, Photograph, Piece, Pixels, Request, features_of, save_png
from linearsr_platform.stages.upscaling import device_here, open_bundle
from linearsr_platform.train.kernels import kernels_here

OnProgress = Callable[[int, int], None]
"""Called with the pictures that are done, and all."""
Choose = Callable[[int], Crew]
"""Returns who works on that many pieces."""


@dataclass(frozen=True, kw_only=True)
class MakeMeasurer:
    """Makes what measures one photograph and keeps its results; picklable, so that any process can call it."""

    request: Request
    bundle_url: str | None = None
    """Folder of the bundle; None for pictures that were made already."""
    codec_source: str | None = None
    """DC-AE of a bundle that has one; None is where it was."""
    text_encoder: str | None = None
    """Text encoder of a bundle that reads tags; None is where it was."""
    codec_tile: int | None = None
    """Latent positions along a side of the DC-AE's tiles; None takes the bundle's."""
    prompts: Mapping[str, TextEmbedding] = field(default_factory=dict)
    """Embeddings of prompts: what is among them needs no text encoder."""
    largest_lr_px: tuple[int, int] | None = None
    """(height, width) of the LR picture with the most pixels: one expert at a time is held where all and that picture do not fit into
    what is free, which gives the same pictures. None holds all."""
    part_of_device: float = 1.0
    """Of the free memory that is this process's."""
    device: str = "cpu"
    compiled_kernels: bool = False
    """Whether CPUs compute with kernels that each machine compiles."""
    pictures_url: str | None = None
    """Folder that gets every picture; None keeps none."""
    results_url: str | None = None
    """Folder that gets each photograph's numbers; None keeps none."""

    def __call__(self) -> Measure:
        """Load the model and the metrics.

        Raises:
            UserError: if either cannot be loaded.
        """
        with _told():
            kernels = kernels_here(wanted=self.compiled_kernels)
            measurer = Measurer(self.request, self._upscaler(kernels), None if self.pictures_url is None else self._keep, kernels)

        def measure(piece: Piece) -> Measured:
            photograph = piece.load()
            with _told(photograph.name):
                found = measurer(photograph)
            if self.results_url is not None:
                # Last, so that a photograph with numbers has its pictures too.
                storage.write_text(_file(self.results_url, photograph.name), found.to_json())
            return found

        return measure

    def _upscaler(self, kernels: Kernels | None) -> Upscaler | None:
        if self.bundle_url is None:
            return None
        device = device_here(self.device)
        with ExitStack() as stack:
            folder = stack.enter_context(storage.local_path(self.bundle_url))
            bundle = open_bundle(folder, self.codec_source, self.text_encoder, self.codec_tile)
            residency: Residency = "all"
            if self.largest_lr_px is not None:
                budget_bytes = int(free_bytes(device) * USABLE * self.part_of_device)
                residency = MemoryModel.of(bundle, device.type).residency(self.largest_lr_px, budget_bytes)
            reader = TagReader(bundle.config.tags, bundle.text, device, self.prompts)
            upscaler = Upscaler(bundle, device=device, residency=residency, reader=reader, kernels=kernels)
            if residency == "one":
                # Its files are read again and again.
                weakref.finalize(upscaler, stack.pop_all().close)
            return upscaler

    def _keep(self, photograph: Photograph, row: str, picture: Pixels) -> None:
        assert self.pictures_url is not None  # noqa: S101 (only then it is called)
        with storage.atomic_file(storage.join(self.pictures_url, f"{photograph.name}-{row}.png")) as path:
            save_png(picture, path)


@dataclass(frozen=True, kw_only=True)
class Tagged:
    """Tags to read, of one photograph at least."""

    name: str
    tags: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class MakeTagReading:
    """Makes what embeds the prompt of tags; picklable. Apart from measuring: a text encoder may be larger than all experts together."""

    text: TextSource
    device: str = "cpu"

    def __call__(self) -> Callable[[Tagged], tuple[str, TextEmbedding] | None]:
        """Return it; the encoder is loaded by the first tags."""
        reader = TagReader(TagsConfig(encoder="text"), self.text, device_here(self.device))

        def read(tagged: Tagged) -> tuple[str, TextEmbedding] | None:
            with _told(tagged.name), one_thread():
                return reader.embedding(tagged.tags)

        return read


def tag_reading(bundle: Path, text_encoder: str | None, device: str) -> MakeTagReading | None:
    """Return what reads tags for the bundle in a folder, by its text encoder or the same in another folder; None if it needs none.

    Raises:
        UserError: if there is no bundle.
    """
    with _told():
        text = text_of(bundle)
    if text is None:
        return None
    encoder = text.encoder if text_encoder is None else replace(text.encoder, folder=text_encoder)
    return MakeTagReading(text=replace(text, encoder=encoder), device=device)


def read_tags(photographs: Sequence[Piece], make: MakeTagReading, choose: Choose) -> dict[str, TextEmbedding]:
    """Return what a text encoder makes of the tags of photographs, by prompt; each prompt is read once, and the encoder let go.

    Raises:
        UserError: if the encoder is not there, or is another one.
        StageError: if whoever read tags died.
    """
    every = {one.tags: Tagged(name=one.name, tags=one.tags) for one in photographs if one.tags}
    found = choose(len(every)).map_unordered(make, list(every.values())) if every else iter(())
    return dict(embedding for _, embedding in found if embedding is not None)


def check_request(request: Request, count: int) -> None:
    """Refuse what cannot be measured before anything is made.

    Raises:
        UserError: if weights are missing, or there are too few pictures for a metric of a whole set.
    """
    with _told():
        for metric in {metric for metrics in request.metrics.values() for metric in metrics}:
            find_weights(metric, None if request.weights is None else Path(request.weights))
            if metric_spec(metric).scope == "set":
                check_enough(count)


def measure_all(
    photographs: Sequence[Piece],
    make: MakeMeasurer,
    choose: Choose,
    progress: OnProgress,
    read: Callable[[Sequence[Piece]], Mapping[str, TextEmbedding]] = lambda _: {},
) -> list[Measured]:
    """Measure every photograph that was not measured yet; the result is in their order, whoever does what when.

    Args:
        photographs: with names that differ.
        make: what a crew's processes call.
        choose: returns who works on that many photographs.
        progress: is told what is done.
        read: embeds the prompts of photographs, before anything is measured; see `read_tags`. What it leaves out is read when it is needed.

    Raises:
        UserError: if a model or metric cannot be used, or a picture does not suit it.
        StageError: if whoever worked on a picture died.
    """
    check_request(make.request, len(photographs))
    found = [_earlier(make.results_url, photograph) for photograph in photographs]
    left = [place for place, measured in enumerate(found) if measured is None]
    done = len(photographs) - len(left)
    progress(done, len(photographs))
    if left:
        pieces = [photographs[place] for place in left]
        make = replace(make, prompts={**make.prompts, **read(pieces)})
        for position, measured in choose(len(left)).map_unordered(make, pieces):
            found[left[position]] = measured
            done += 1
            progress(done, len(photographs))
    every = [measured for measured in found if measured is not None]
    if len(every) < len(photographs):
        missing = [photograph.name for photograph, measured in zip(photographs, found, strict=True) if measured is None]
        raise StageError(f"evaluate: got no numbers of {missing[0]}; expected those of all {len(photographs)} pictures; fix: run it again")
    return every


def tables_of(
    names: Sequence[str], measured: Sequence[Measured], request: Request, rows: Sequence[str], how: Mapping[str, object]
) -> dict[str, ProtocolTable]:
    """Make the table of each protocol.

    Args:
        names, measured: of each photograph, in the same order.
        request: what was measured.
        rows: those that go into the tables.
        how: what besides protocol and weights must be equal for two tables to be comparable.
    """
    tables = {}
    for protocol, metrics in request.metrics.items():
        values = {row: {name: one.values[protocol][row] for name, one in zip(names, measured, strict=True)} for row in rows}
        digests = weights_digests((*metrics, *ARTEFACTS), request.weights)
        facts = {"name": protocol, "metrics": PROTOCOLS[protocol].describe(), "weights": digests, **how}
        of_the_set = {row: {"fid": _fid(protocol, row, measured)} for row in rows} if "fid" in metrics else None
        tables[protocol] = ProtocolTable.of(
            protocol=facts, test_set=test_set_hash(measured), values=by_metric(values), of_the_set=of_the_set
        )
    return tables


def test_set_hash(measured: Sequence[Measured]) -> str:
    """Return the identity of a test set: names and pixels, in whatever order."""
    return stable_hash(sorted(one.digest for one in measured))


def tags_read(measured: Sequence[Measured]) -> str:
    """Say of how many pictures a model read tags of the LR image, with their hash; of the others it read the original's, if any."""
    told = f"of the LR image: {sum(one.lr_tags is not None for one in measured)} of {len(measured)}"
    return ", ".join([told, *_lr_tags_hash(measured)])


def tags_told(photographs: Sequence[Photograph], measured: Sequence[Measured]) -> str:
    """Say to a reader whose tags a model was told, of how many pictures each: `tags_read` is to be equal, and leaves some out."""
    whose = ["of an LR image" if one.tags_of_lr else "of the original" if one.tags else "none" for one in photographs]
    kinds = {"of an LR image": "".join(f" ({found})" for found in _lr_tags_hash(measured)), "of the original": "", "none": ""}
    parts = [f"{kind} for {whose.count(kind)} of {len(whose)}{told}" for kind, told in kinds.items() if kind in whose]
    return f"told: {', '.join(parts)}"


def check_names(names: Sequence[str]) -> None:
    """Refuse a test set in which two pictures have one name, of which one would be lost.

    Raises:
        UserError: naming one of them.
    """
    twice = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if twice:
        raise UserError(f"test set: got {names.count(twice[0])} pictures named {twice[0]!r}; expected names that differ; fix: rename one")


def _lr_tags_hash(measured: Sequence[Measured]) -> list[str]:
    """Return the hash of the tags of LR images that were read; nothing if there were none."""
    read = sorted((one.digest, one.lr_tags) for one in measured if one.lr_tags is not None)
    return [stable_hash(read)[:12]] if read else []


def _fid(protocol: str, row: str, measured: Sequence[Measured]) -> float:
    sets = [np.stack([features_of(one.features[protocol][which]) for one in measured]) for which in (row, "original")]
    with _told():
        return frechet_inception_distance(*sets)


def _earlier(results_url: str | None, photograph: Piece) -> Measured | None:
    """Return what an interrupted run has measured of the very same pixels and tags of the LR image."""
    if results_url is None or not storage.exists(file := _file(results_url, photograph.name)):
        return None
    try:
        found = Measured.from_json(storage.read_text(file))
    except ValueError:
        return None
    now = photograph.load()
    return found if (found.digest, found.lr_tags) == (now.digest, now.lr_tags) else None


def _file(results_url: str, name: str) -> str:
    return storage.join(results_url, f"{name}.json")


@contextmanager
def _told(name: str = "evaluate") -> Iterator[None]:
    """Turn refusals of model and metrics, which are the user's to mend, into the user's errors, and lost memory into one about `name`."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        # A picture is made whole: others would not be the numbers of the protocol.
        fix = "--device cpu, smaller pictures, or a machine with more memory; what is finished is kept"
        raise StageError(f"{name}: ran out of memory; expected enough for an expert and the whole picture; fix: {fix}") from error
    except (MetricError, BundleError, CodecError, TextEncoderError) as error:
        raise UserError(str(error)) from error
