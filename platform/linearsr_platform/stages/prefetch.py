"""`linearsr prefetch`: brings the weights that a recipe needs into one folder, with a manifest of what each file is."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import Literal

from linearsr_platform import storage
from linearsr_platform.errors import StageError, UserError
from linearsr_platform.recipe.needs import Need
from linearsr_platform.recipe.weight_sources import FileSource, HubSource, hash_beginning
from linearsr_platform.stages.download import OnBytes, WrongHashError, fetch, only_one
from linearsr_platform.stages.hub_folder import bring_from_hub
from linearsr_platform.stages.weights_folder import folder_problem, is_part, unfinished
from linearsr_platform.stages.weights_manifest import FILE, WeightsRecord, read_manifest, sha256_of, write_manifest

State = Literal["present", "absent", "wrong"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Outcome:
    """What became of one need."""

    need: Need
    state: Literal["present", "brought", "would bring", "no source", "failed"]
    detail: str
    """Where it came from, or why it did not."""
    bytes: int = 0

    @property
    def is_had(self) -> bool:
        """Whether it is there, or would be."""
        return self.state in ("present", "brought", "would bring")


@dataclass(frozen=True, kw_only=True)
class Prefetch:
    """Where weights go to and come from."""

    into: Path
    mirror: str | None
    """Folder or fsspec URL that has the same files; None asks the publishers."""
    today: date
    on_bytes: Callable[[Need, int, int], None] = lambda need, done, total: None
    """Told of a download's bytes so far and in all."""

    def run(self, needs: Sequence[Need]) -> list[Outcome]:
        """Bring what is not there yet, in order; what cannot be brought does not stop the rest.

        Every file is recorded in the manifest as soon as it is there, so an interrupted run loses at most the file it was at.

        Raises:
            UserError: if the folder's manifest, or the mirror's, cannot be read.
            StageError: if another process writes into the folder.
        """
        with only_one(self.into):
            records = read_manifest(self.into)
            known = _mirror_hashes(self.mirror)
            return [self._one(need, records, known) for need in needs]

    def plan(self, needs: Sequence[Need]) -> list[Outcome]:
        """Say what `run` would do, without a look at the network."""
        records = read_manifest(self.into)
        outcomes = []
        for need in needs:
            state = self._state(need, records)
            if state == "present":
                outcomes.append(Outcome(need=need, state="present", detail="", bytes=self._bytes(need)))
                continue
            places = self._places(need)
            detail = storage.shown(places[0]) if places else _nowhere(need)
            outcomes.append(Outcome(need=need, state="would bring" if places else "no source", detail=detail))
        return outcomes

    def _one(self, need: Need, records: dict[str, WeightsRecord], known: dict[str, str]) -> Outcome:
        if self._state(need, records) == "present":
            self._record(need, records, source=None)
            return Outcome(need=need, state="present", detail="", bytes=self._bytes(need))
        reasons = []
        for place in self._places(need):
            try:
                source = self._bring(need, place, known)
            except (OSError, StageError, UserError) as error:
                reasons.append(storage.shown(str(error)))
                continue
            self._record(need, records, source=storage.shown(source))
            return Outcome(need=need, state="brought", detail=storage.shown(source), bytes=self._bytes(need))
        return Outcome(need=need, state="failed" if reasons else "no source", detail="; ".join(reasons) or _nowhere(need))

    def _places(self, need: Need) -> list[str]:
        """Return where to look, the first first."""
        if self.mirror is not None:
            return list(dict.fromkeys(storage.join(self.mirror, name) for name in (need.target, need.name)))
        if isinstance(need.source, HubSource):
            return [need.source.repository]
        return list(need.source.urls) if isinstance(need.source, FileSource) else []

    def _bring(self, need: Need, place: str, known: dict[str, str]) -> str:
        """Bring a need from one place; returns where it came from, exactly."""
        target = self.into / need.target

        def on_bytes(done: int, total: int) -> None:
            self.on_bytes(need, done, total)

        if not need.parts:
            published, mirrored = self._published(need), known.get(need.target, "")
            if mirrored and not mirrored.startswith(published):
                raise WrongHashError(f"{place}: got a mirror whose manifest says SHA-256 {mirrored}; expected {published}...")
            fetch(place, target, sha256=mirrored or published, on_bytes=on_bytes)
            return place
        if self.mirror is None:
            place = bring_from_hub(place, target, need.parts)
        else:
            _copy_folder(place, need, target, known, on_bytes)
        # The hub's client takes what is there already for the whole when it is not let in.
        problem = folder_problem(target, need.kind)
        if problem:
            raise StageError(f"{place}: got a folder with {problem}; expected config.json, *.safetensors and, for text, a tokenizer")
        return place

    def _files(self, need: Need) -> Iterator[Path]:
        """Yield the files of a need that are there."""
        target = self.into / need.target
        if not need.parts:
            yield from [target] if target.is_file() else []
            return
        yield from (file for file in sorted(target.glob("*")) if file.is_file() and is_part(file.name, need.parts))

    def _bytes(self, need: Need) -> int:
        return sum(file.stat().st_size for file in self._files(need))

    def _state(self, need: Need, records: dict[str, WeightsRecord]) -> State:
        """Tell whether a need is there, reading it whole: the hash is that of the manifest, or as the publisher says."""
        files = list(self._files(need))
        recorded = {name for name in records if name == need.target or name.startswith(f"{need.target}/")}
        if not files or (need.parts and folder_problem(self.into / need.target, need.kind)):
            return "absent"
        if recorded - {self._name(file) for file in files}:
            return "wrong"
        for file in files:
            record = records.get(self._name(file))
            expected = record.sha256 if record is not None else self._published(need)
            if expected and not sha256_of(file).startswith(expected):
                return "wrong"
        return "present"

    def _published(self, need: Need) -> str:
        """Return how the hash of a file begins, as its publisher says."""
        return hash_beginning(need.name, need.source) if isinstance(need.source, FileSource) else ""

    def _name(self, file: Path) -> str:
        return file.relative_to(self.into).as_posix()

    def _record(self, need: Need, records: dict[str, WeightsRecord], source: str | None) -> None:
        """Note what is there; None for the source keeps what was noted before."""
        before = dict(records)
        here = {self._name(file) for file in self._files(need)}
        for name in [name for name in records if name.startswith(f"{need.target}/") and name not in here]:
            del records[name]
        for file in self._files(need):
            name = self._name(file)
            old = records.get(name) if source is None else None
            users = (*(old.needed_by if old else ()), *need.needed_by)
            records[name] = WeightsRecord(
                bytes=file.stat().st_size,
                sha256=old.sha256 if old else sha256_of(file),
                source=old.source if old else source or "",
                licence=need.source.licence if need.source is not None else "",
                needed_by=tuple(dict.fromkeys(users)),
                date=old.date if old else self.today.isoformat(),
            )
        if records != before:
            write_manifest(self.into, records)


