"""`linearsr plan`: what a run will take, before anything is paid for."""

import json
import os
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from linearsr_platform.cli.options import Overrides, Profile, RecipePath, Verbose
from linearsr_platform.errors import StageError, UserError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from linearsr_platform.recipe.load import LoadedRecipe
    from linearsr_platform.recipe.schema import ClusterConfig, MachineConfig
    from linearsr_platform.stages.pace import Pace
    from linearsr_platform.stages.plan import RunPlan, TrainingPlan

TRAINING = ("pretrain", "experts", "finetune")
CORE_FLOPS = 75e9
"""Of a CPU core with AVX-512, by one thread: 68 to 84 GFLOP/s were measured of codec and network, see tests/benchmarks/README.md."""


def plan(
    recipe: RecipePath,
    profile: Profile = None,
    overrides: Overrides = None,
    rate: Annotated[
        list[str] | None,
        typer.Option("--rate", metavar="STAGE=CROPS_PER_S", help="Crops a second of one trainer; else as in its last run."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    verbose: Verbose = False,
) -> None:
    """Say what a recipe takes: room, memory of a worker, disk, time, money. Exit code 1 if it can never run, with the arithmetic."""
    from linearsr_platform.cli.environment import quiet_libraries
    from linearsr_platform.recipe.load import load_recipe

    quiet_libraries(verbose=verbose)
    loaded = load_recipe(recipe, profile, overrides or [])
    from linearsr_platform.stages.plan import plan_run

    machines = _machines(loaded.recipe.cluster)
    planned = plan_run(loaded.recipe, machines, _paces(loaded, _rates(rate or [])), folder=loaded.folder)
    if as_json:
        derived = {"seconds": planned.seconds, "price": planned.price, "disk_bytes": planned.disk_bytes}
        kinds = [machine.model_dump(mode="json") for machine in machines]
        typer.echo(json.dumps({**asdict(planned), **derived, "machines": kinds}, indent=2))
    else:
        _show(planned, gpu=loaded.recipe.cluster.gpus_per_worker > 0)
    if planned.problems:
        raise StageError("; ".join(planned.problems))


def _paces(loaded: "LoadedRecipe", given: "Mapping[str, float]") -> "dict[str, Pace]":
    """Return how fast stages are; where storage cannot be asked, only as far as that was given: a plan comes before cluster and bucket."""
    from linearsr_platform import storage
    from linearsr_platform.cli.execute import bring_secrets_of
    from linearsr_platform.stages.pace import paces

    try:
        bring_secrets_of(loaded)
        return paces(loaded.recipe, given)
    except (OSError, UserError) as error:
        if storage.is_local(loaded.recipe.storage):
            raise
        typer.echo(f"earlier runs under {storage.shown(loaded.recipe.storage)} were not looked at: {error}", err=True)
        return paces(loaded.recipe, given, earlier=False)


def _rates(texts: list[str]) -> dict[str, float]:
    rates = {}
    for text in texts:
        stage, _, value = text.partition("=")
        try:
            rates[stage] = float(value)
        except ValueError:
            rates[stage] = 0.0
        if stage not in TRAINING or not rates[stage] > 0:
            raise UserError(f"--rate: got {text!r}; expected STAGE=CROPS_PER_S, the stage being one of {', '.join(TRAINING)}")
    return rates


def _machines(cluster: "ClusterConfig") -> "list[MachineConfig]":
    """Return what the profile says there is, or this machine."""
    from linearsr_platform.recipe.schema import MachineConfig

    if cluster.machines:
        return list(cluster.machines)
    if cluster.address is not None:
        raise UserError(
            f"cluster.machines: got none for the cluster at {cluster.address!r}; expected what it has; fix: in the profile, "
            "cluster: {machines: [{count: 4, cpus: 32, gpus: 8, memory_gb: 512, gpu_memory_gb: 80, price_per_hour: 30}]}"
        )
    import torch

    from linearsr.memory import free_bytes

    cpus = float(cluster.num_cpus or os.cpu_count() or 1)
    # As Ray counts it for the cluster that it starts here.
    free_gb, store_gb = free_bytes(torch.device("cpu")) / 1e9, cluster.object_store_mb * 2**20 / 1e9
    if store_gb >= free_gb:
        raise UserError(f"cluster.object_store_mb: got {store_gb:.1f} GB; expected less than the {free_gb:.1f} GB that are free here")
    return [MachineConfig(cpus=cpus, gpus=float(cluster.num_gpus), memory_gb=free_gb - store_gb)]


def _show(planned: "RunPlan", *, gpu: bool) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    console = Console()
    stages = Table(*(Column(name, justify="right" if index else "left") for index, name in enumerate(_ROWS)), box=None, pad_edge=False)
    for stage in planned.training:
        stages.add_row(*_row(stage))
    console.print(stages)
    memory = Table("worker takes, GB", *TRAINING, box=None, pad_edge=False)
    for term in _TERMS:
        memory.add_row(term.replace("_", " "), *(f"{getattr(stage.memory, term) / 1e9:.3g}" for stage in planned.training))
    where = "on the GPU" if gpu else "in all"
    memory.add_row(where, *(f"{stage.memory.device_bytes(gpu=gpu) / 1e9:.3g}" for stage in planned.training))
    if gpu:
        memory.add_row("in host memory", *(f"{stage.memory.host_bytes(gpu=gpu) / 1e9:.3g}" for stage in planned.training))
    console.print()
    console.print(memory)
    typer.echo()
    for name, value in _totals(planned):
        typer.echo(f"{name:<12} {value}")


_ON_DEVICE = ("weights", "gradients", "optimizer", "average", "activations", "codec", "step")
_TERMS = (*_ON_DEVICE, "restore_points", "checkpoint_copy", "saving", "fixed")
_ROWS = ("stage", "trainers", "at once", "workers", "crops", "at most", "by")


def _row(stage: "TrainingPlan") -> list[str]:
    limit = "?" if stage.seconds is None else duration(stage.seconds)
    numbers = (stage.trainers, stage.at_once, stage.workers, stage.crops)
    return [stage.stage, *map(str, numbers), limit, stage.source or "-"]


def _totals(planned: "RunPlan") -> list[tuple[str, str]]:
    stage = planned.training[0]
    shares = dict.fromkeys(str(stage.share) for stage in planned.training)
    rows = [("network", f"{stage.parameters / 1e6:.4g}M parameters, {stage.tokens} tokens a crop")]
    rows.append(("a worker", " or ".join(shares)))
    if not stage.codec_counted:
        rows.append(("codec", "the DC-AE is not here and not counted"))
    if not planned.encoder_counted:
        rows.append(("encoder", "the text encoder is not here and not counted"))
    rows.append(("disk", f"{planned.disk_bytes / 1e9:.3g} GB at most: checkpoints, averaged weights, bundle and its copy in the registry"))
    rows.append(("photographs", str(planned.pictures)))
    for work in planned.on_pictures:
        on_cpu = "" if work.share.gpus else f", {duration(work.flop / CORE_FLOPS)} of a CPU core"
        each = f"{work.flop / 1e12:.3g} TFLOP for a photograph of a megapixel{on_cpu}"
        rows.append((work.stage, f"{each}; {work.at_once} at once, {work.share} each"))
    if planned.trials_at_once is not None:
        disk = f"{planned.search_disk_bytes / 1e9:.3g} GB of disk at most for their experts, which stay"
        rows.append(("search", f"{planned.trials_at_once} trials at once, {disk}"))
    if planned.seconds is None:
        unknown = ", ".join(stage.stage for stage in planned.training if stage.seconds is None)
        rows.append(
            ("time", f"not known: nothing says how fast {unknown} is; fix: --rate {unknown.split(',')[0]}=CROPS_PER_S, or run it once")
        )
        return rows
    others = "" if planned.other_s else ", stages that do not train not counted"
    rows.append(("time", f"at most {duration(planned.seconds)}{others}"))
    hours = sum(stage.gpu_hours or 0.0 for stage in planned.training)
    if hours:
        rows.append(("GPU hours", f"{hours:.4g}"))
    if planned.price is not None:
        rows.append(("price", f"{planned.price:.2f} for all machines, all the time"))
    return rows


def duration(seconds: float) -> str:
    """Write a time for people: `43 s`, `7 min`, `5.2 h`, `12 days`."""
    for limit, unit, size in ((100, "s", 1), (100 * 60, "min", 60), (72 * 3600, "h", 3600)):
        if seconds < limit:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 86400:.3g} days"
