"""The outbox: everything that is asked of MLflow goes through one queue, in order; a server that is away delays it and loses nothing.

While the server answers, a call returns when it was served, as if there were no queue. While it is away, writes are kept in the journal
and return at once, and requests that need an answer wait for it.
"""

import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Condition, Event, Thread
from types import TracebackType
from typing import Self

from linearsr_platform.errors import StageError, UserError
from linearsr_platform.tracking.failures import first_line, is_transient, reason
from linearsr_platform.tracking.journal import Journal
from linearsr_platform.tracking.operations import Operation

LINGER_S = 10.0
"""How long the thread waits for more: MLflow opens a database anew for each thread, which costs a third of a write."""


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long is waited for what, seconds."""

    notice_s: float = 2.0
    """A call that takes longer than this asks whether the server still lives, and does so again each time as much has passed."""
    retry_s: float = 0.5
    """Pause before the first repetition; each next is twice as long."""
    longest_retry_s: float = 5.0
    answer_s: float = 600.0
    """How long a request that needs an answer waits for a server that is away."""
    tries: int = 20
    """A server that lives and fails an operation so often, about 90 s, is taken to refuse it."""


@dataclass(eq=False)
class _Entry:
    """Something in the queue."""

    doing: str
    attempt: Callable[[], object]
    place: tuple[Journal, int] | None = None
    """Journal and number of a write; None for a request."""
    tries: int = 0
    unattended: bool = False
    """Nobody waits for it any more."""
    done: bool = False
    result: object = None
    error: BaseException | None = None


class _Kept:
    """A block whose failure is kept instead of raised."""

    error: BaseException | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> bool:
        self.error = error
        return isinstance(error, Exception)


class Outbox:
    """One queue for one store; any thread may use it."""

    def __init__(
        self,
        uri: str,
        journals: Path,
        *,
        send: Callable[[Operation, Path], None],
        probe: Callable[[], bool],
        tell: Callable[[str], None],
        patience: Patience | None = None,
    ) -> None:
        """Queue what goes to a store.

        Args:
            uri: the store's, as messages and journals name it: without a password.
            journals: folder in which this outbox makes its journal, once there is something to keep.
            send: does a write; gets it with the path of its file.
            probe: tells within seconds whether the store answers.
            tell: shows the user a line.
            patience: how long is waited for what.
        """
        self.uri = uri
        self._journals, self._send, self._probe, self._tell = journals, send, probe, tell
        self._patience = patience or Patience()
        self._journal: Journal | None = None
        self._adopted: list[Journal] = []
        self._queue: deque[_Entry] = deque()
        self._changed = Condition()
        self._thread: Thread | None = None
        self._stopped = Event()
        self._away_since_s: float | None = None
        self._sent_late = 0
        self._refused = 0
        self._moved_s = time.monotonic()

    @property
    def waiting(self) -> int:
        """How many writes are still to be sent."""
        with self._changed:
            return sum(entry.place is not None for entry in self._queue)

    @property
    def folders(self) -> list[Path]:
        """Where the journals are that hold them."""
        with self._changed:
            return list(dict.fromkeys(entry.place[0].folder for entry in self._queue if entry.place is not None))

    @property
    def refused(self) -> int:
        """How many writes the store did not take, of those that nobody waited for."""
        with self._changed:
            return self._refused

    def put(self, operation: Operation, source: Path | bytes | None = None) -> None:
        """Keep a write and send it; returns when it was sent, or at once while the server is away.

        Args:
            operation: the write.
            source: its file, or the file's bytes.

        Raises:
            StageError: if the server refuses it.
            OSError: if the journal cannot be written.
        """
        with self._changed:
            if self._journal is None:
                self._journal = Journal.create(self._journals, self.uri)
            away = self._away_since_s is not None
            entry = self._entry(self._journal, self._journal.append(operation, source, durable=away), operation)
            entry.unattended = away
            self._queue.append(entry)
            self._start()
            self._changed.notify_all()
        if not away:
            self._wait(entry)

    def ask(self, doing: str, request: Callable[[], object]) -> object:
        """Make a request after all that was queued before, and return its answer; it is repeated while the server is away.

        Raises:
            StageError: if the server refuses it, or stays away too long.
        """
        entry = _Entry(doing, request)
        with self._changed:
            self._queue.append(entry)
            self._start()
            self._changed.notify_all()
        self._wait(entry)
        return entry.result

    def adopt(self, orphans: Iterable[tuple[Journal, list[tuple[int, Operation]]]]) -> int:
        """Queue what other processes have left; journals of other stores are let go. Returns how many writes there are."""
        count = 0
        with self._changed:
            for journal, left in orphans:
                if journal.uri != self.uri:
                    journal.release()
                    continue
                self._adopted.append(journal)
                entries = [self._entry(journal, number, operation) for number, operation in left]
                for entry in entries:
                    entry.unattended = True
                self._queue.extend(entries)
                count += len(entries)
            self._start()
        return count

    def close(self, patience_s: float) -> int:
        """Wait until all is sent, or nothing was for `patience_s`; return how many writes stay in the journal."""
        start_s = time.monotonic()
        while self.waiting and time.monotonic() - max(start_s, self._moved_s) < patience_s:
            self._stopped.wait(0.05)
        with self._changed:
            self._stopped.set()
            self._changed.notify_all()
            left = sum(entry.place is not None for entry in self._queue)
            for journal in [*self._adopted, *([] if self._journal is None else [self._journal])]:
                journal.close()
            self._adopted, self._journal = [], None
        return left

    def _entry(self, journal: Journal, number: int, operation: Operation) -> _Entry:
        file = journal.file(number, operation)
        return _Entry(operation.doing, lambda: self._send(operation, file), (journal, number))

    def _start(self) -> None:
        """Have a thread if there is work; it ends some time after, so that an outbox that is not closed leaves nothing behind."""
        if self._stopped.is_set():
            raise RuntimeError("the outbox is closed")
        if self._queue and self._thread is None:
            self._thread = Thread(target=self._work, name="mlflow-outbox", daemon=True)
            self._thread.start()

    def _wait(self, entry: _Entry) -> None:
        """Return when an entry is done, or, if it is a write, when the server turns out to be away."""
        is_write, asked_s, told = entry.place is not None, time.monotonic(), False
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: entry.done or (is_write and self._away_since_s is not None), self._patience.notice_s)
                    done, since_s = entry.done, self._away_since_s
                if done or (is_write and since_s is not None):
                    break
                if since_s is None:
                    if not self._probe():
                        self._note_away("no answer")
                    continue
                if time.monotonic() - max(since_s, asked_s, self._moved_s) > self._patience.answer_s:
                    raise self._gave_up(entry)
                if not told:
                    self._say(f"{entry.doing}: waits for MLflow, at most {self._patience.answer_s / 60:.0f} min; Ctrl-C ends the command")
                    told = True
        finally:
            with self._changed:
                entry.unattended = not entry.done
                if entry.unattended and not is_write and entry in self._queue:
                    self._queue.remove(entry)
        if entry.error is not None:
            if isinstance(entry.error, (UserError, StageError)):
                raise entry.error
            raise StageError(f"tracking: {entry.doing} failed: {first_line(entry.error)}") from entry.error

    def _gave_up(self, entry: _Entry) -> StageError:
        return StageError(
            f"tracking: {entry.doing}: got no answer from {self.uri} for {self._patience.answer_s:.0f} s; expected an MLflow that answers; "
            "fix: start it and run the same command again"
        )

    def _work(self) -> None:
        """Serve the queue until nothing came for a while."""
        pause_s = self._patience.retry_s
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._stopped.is_set(), LINGER_S)
                if not self._queue or self._stopped.is_set():
                    self._thread = None
                    return
                entry = self._queue[0]
            if self._away_since_s is not None and not self._probe():
                pause_s = self._pause(pause_s)
                continue
            kept = _Kept()
            with kept:
                entry.result = entry.attempt()
            entry.tries += 1
            if kept.error is None:
                self._leave(entry)
                pause_s = self._patience.retry_s
            elif is_transient(kept.error) and entry.tries < self._patience.tries:
                self._note_away(reason(kept.error))
                pause_s = self._pause(pause_s)
            else:
                entry.error = kept.error
                self._leave(entry)

    def _pause(self, pause_s: float) -> float:
        """Wait before a repetition; return how long to wait before the next."""
        self._stopped.wait(pause_s)
        return min(2 * pause_s, self._patience.longest_retry_s)

    def _note_away(self, why: str) -> None:
        with self._changed:
            if self._away_since_s is not None:
                return
            self._away_since_s, self._sent_late = time.monotonic(), 0
            self._changed.notify_all()
        self._say(f"MLflow at {self.uri} does not answer ({why}); what is logged meanwhile is kept, and sent when it is back")

    def _leave(self, entry: _Entry) -> None:
        """Take an entry out of the queue, sent or refused."""
        lines = []
        with self._changed:
            if entry in self._queue:
                self._queue.remove(entry)
            if entry.place is not None and not self._stopped.is_set():
                with suppress(OSError):
                    # A full disk: it may be sent once more, which changes nothing.
                    entry.place[0].mark_sent(entry.place[1])
                self._sent_late += entry.error is None
                self._refused += entry.error is not None and entry.unattended
            self._moved_s = time.monotonic()
            if entry.error is not None and entry.unattended:
                lines.append(f"MLflow refused {entry.doing}: {first_line(entry.error)}; it is left out")
            if self._away_since_s is not None and not self._queue:
                self._away_since_s = None
                lines.append(f"MLflow at {self.uri} is back: what waited was sent, {self._sent_late} writes")
            entry.done = True
            self._changed.notify_all()
        for line in lines:
            self._say(line)

    def _say(self, line: str) -> None:
        with suppress(OSError):
            # Standard output may be gone; the thread must not go with it.
            self._tell(line)
