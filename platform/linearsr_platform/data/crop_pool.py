"""Processes that make batches ahead of their reader, in memory they share with it. Imports no torch.

They are started with `subprocess`, not forked: their parent has torch's and Ray's threads. The shared memory is a file without a name,
and each process has one end of a socket pair: both vanish with the last process that holds them, so nothing is left over after a crash.
"""

import mmap
import os
import pickle
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

from linearsr_platform.data.batches import Arrays, BatchMemory, BatchRing, Transform
from linearsr_platform.data.crop_worker import FAILED, JUMP, MAKE, WorkerSpec
from linearsr_platform.data.sequence import State
from linearsr_platform.errors import StageError, UserError

AHEAD = 4
"""Batches made ahead. Images fall to workers by chance, so one may have most of a batch to make."""
SPARE = 2
"""Batches that the reader's user may hold without a copy of them: one in use, and one that has just come."""
END_S = 5.0
"""Time a worker has to end by itself; in the middle of a crop it does not listen."""

BOOT = """
import sys
from multiprocessing.connection import Connection
link = Connection(int(sys.argv[1]))
sys.path[:] = link.recv()
from linearsr_platform.data.crop_worker import serve
serve(link, int(sys.argv[2]))
"""
"""First the parent's path: what the transform is made of may lie where only the parent looks."""


class CropPool:
    """A few worker processes, and the ring of batches that they fill together."""

    def __init__(self, spec: WorkerSpec, state: State) -> None:
        """Start the processes and let them begin at a reader's state.

        Args:
            spec: of all workers; `number` and `parent` are filled in.
            state: where to begin.
        """
        self._processes: list[subprocess.Popen[bytes]] = []
        self._links: list[Connection] = []
        self._layout, self._memory = spec.layout, BatchMemory()
        memory = os.memfd_create("linearsr-batches", os.MFD_CLOEXEC)
        try:
            os.ftruncate(memory, spec.slots * spec.layout.slot_bytes)
            buffer = memoryview(mmap.mmap(memory, spec.slots * spec.layout.slot_bytes))
            self._ring = BatchRing(buffer, spec.layout, spec.slots)
            with ExitStack() as stack:
                # Should one not start, those before it must not stay.
                stack.callback(self.close)
                for number in range(spec.workers):
                    self._start(replace(spec, number=number, parent=os.getpid()), memory)
                stack.pop_all()
        finally:
            os.close(memory)
        self._asked: deque[int] = deque()
        self._jump(state)

    def next_batch(self) -> Arrays:
        """Return the next batch as arrays that nobody writes into while they are referred to, and ask for another.

        Raises:
            StageError: if a worker failed, or ended by itself; the pool is closed then, as with all of these.
            ShardAwayError: if a shard's store did not answer a worker.
            ConnectionError: if another connection of a worker broke.
            ChildProcessError: if a worker was killed or ran out of memory.
        """
        self._await_all()
        slot = self._asked.popleft()
        batch, free = self._ring.batch(slot), self._ring.free({slot, *self._asked})
        if free is None:
            copy = self._memory.take(self._layout)
            for name, array in batch.items():
                copy[name][...] = array
            batch, free = copy, slot
        self._ask(free)
        return batch

    def jump(self, state: State) -> None:
        """Go on from another state; what was made ahead is thrown away."""
        while self._asked:
            self._await_all()
            self._asked.popleft()
        self._jump(state)

    def close(self) -> None:
        """End the processes and give back the memory."""
        for link in self._links:
            link.close()
        for process in self._processes:
            try:
                process.wait(END_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._links, self._processes = [], []

    @property
    def process_ids(self) -> Sequence[int]:
        """Ids of the worker processes."""
        return [process.pid for process in self._processes]

    def _start(self, spec: WorkerSpec, memory: int) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-c", BOOT, str(theirs.fileno()), str(memory)]
            # Nothing of the command comes from outside.
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, pass_fds=(theirs.fileno(), memory))  # noqa: S603
        self._processes.append(process)
        self._links.append(Connection(ours.detach()))
        self._tell(len(self._links) - 1, sys.path)
        self._tell(len(self._links) - 1, spec)

    def _jump(self, state: State) -> None:
        for number in range(len(self._links)):
            self._tell(number, (JUMP, [state]))
        for _ in range(AHEAD):
            free = self._ring.free(self._asked)
            assert free is not None  # noqa: S101 (`next_batch` hands none out that leaves fewer)
            self._ask(free)

    def _ask(self, slot: int) -> None:
        """Let all workers make the next batch."""
        for number in range(len(self._links)):
            self._tell(number, (MAKE, slot))
        self._asked.append(slot)

    def _tell(self, number: int, message: Any) -> None:
        try:
            self._links[number].send_bytes(pickle.dumps(message))
        except (BrokenPipeError, ConnectionResetError):
            # It has said why before it ended, or was killed; both come out when it is asked for its share.
            self._receive(number)

    def _await_all(self) -> None:
        """Wait until every worker has made its share of the next batch."""
        for number in range(len(self._links)):
            self._receive(number)

    def _receive(self, number: int) -> None:
        """Wait for a worker's answer; raise what it says went wrong."""
        try:
            what, content = self._links[number].recv()
        except (EOFError, ConnectionResetError):
            raise self._died(number) from None
        if what == FAILED:
            kind, text, trace = content
            self.close()
            error: Exception = kind(text)
            error.add_note(f"loader worker {number}:\n{trace}")
            raise error

    def _died(self, number: int) -> StageError | ChildProcessError:
        """Return the error that says how a worker ended, and close the pool."""
        process = self._processes[number]
        try:
            code: int | None = process.wait(END_S)
        except subprocess.TimeoutExpired:
            code = None
        self.close()
        fix = "fix: fewer train.loader_workers if memory is short; 0 makes crops in the training worker itself"
        where = f"training data: loader worker {number} (process {process.pid})"
        if code is not None and code < 0:
            # No StageError: like a training worker that was killed, most often for memory, it is worth another start.
            return ChildProcessError(f"{where} was killed by signal {-code}; expected it to run; {fix}")
        return StageError(f"{where} ended with exit code {code}; expected it to run; {fix}")


def pickled(transform: Transform) -> bytes:
    """Return a transform as other processes get it.

    Raises:
        UserError: if it cannot be sent to one, or not be found there.
    """
    rule = "a transform that another process can import: a function of a module, or a method of an object that can be pickled"
    got = f"train.loader_workers: got {transform!r}"
    try:
        content = pickle.dumps(transform)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        raise UserError(f"{got}; expected {rule}; fix: 0 ({error})") from error
    if b"__main__" in content:
        raise UserError(f"{got}, which is of a script; expected {rule}; fix: 0, or move it to a module")
    return content
