"""The ledger of a search: one file a trial, written whole at every turn, so that a search that was killed goes on where it was."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from linearsr_platform import storage
from linearsr_platform.errors import UserError
from linearsr_platform.json_numbers import nan_for_null, null_for_nan
from linearsr_platform.report.search_model import TrialRow, TrialState

PREFIX = "trial-"


@dataclass(frozen=True, kw_only=True)
class RungResult:
    """What a trial reported at a rung."""

    steps: int
    score: float
    score_error: float
    measured: dict[str, list[float]]
    """Every metric of every crop."""
    experts: tuple[str, ...]
    """Names of the expert trainings it consists of; equal names are one training."""
    order: int
    """Number among all reports of the search, from 1."""


@dataclass(frozen=True, kw_only=True)
class TrialRecord:
    """Everything that is known about a trial."""

    name: str
    config: dict[str, int]
    """As the searcher suggested it."""
    boundaries: tuple[float, ...]
    origin: str
    state: TrialState = "running"
    results: tuple[RungResult, ...] = ()
    """Ascending rungs."""
    seconds: float = 0.0
    """Time from its first start to its last report, over all restarts."""
    reason: str = ""
    run_id: str | None = None
    """MLflow run."""

    @property
    def ended(self) -> bool:
        """Whether nothing more will be done for it."""
        return self.state in ("stopped", "done", "failed")

    @property
    def last(self) -> RungResult | None:
        """The result of its highest rung."""
        return self.results[-1] if self.results else None

    def with_result(self, result: RungResult) -> "TrialRecord":
        """Add a result; one of a rung that it reported before changes nothing."""
        if any(known.steps == result.steps for known in self.results):
            return self
        return replace(self, results=(*self.results, result))


class Ledger:
    """All trials of a search, by name, in the order in which they began."""

    def __init__(self, url: str) -> None:
        """Read what earlier attempts left in a folder.

        Raises:
            UserError: if a file is no record of a trial.
        """
        self._url = url
        self.records: dict[str, TrialRecord] = {}
        for file in storage.list_files(url, f"{PREFIX}*.json"):
            try:
                record = _record(storage.read_json(file))
                self.records[record.name] = record
            except (AttributeError, KeyError, TypeError, ValueError) as error:
                told = f"{file}: got what no search writes ({error}); expected the record of a trial"
                raise UserError(f"{told}; fix: delete it: the trial is done again") from error

    def put(self, record: TrialRecord) -> None:
        """Keep a record, whole or not at all."""
        self.records[record.name] = record
        # A trial whose picture has a broken pixel has no score, and is no reason to end the search.
        storage.write_json(storage.join(self._url, f"{record.name}.json"), null_for_nan(asdict(record)))

    def begin(self, config: Mapping[str, int], boundaries: tuple[float, ...], origin: str) -> TrialRecord:
        """Return the record of a trial that begins: the one that was interrupted with this very config, or a new one."""
        wanted = dict(config)
        for record in self.records.values():
            if not record.ended and record.config == wanted:
                return record
        record = TrialRecord(name=f"{PREFIX}{len(self.records) + 1:03d}", config=wanted, boundaries=boundaries, origin=origin)
        self.put(record)
        return record

    @property
    def ended(self) -> list[TrialRecord]:
        """Trials that have ended."""
        return [record for record in self.records.values() if record.ended]

    @property
    def unfinished(self) -> list[TrialRecord]:
        """Trials that were interrupted."""
        return [record for record in self.records.values() if not record.ended]

    def next_order(self) -> int:
        """Return the number of the next report."""
        return 1 + max((result.order for record in self.records.values() for result in record.results), default=0)

    def rows(self, rungs: Sequence[int], doing: Mapping[str, str]) -> list[TrialRow]:
        """Return all trials as they are shown; `doing` says what running ones are at, by name."""
        trained = self._trained()
        return [_row(record, trained[record.name], rungs[-1], doing.get(record.name, "")) for record in self.records.values()]

    def _trained(self) -> dict[str, int]:
        """Count for each trial the experts that were first trained for it; the rest it found trained."""
        counts = dict.fromkeys(self.records, 0)
        seen: set[str] = set()
        reports = [(result.order, record.name, result.experts) for record in self.records.values() for result in record.results]
        for _, name, experts in sorted(reports):
            counts[name] += len(set(experts) - seen)
            seen |= set(experts)
        return counts


def _row(record: TrialRecord, trained: int, last_rung: int, doing: str) -> TrialRow:
    last = record.last
    return TrialRow(
        name=record.name,
        boundaries=record.boundaries,
        origin=record.origin,
        state=record.state,
        rung=0 if last is None else last.steps,
        rungs=last_rung,
        score=None if last is None else last.score,
        score_error=None if last is None else last.score_error,
        trained=trained,
        cached=sum(len(result.experts) for result in record.results) - trained,
        seconds=record.seconds,
        doing=doing,
        reason=record.reason,
    )


def _record(value: Any) -> TrialRecord:
    results = tuple(_result(result) for result in value["results"])
    return TrialRecord(**{**value, "boundaries": tuple(value["boundaries"]), "results": results})


def _result(value: Any) -> RungResult:
    scores = {name: nan_for_null(value[name]) for name in ("score", "score_error")}
    measured = {metric: [nan_for_null(number) for number in numbers] for metric, numbers in value["measured"].items()}
    return RungResult(**{**value, **scores, "measured": measured, "experts": tuple(value["experts"])})
