"""What a training step takes beside its network's products: CPU time and memory of ZeRO, by the size of its bucket, and what is planned.

Run: `OMP_NUM_THREADS=1 python tests/benchmarks/step_memory.py`. Two workers train 198 M parameters, which are hardly multiplied, in
processes of their own, a run with DeepSpeed's own bucket (500 M elements, here the whole network) after one with ours. Peak is the
resident memory of a step at its largest, above that of the process before there was a network, for each parameter; planned is
`linearsr plan`'s without average, restore points and what is written to disk. Exits with 1 if the weights after all steps differ.
"""

import argparse
import os
import socket
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path
from statistics import median

WIDTH, LAYERS, WORKERS, STEPS = 3072, 21, 2, 9
PARAMETERS = LAYERS * WIDTH**2
"""A matrix has 38 MB in float32, more than what the C library keeps for itself."""


def train(stage: int, precision: str, bucket: int) -> None:
    """Be one of the workers, and print seconds of CPU and wall, peak and planned bytes of a parameter, and a hash of the weights."""
    import torch
    from torch import Tensor, nn

    from linearsr_platform.recipe.train_schema import TrainConfig, ZeroConfig
    from linearsr_platform.train.engine import DeepSpeedEngine
    from linearsr_platform.train.footprint import footprint

    class Wide:
        def build(self) -> nn.Module:
            torch.manual_seed(0)
            return nn.Sequential(*(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)))

        def loss(self, module: nn.Module, batch: dict[str, Tensor], generator: torch.Generator) -> tuple[Tensor, dict[str, Tensor]]:
            return module(batch["x"].to(next(module.parameters()).dtype)).float().square().sum() * 1e20, {}

    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    zero = ZeroConfig(stage=stage, extra={"zero_optimization": {"reduce_bucket_size": bucket}} if bucket else {})  # type: ignore[arg-type]
    config = TrainConfig(max_steps=1, batch_size=WORKERS, workers=WORKERS, clip_norm=1.0, precision=precision, zero=zero)  # type: ignore[arg-type]
    before = memory("VmRSS")
    engine = DeepSpeedEngine(Wide(), config, seed=0)  # type: ignore[arg-type]
    cpu_s, wall_s = [], []
    torch.manual_seed(1 + torch.distributed.get_rank())
    for _ in range(STEPS):
        # From here on the largest is counted anew.
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        start = time.process_time(), time.perf_counter()
        engine.train_step([{"x": torch.randn(1, WIDTH)}], 1e-4)
        cpu_s.append(time.process_time() - start[0])
        wall_s.append(time.perf_counter() - start[1])
    peak = memory("VmHWM") - before
    planned = footprint(config, parameters=PARAMETERS, activation_bytes=0)
    digest = sha256(b"".join(part.detach().numpy().tobytes() for part in engine.master_weights())).hexdigest()
    numbers = (median(cpu_s[2:]), median(wall_s[2:]), peak / PARAMETERS, (planned.model - planned.average) / PARAMETERS)
    print("measured", *numbers, digest, flush=True)
    # The group's threads may abort while the interpreter goes.
    os._exit(0)


def memory(key: str) -> int:
    """Return a line of what the system tells of this process, in bytes."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines())
    return int(lines[key].split()[0]) * 1024


def measure(stage: int, precision: str, bucket: int) -> list[str]:
    """Return what worker 0 printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(WORKERS), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "DS_ACCELERATOR": "cpu"}
    command = [sys.executable, __file__, "--stages", str(stage), "--precision", precision, "--worker", str(bucket)]
    environments = [{**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(WORKERS)]
    workers = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
        for environment in environments
    ]
    told = [worker.communicate()[0] for worker in workers]
    return next(line for line in told[0].splitlines() if line.startswith("measured")).split()[1:]


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", type=int, nargs="+", default=[1, 2, 3], help="of ZeRO")
    parser.add_argument("--precision", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        train(arguments.stages[0], arguments.precision[0], arguments.worker)
    print(f"{'ZeRO':<6}{'precision':<11}{'bucket':<12}{'CPU s':>7}{'wall s':>8}{'peak':>7}{'planned':>9}   bytes a parameter")
    differs = False
    for stage in arguments.stages:
        for precision in arguments.precision:
            buckets = {"DeepSpeed's": 500_000_000, "ours": 0}
            found: dict[str, list[list[str]]] = {name: [] for name in buckets}
            for _ in range(arguments.rounds):
                for name, bucket in buckets.items():
                    found[name].append(measure(stage, precision, min(bucket, PARAMETERS)))
            for name, runs in found.items():
                cpu_s, wall_s, peak, planned = (median(float(run[column]) for run in runs) for column in range(4))
                print(f"{stage:<6}{precision:<11}{name:<12}{cpu_s:7.2f}{wall_s:8.2f}{peak:7.2f}{planned:9.2f}", flush=True)
            differs |= len({run[4] for runs in found.values() for run in runs}) > 1
    print("the weights differ" if differs else "the weights are the same, bit for bit")
    sys.exit(differs)


if __name__ == "__main__":
    main()