def _copy_folder(place: str, need: Need, target: Path, known: dict[str, str], on_bytes: OnBytes) -> None:
    """Copy the parts of a folder from a mirror."""
    listed = [name.removeprefix(f"{need.target}/") for name in known if name.startswith(f"{need.target}/")]
    names = listed or [file.removeprefix(place).strip("/") for file in storage.list_files(place)]
    parts = [name for name in names if is_part(name, need.parts)]
    if "config.json" not in parts or not any(name.endswith(".safetensors") for name in parts):
        raise FileNotFoundError(f"{place}: no folder with config.json and *.safetensors")
    with unfinished(target):
        for name in parts:
            fetch(storage.join(place, name), target / name, sha256=known.get(f"{need.target}/{name}", ""), on_bytes=on_bytes)


def _mirror_hashes(mirror: str | None) -> dict[str, str]:
    """Return the hashes in a mirror's manifest, if it is a folder that `linearsr prefetch` has filled."""
    if mirror is None:
        return {}
    try:
        content = storage.read_json(storage.join(mirror, FILE))
    except OSError:
        return {}
    files = content.get("files", {}) if isinstance(content, dict) else {}
    return {name: str(fields["sha256"]) for name, fields in files.items()}


def _nowhere(need: Need) -> str:
    if isinstance(need.source, FileSource) and need.source.page:
        return f"no address for programs; {need.source.page}, or a mirror (--from)"
    return "nobody is known to publish it; name its repository (--hub) or a mirror (--from)"
