"""Enlarge many pictures, here or in a worker: one model, a plan for each, and a word on each."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path, PurePosixPath

import torch

from linearsr.bundle import Bundle, BundleError, load_bundle, with_codec_tile, with_text_encoder
from linearsr.codec_source import CodecError
from linearsr.enlarge import Enlargement, enlarge, plan_enlargement
from linearsr.kernels import Kernels
from linearsr.memory import USABLE, MemoryModel, MemoryPlan, PictureTooLarge, free_bytes, shown_bytes
from linearsr.picture_files import check_size, encode_picture, fit_format
from linearsr.pictures import Picture, PictureError, decode_picture
from linearsr.residency import Residency
from linearsr.sizing import SizePlan
from linearsr.tag_reader import TagReader
from linearsr.text import TextEncoderError
from linearsr.timing import Stopwatch
from linearsr.upscaler import Upscaler
from linearsr_platform import storage
from linearsr_platform.data.picture_shards import Members, read_members, write_members
from linearsr_platform.data.shard_files import ShardAwayError
from linearsr_platform.errors import StageError, UserError
from linearsr_platform.remote import shown
from linearsr_platform.stages.picture_work import Job
from linearsr_platform.stages.shard_samples import check_names, corrected, is_picture, new_name, note_on_copied, nothing_enlarged
from linearsr_platform.train.kernels import kernels_here

REFUSALS = (PictureError, PictureTooLarge, StageError)
"""What is wrong with one picture or shard, and no reason to leave out the others."""
LEFT_OUT = "; left out of the new shard, which counts as done: --overwrite makes it again"
"""Said of a sample that failed."""


class _NothingLeftError(Exception):
    """A shard would hold no enlarged picture."""


@dataclass(frozen=True, slots=True)
class Machine:
    """Where it runs and what may be used."""

    device: torch.device
    memory_bytes: int
    residency: Residency | None = None
    """None is chosen for each picture."""
    tile: int | None = None
    """Tokens along a tile's side; None is chosen for each picture."""
    cuts: bool = True
    """Whether a picture that does not fit whole may be cut into tiles that nobody asked for: how depends on the memory, and pictures on
    how they are cut."""
    kernels: Kernels | None = None
    """What the network computes with on a CPU; None is plain torch."""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one picture."""

    source: str
    target: str
    status: str
    """`done`, `skipped`, `failed` or `planned`."""
    notes: tuple[str, ...] = ()
    sizes: SizePlan | None = None
    memory: MemoryPlan | None = None

    def as_json(self) -> dict[str, object]:
        """Return it JSON-able; `codec_tile` is columns and rows of latents, null where no DC-AE is counted."""
        facts: dict[str, object] = {"source": self.source, "target": self.target, "status": self.status, "notes": list(self.notes)}
        if self.sizes is not None:
            facts |= {"width_px": self.sizes.output[0], "height_px": self.sizes.output[1]}
        if self.memory is not None:
            facts |= {"tokens": self.memory.num_tokens, "tiles": self.memory.tiling.num_tiles, "residency": self.memory.residency}
            facts |= {"memory_bytes": self.memory.peak_bytes, "memory_limit_bytes": self.memory.budget_bytes}
            facts |= {"codec_weight_bytes": self.memory.codec_weight_bytes, "codec_bytes": self.memory.codec_bytes}
            facts |= {"codec_counted": self.memory.codec_counted, "codec_tile": None}
            if self.memory.codec_tile is not None:
                facts["codec_tile"] = list(reversed(self.memory.codec_tile))
        return facts

    def lines(self) -> Iterator[str]:
        """Say it in lines of text."""
        if self.sizes is not None and self.memory is not None and self.status == "planned":
            yield f"{self.source}  {_size(self.sizes.given)} to {_size(self.sizes.output)}: {describe(self.memory)}"
        elif self.sizes is not None:
            yield f"{self.target}  {_size(self.sizes.output)}"
        elif self.status == "skipped":
            yield f"{self.target}  exists and is kept; --overwrite replaces it"
        yield from (f"{self.source}: {note}" for note in self.notes)


@dataclass
class UpscaleRun:
    """Enlarges files one after the other; the model is loaded when the first one needs it. Files do not depend on those before them."""

    bundle: Bundle
    request: Enlargement
    machine: Machine
    stopwatch: Stopwatch
    _upscaler: Upscaler | None = None
    _reader: TagReader | None = None
    _residency: Residency | None = None
    """Of the loaded model."""

    @cached_property
    def memory(self) -> MemoryModel:
        """What the plan needs, read with the first picture: a DC-AE is counted by diffusers, which is slow to import."""
        return MemoryModel.of(self.bundle, self.machine.device.type)

    def plan(self, job: Job) -> list[Outcome]:
        """Say what would be done with a file, picture by picture, without a network."""
        if not job.is_shard:
            return [self._planned(job.name, shown(job.target), partial(read_source, job))]
        found = []
        kinds: Counter[str] = Counter()
        for key, members in read_members(job.source):
            kinds.update(members.keys())
            for name in members:
                if is_picture(name):
                    read = partial(decode_picture, members[name], f"{job.name}: {key}.{name}")
                    found.append(self._planned(f"{job.name}: {key}.{name}", shown(job.target), read))
        return found or [_failed(job.name, shown(job.target), nothing_enlarged(job.name, kinds))]

    def enlarge(self, job: Job) -> list[Outcome]:
        """Enlarge a file and write it whole or not at all; what is refused is an outcome too."""
        if job.is_shard:
            return self._enlarge_shard(job)
        try:
            with self.stopwatch.section("read"):
                picture = read_source(job)
            content, outcome = self._enlarge_picture(picture, job.name, shown(job.target), PurePosixPath(job.target).suffix)
        except REFUSALS as error:
            return [_failed(job.name, shown(job.target), error)]
        with self.stopwatch.section("write"):
            storage.write_bytes(job.target, content)
        return [outcome]

    def _enlarge_shard(self, job: Job) -> list[Outcome]:
        outcomes: list[Outcome] = []
        kinds: Counter[str] = Counter()
        try:
            write_members(job.target, self._enlarged_samples(job, outcomes, kinds))
        except _NothingLeftError:
            return outcomes or [_failed(job.name, shown(job.target), nothing_enlarged(job.name, kinds))]
        except (StageError, ShardAwayError) as error:
            return [_failed(job.name, shown(job.target), error)]
        first = next(place for place, outcome in enumerate(outcomes) if outcome.status != "failed")
        if (note := note_on_copied(kinds)) is not None:
            outcomes[first] = replace(outcomes[first], notes=(*outcomes[first].notes, note))
        return [_left_out(outcome) if outcome.status == "failed" else outcome for outcome in outcomes]

    def _enlarged_samples(self, job: Job, outcomes: list[Outcome], kinds: Counter[str]) -> Iterator[tuple[str, Members]]:
        """Yield each sample with its pictures enlarged; a sample with a picture that cannot be is left out.

        Raises:
            _NothingLeftError: at the end, if no picture was enlarged.
        """
        for key, members in read_members(job.source):
            kinds.update(members.keys())
            made: dict[str, bytes] = {}
            done: list[Outcome] = []
            try:
                check_names(f"{job.name}: {key}", members)
                for name, content in members.items():
                    renamed, new_content = new_name(name), content
                    if is_picture(name):
                        called = f"{job.name}: {key}.{name}"
                        with self.stopwatch.section("read"):
                            picture = decode_picture(content, called)
                        new_content, outcome = self._enlarge_picture(
                            picture, called, f"{shown(job.target)}: {key}.{renamed}", f".{renamed}"
                        )
                        done.append(outcome)
                    made[renamed] = new_content
            except REFUSALS as error:
                outcomes.append(_failed(f"{job.name}: {key}", shown(job.target), error))
                continue
            outcomes += done
            if len(done) == 1 and done[0].sizes is not None:
                made = corrected(made, done[0].sizes)
            yield key, made
        if all(outcome.status == "failed" for outcome in outcomes):
            raise _NothingLeftError

    def _enlarge_picture(self, picture: Picture, source: str, target: str, suffix: str) -> tuple[bytes, Outcome]:
        sizes, plan = self._plans(picture)
        check_size(sizes.output, suffix)
        upscaler = self._loaded(plan.residency)
        try:
            large = fit_format(enlarge(upscaler, picture, self.request, tile=plan.tile), suffix)
        except (torch.OutOfMemoryError, MemoryError) as error:
            # The plan is an estimate, and others may have taken memory since.
            raise PictureTooLarge(
                f"memory: ran out of it on {_size(picture.size)} px, where {shown_bytes(plan.peak_bytes)} were planned; expected enough; "
                "fix: --memory GB or --tile TOKENS with less"
            ) from error
        with self.stopwatch.section("write"):
            content = encode_picture(large, suffix)
        tiled = () if plan.tile is None else (describe(plan),)
        return content, Outcome(source, target, "done", (*large.notes, *tiled), sizes, plan)

    def _planned(self, source: str, target: str, read: Callable[[], Picture]) -> Outcome:
        try:
            picture = read()
            sizes, plan = self._plans(picture)
        except REFUSALS as error:
            return _failed(source, target, error)
        return Outcome(source, target, "planned", (*picture.notes, *((sizes.note,) if sizes.note else ())), sizes, plan)

    def _plans(self, picture: Picture) -> tuple[SizePlan, MemoryPlan]:
        machine = self.machine
        sizes, plan = plan_enlargement(
            picture.size, self.request, self.memory, machine.memory_bytes, residency=machine.residency, tile=machine.tile
        )
        if plan.tile is not None and machine.tile is None and not machine.cuts:
            raise PictureTooLarge(
                f"memory: got {shown_bytes(machine.memory_bytes)} for a worker; expected enough for {_size(picture.size)} px whole: in "
                "tiles it would depend on how much a worker has; fix: --memory GB or --tile TOKENS, the same for all, or larger workers"
            )
        return sizes, plan

    def _loaded(self, residency: Residency) -> Upscaler:
        """Return the model, loaded; one that holds fewer experts than it might is right for every picture, and gives the same."""
        if self._upscaler is None or (residency, self._residency) == ("one", "all"):
            # Both at once may not fit.
            self._upscaler, self._residency = None, residency
            try:
                with self.stopwatch.section("text"):
                    # Before the network is loaded, and gone by then: SANA's encoder is as large as all experts.
                    self._reader = self._reader or self._taught()
                with self.stopwatch.section("load"):
                    self._upscaler = Upscaler(
                        self.bundle,
                        device=self.machine.device,
                        residency=residency,
                        stopwatch=self.stopwatch,
                        reader=self._reader,
                        kernels=self.machine.kernels,
                    )
            except (CodecError, TextEncoderError) as error:
                # Not this picture's fault: no other would fare better.
                raise UserError(str(error)) from error
        return self._upscaler

    def _taught(self) -> TagReader:
        reader = TagReader(self.bundle.config.tags, self.bundle.text, self.machine.device)
        reader.learn(self.request.tags)
        return reader


def read_source(job: Job) -> Picture:
    """Read the picture of a job, local or remote.

    Raises:
        PictureError: if it cannot be read or decoded.
    """
    try:
        content = storage.read_bytes(job.source)
    except OSError as error:
        reason = error.strerror or shown(str(error))
        raise PictureError(f"{job.name}: cannot be read: {reason}; expected a picture file; fix: check the path") from error
    return decode_picture(content, job.name)


def device_here(name: str) -> torch.device:
    """Return a device of this machine; `auto` is CUDA where there is one.

    Raises:
        UserError: if there is no such device.
    """
    try:
        chosen = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name)
    except RuntimeError as error:
        raise UserError(f"--device: got {name!r}; expected auto, cpu or cuda") from error
    number = torch.cuda.device_count() if chosen.type == "cuda" else 0
    if chosen.type not in ("cpu", "cuda") or (chosen.type == "cuda" and (chosen.index or 0) >= number):
        raise UserError(f"--device: got {name!r}; expected a device of this machine; fix: --device cpu")
    return chosen


def machine_here(
    device: str,
    memory_gb: float | None,
    residency: Residency | None,
    tile: int | None,
    *,
    share: float = 1.0,
    cuts: bool = True,
    compiled_kernels: bool = False,
) -> Machine:
    """Return this process's machine as options ask for it.

    Args:
        device: of torch; `auto` is CUDA where there is one.
        memory_gb: memory to use; None takes most of what is free now.
        residency, tile, cuts: see `Machine`.
        share: part of the free memory that is this process's, if `memory_gb` is None.
        compiled_kernels: whether a CPU computes with kernels that are compiled here.

    Raises:
        UserError: if this machine has no such device, or no compiler for the kernels.
    """
    chosen = device_here(device)
    memory_bytes = int(free_bytes(chosen) * USABLE * share) if memory_gb is None else int(memory_gb * 1e9)
    return Machine(chosen, memory_bytes, residency, tile, cuts, kernels_here(wanted=compiled_kernels and chosen.type == "cpu"))


def open_bundle(folder: Path, codec: str | None, text_encoder: str | None, codec_tile: int | None) -> Bundle:
    """Return a bundle, checked against its hashes, with text encoder and DC-AE where they are on this machine.

    Args:
        folder: of the bundle.
        codec, text_encoder: where they are; None is where they were.
        codec_tile: latent positions along a side of the DC-AE's tiles; None takes the bundle's.

    Raises:
        UserError: if something is missing, or is another than it was.
    """
    try:
        bundle = load_bundle(folder, codec_source=codec)
        bundle = bundle if codec_tile is None else with_codec_tile(bundle, codec_tile)
        return bundle if text_encoder is None else with_text_encoder(bundle, text_encoder)
    except BundleError as error:
        raise UserError(str(error)) from error


def describe(plan: MemoryPlan) -> str:
    """Say how a picture is run, in one line."""
    grid = f"{plan.tiling.grid[1]} x {plan.tiling.grid[0]} tokens"
    rows, columns = (len(starts) for starts in plan.tiling.starts)
    tile = f"{columns} x {rows} tiles of {plan.tiling.side[1]} x {plan.tiling.side[0]}, overlap {plan.tiling.overlap}"
    cut = "whole" if plan.tile is None else tile
    experts = "all experts" if plan.residency == "all" else "one expert at a time"
    return f"{grid}, {cut}, {experts}, {shown_bytes(plan.peak_bytes)} of {shown_bytes(plan.budget_bytes)} ({plan.parts})"


def timing_table(stopwatch: Stopwatch) -> str:
    """Return the split of the time as text: name, count, milliseconds, share; the rows add up to the last."""
    sections, total_s = stopwatch.report()
    rows = [f"{'part':<12}{'count':>7}{'ms':>12}{'ms each':>12}{'share':>8}"]
    for one in sections:
        each_ms = 1000 * one.seconds / max(one.count, 1)
        rows.append(f"{one.name:<12}{one.count:>7}{1000 * one.seconds:>12.1f}{each_ms:>12.2f}{one.seconds / total_s:>8.1%}")
    return "\n".join([*rows, f"{'total':<12}{'':>7}{1000 * total_s:>12.1f}"])


def timings_as_json(stopwatch: Stopwatch) -> dict[str, object]:
    """Return the split of the time JSON-able, in seconds."""
    sections, total_s = stopwatch.report()
    return {"parts": [{"name": one.name, "count": one.count, "seconds": one.seconds} for one in sections], "total_s": total_s}


def failures(outcomes: Sequence[Outcome]) -> list[str]:
    """Return the reasons of everything that failed."""
    return [note for outcome in outcomes if outcome.status == "failed" for note in outcome.notes]


def _failed(source: str, target: str, error: Exception) -> Outcome:
    reason = str(error)
    return Outcome(source, target, "failed", (reason if source in reason else f"{source}: {reason}",))


def _left_out(outcome: Outcome) -> Outcome:
    """Say of a failed sample that the shard is there without it."""
    return replace(outcome, notes=tuple(note + LEFT_OUT for note in outcome.notes))


def _size(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
