"""A group of worker processes over gloo without Ray: the test starts its own file as each of them."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist


def run_group(script: str, folder: Path, world: int, arguments: Sequence[str] = ()) -> None:
    """Run `script FOLDER RANK WORLD_SIZE *arguments` as `world` workers to their end; none may fail."""
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, script, str(folder), str(rank), str(world), *arguments],
            env={**environment, "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(world)
    ]
    try:
        output = [worker.communicate(timeout=300)[0] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert [worker.returncode for worker in workers] == [0] * world, "\n".join(output)


def be_worker(work: Callable[[Path, int, int, list[str]], None]) -> None:
    """Be one of those processes: join the others, `work(folder, rank, world, arguments)`, and end."""
    torch.set_num_threads(1)
    folder, rank, world, arguments = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:]
    meeting = f"file://{folder}/rendezvous-{world}-{'-'.join(arguments)}"
    dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world)
    work(folder, rank, world, arguments)
    dist.barrier()
    dist.destroy_process_group()
    # Not through the interpreter's own end: a thread of torch or gloo that asks for the GIL there aborts the process, about once in
    # thirty pairs on a busy machine. Ray does not end its workers that way either.
    sys.stdout.flush()
    os._exit(0)
