"""Sends what commands have left in their journals because their MLflow server was away."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from linearsr_platform.errors import UserError
from linearsr_platform.tracking.journal import Journal
from linearsr_platform.tracking.operations import Operation, send
from linearsr_platform.tracking.outbox import Outbox, Patience
from linearsr_platform.tracking.store import answers, connect, without_password


@dataclass(frozen=True)
class Replay:
    """What became of the journals of one store."""

    uri: str
    writes: int
    """That were found."""
    left: int
    """That are still to be sent."""


def replay(
    folders: Iterable[Path],
    *,
    uri: str | None,
    tell: Callable[[str], None],
    patience_s: float = 60.0,
    patience: Patience | None = None,
) -> list[Replay]:
    """Send every journal that no running command holds, oldest first; what MLflow has already changes nothing.

    Args:
        folders: see `journal.outbox_folders`.
        uri: the store that gets them; None sends each to the one that it was for, which works if that needs no password.
        tell: shows the user a line.
        patience_s: how long a store that went away is waited for.
        patience: how long is waited for what in between.

    Raises:
        UserError: if a store does not answer, or is not the one that a journal was for.
    """
    found: dict[str, list[tuple[Journal, list[tuple[int, Operation]]]]] = {}
    for folder in folders:
        for journal, left in Journal.orphans(folder):
            found.setdefault(journal.uri, []).append((journal, left))
    results = []
    try:
        for known in list(found):
            results.append(_replay(known, found[known], uri or known, tell, patience_s, patience))
            del found[known]
    finally:
        for rest in found.values():
            for journal, _ in rest:
                journal.release()
    return results


def _replay(
    known: str,
    orphans: list[tuple[Journal, list[tuple[int, Operation]]]],
    uri: str,
    tell: Callable[[str], None],
    patience_s: float,
    patience: Patience | None,
) -> Replay:
    if without_password(uri) != known:
        raise UserError(f"--tracking-uri: got {without_password(uri)!r}; expected {known!r}, for which {orphans[0][0].folder} was written")
    client = connect(uri)
    outbox = Outbox(
        known,
        orphans[0][0].folder.parent,
        send=lambda operation, file: send(client, operation, file),
        probe=lambda: answers(uri),
        tell=tell,
        patience=patience,
    )
    writes = outbox.adopt(orphans)
    return Replay(known, writes, outbox.close(patience_s))
