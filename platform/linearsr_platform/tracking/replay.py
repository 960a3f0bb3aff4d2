"""Sends what commands have left in their journals because their MLflow server was away."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from linearsr_platform.errors import UserError
from linearsr_platform.tracking.journal import Journal
from linearsr_platform.tracking.operations import Operation, send
from linearsr_platform.tracking.outbox import Outbox, Patience
from linearsr_platform.tracking.store import answers, connect, without_password

Orphans = list[tuple[Journal, list[tuple[int, Operation]]]]
"""Journals that no process holds, each with what is still to be sent."""


@dataclass(frozen=True)
class Replay:
    """What became of the journals of one store."""

    uri: str
    writes: int
    """That were found."""
    left: int
    """That are still to be sent."""
    refused: int = 0
    """That the store did not take; they are left out."""
    away: str = ""
    """Why nothing could be sent, if the store does not answer."""

    @property
    def sent(self) -> int:
        """How many the store has got."""
        return self.writes - self.left - self.refused


def replay(
    folders: Iterable[Path],
    *,
    uri: str | None,
    tell: Callable[[str], None],
    patience_s: float = 60.0,
    patience: Patience | None = None,
) -> list[Replay]:
    """Send every journal that no running command holds, oldest first; what MLflow has already changes nothing.

    A store that does not answer keeps no other from what is its own.

    Args:
        folders: see `journal.outbox_folders`.
        uri: the only store that is sent what was for it; None sends each the one that it was for, which works if that needs no password.
        tell: shows the user a line.
        patience_s: how long a store that went away is waited for.
        patience: how long is waited for what in between.

    Raises:
        UserError: if `uri` is none that a journal was for.
    """
    found: dict[str, Orphans] = {}
    for folder in folders:
        for journal, left in Journal.orphans(folder):
            found.setdefault(journal.uri, []).append((journal, left))
    wanted = None if uri is None else without_password(uri)
    results = []
    try:
        if found and wanted is not None and wanted not in found:
            raise UserError(f"--tracking-uri: got {wanted!r}; expected one that writes wait for: {', '.join(found)}")
        for known in [known for known in found if wanted in (None, known)]:
            try:
                results.append(_replay(known, found[known], uri or known, tell, patience_s, patience))
            except UserError as error:
                writes = sum(len(left) for _, left in found[known])
                results.append(Replay(known, writes, left=writes, away=str(error)))
            else:
                del found[known]
    finally:
        for rest in found.values():
            for journal, _ in rest:
                journal.release()
    return results


def _replay(
    known: str,
    orphans: Orphans,
    uri: str,
    tell: Callable[[str], None],
    patience_s: float,
    patience: Patience | None,
) -> Replay:
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
    left = outbox.close(patience_s)
    return Replay(known, writes, left, outbox.refused)
