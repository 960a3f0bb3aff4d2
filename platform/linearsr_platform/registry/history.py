"""The history of a model's champions: append-only, and what decides between two promotions at once.

MLflow cannot set an alias on condition. It can number: version n of a registered model exists once, by primary key, on SQLite as on
PostgreSQL. So each row of the history of NAME is a version of the registered model `NAME.history`, and its number is its place. A row says
which champion it moves from. It holds if that is the champion after all rows before it; a row that comes second finds another champion
and does not hold, for every reader alike. The alias follows the history, never the other way round.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

from linearsr_platform.errors import StageError
from linearsr_platform.registry.gate import RuleOutcome
from linearsr_platform.registry.models import CHAMPION, KIND_TAG, aliases_of, ensure_model, pages, registry_errors

if TYPE_CHECKING:
    from mlflow import MlflowClient

Action = Literal["promote", "rollback", "moved outside"]

HISTORY_SUFFIX = ".history"
ROW_TAG = "row"
APPEND_ATTEMPTS = 20
"""Each is MLflow's own three; as many writers at once as there are attempts find a number."""


@dataclass(frozen=True, kw_only=True)
class HistoryRow:
    """One row of a model's history."""

    action: Action
    """`moved outside`: somebody had moved the alias without this program, or a promotion was cut off half-way; noted by the next one."""
    at: str
    """UTC, ISO 8601."""
    by: str
    from_version: int | None
    to_version: int | None
    forced: bool = False
    """Whether it was done although a rule did not hold."""
    reason: str = ""
    """Why, in the words of who did it."""
    rules: tuple[RuleOutcome, ...] = ()
    """What the gate saw."""
    attempt: str = ""
    """Identity of the attempt, so that a row that was sent twice is one."""
    number: int = 0
    """Its place, from 1."""
    holds: bool = False
    """Whether it moved the champion; False for those that came too late."""

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return asdict(self)


@dataclass(frozen=True, kw_only=True)
class History:
    """All rows of a model, and what they come to."""

    rows: tuple[HistoryRow, ...]
    """Oldest first."""
    champions: tuple[int | None, ...]
    """The champions that a rollback would go through, the present one last; empty before the first."""

    @property
    def champion(self) -> int | None:
        """The present champion."""
        return self.champions[-1] if self.champions else None


def read_history(client: "MlflowClient", name: str) -> History:
    """Read the history of a model; one that was never promoted has none.

    Raises:
        UserError: if there is no such model.
        StageError: if MLflow does not answer.
    """
    aliases_of(client, name)
    with registry_errors(f"reading the history of {name!r}"):
        found = list(pages(client.search_model_versions, filter_string=f"name = '{name}{HISTORY_SUFFIX}'"))
    return fold([_row(int(entity.version), entity.tags[ROW_TAG]) for entity in found if ROW_TAG in entity.tags])


def append(client: "MlflowClient", name: str, row: HistoryRow, *, sleep: Callable[[float], None] = time.sleep) -> History:
    """Add a row after all others and return the history with it; whether it holds is in there, under its `attempt`.

    Raises:
        StageError: if MLflow refuses, or too many write at once.
    """
    from mlflow.exceptions import MlflowException

    log, written = f"{name}{HISTORY_SUFFIX}", row.to_json()
    text = json.dumps({key: value for key, value in written.items() if key not in ("number", "holds")}, sort_keys=True)
    source = f"models:/{name}/{row.to_version or row.from_version}"
    with registry_errors(f"making the history of {name!r}"):
        ensure_model(client, log, {KIND_TAG: "history"}, f"History of {name}, written by linearsr; do not delete.")
    for attempt in range(APPEND_ATTEMPTS):
        try:
            client.create_model_version(log, source, tags={ROW_TAG: text}, await_creation_for=0)
        except MlflowException as error:
            # Another writer took the number, or SQLite's lock, three times in a row; anything else will not go away.
            busy = "Giving up" in str(error) or "database is locked" in str(error)
            if not busy or attempt + 1 == APPEND_ATTEMPTS:
                raise StageError(f"registry: writing the history of {name!r} failed: {error}") from error
            sleep(0.05 * (attempt + 1))
        else:
            break
    return read_history(client, name)


def settle(client: "MlflowClient", name: str) -> History:
    """Bring the alias to where the history says, also while others write; whoever writes last leaves both equal.

    Raises:
        StageError: if MLflow refuses.
    """
    history = read_history(client, name)
    while True:
        with registry_errors(f"moving the alias of {name!r}"):
            if history.champion is None:
                client.delete_registered_model_alias(name, CHAMPION)
            else:
                client.set_registered_model_alias(name, CHAMPION, str(history.champion))
        # A row that came between reading and setting would leave the alias behind it.
        after = read_history(client, name)
        if after.champion == history.champion:
            return after
        history = after


def fold(rows: Sequence[HistoryRow]) -> History:
    """Go through rows in their order and see which hold.

    A promotion holds if it moves from the present champion, a rollback if it also moves to the one before. The first row holds whatever
    it moves from: that champion was there before the history.
    """
    champions: list[int | None] = []
    seen: list[HistoryRow] = []
    for row in sorted(rows, key=lambda row: row.number):
        if not seen and row.from_version is not None:
            champions.append(row.from_version)
        holds = row.from_version == (champions[-1] if champions else None) and row.attempt not in {one.attempt for one in seen if one.holds}
        if row.action == "rollback":
            holds = holds and len(champions) > 1 and champions[-2] == row.to_version
        seen.append(replace(row, holds=holds))
        if holds and row.action == "rollback":
            champions.pop()
        elif holds:
            champions.append(row.to_version)
    return History(rows=tuple(seen), champions=tuple(champions))


def utc(now_s: float) -> str:
    """Write a time, seconds since the epoch, as ISO 8601 in UTC."""
    return datetime.fromtimestamp(now_s, UTC).isoformat(timespec="milliseconds")


def _row(number: int, text: str) -> HistoryRow:
    value = json.loads(text)
    rules = tuple(RuleOutcome.from_json(one) for one in value.pop("rules"))
    return HistoryRow(**value, rules=rules, number=number)
