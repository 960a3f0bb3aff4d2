"""What a run will take, before anything is paid for: room, memory, disk, time and money, as arithmetic that can be shown."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil, inf, isqrt

from linearsr_platform.cluster.capacity import Room, Share, share_of_worker, sharers_of_gpu, trials_at_once, workers_and_share
from linearsr_platform.data.sources import count_pictures
from linearsr_platform.errors import UserError
from linearsr_platform.recipe.schema import MachineConfig, Recipe
from linearsr_platform.recipe.search_schema import SearchSection, trial_training
from linearsr_platform.recipe.train_schema import TrainConfig
from linearsr_platform.stages.activations import training_size, worker_bytes
from linearsr_platform.stages.model_work import ALONE_FLOP, PHOTOGRAPH_PX, measuring_share, measuring_work, preparing_work, reading_work
from linearsr_platform.stages.pace import Pace, start_seconds, train_seconds
from linearsr_platform.train.footprint import FLOAT32, STATE_COPIES, Footprint, checkpoint_bytes, snapshot_bytes

GIGA = 1e9
OTHER_FINALISTS = 3
"""Beside the best trials: the paper's boundaries, uniform ones and a single expert."""
AFTER_S = 3.0
"""From a trainer's last step to its end."""


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """One training stage."""

    stage: str
    trainers: int
    workers: int
    """Of each trainer; fewer than the recipe says where there is room for no more, and it may start with them."""
    share: Share
    """Of each worker, with the memory that Ray keeps for it."""
    at_once: int
    """Trainers that run at the same time."""
    crops: int
    """Of one forward on one worker."""
    tokens: int
    """Of one crop."""
    parameters: int
    memory: Footprint
    """Of one worker."""
    codec_counted: bool
    """Whether the memory has the codec's; a DC-AE may not be here."""
    checkpoint_bytes: float
    """On disk, of each trainer that runs."""
    snapshot_bytes: float
    """Averaged weights on disk, of each trainer."""
    seconds: float | None
    """At most; None if nobody knows how fast it is."""
    source: str
    """Where the time is known from."""

    @property
    def gpu_hours(self) -> float | None:
        """GPUs that are reserved, times how long."""
        if self.seconds is None or not self.share.gpus:
            return None if self.seconds is None else 0.0
        return self.seconds / 3600 * self.at_once * self.workers * self.share.gpus


@dataclass(frozen=True, kw_only=True)
class PicturePlan:
    """A stage in which models work on one photograph after the other."""

    stage: str
    flop: float
    """For a photograph of 1024 x 1024 px."""
    share: Share
    """Of a worker."""
    at_once: int
    """Workers that there is room for."""


@dataclass(frozen=True, kw_only=True)
class RunPlan:
    """A whole run."""

    machines: tuple[MachineConfig, ...]
    training: tuple[TrainingPlan, ...]
    on_pictures: tuple[PicturePlan, ...]
    """Those in which a photograph is more work than a process does alone, or for which GPUs are asked."""
    encoder_counted: bool
    """False for a text encoder that is not here."""
    other_s: Mapping[str, float]
    """Seconds of the stages that do not train, as far as they are known."""
    pictures: int
    """Image files that the sources take; tars count as one."""
    trials_at_once: int | None
    """Of the recipe's search; None if it has none."""
    search_disk_bytes: float
    """Most that the search's experts have on disk, beside a run's; they stay, so that a longer search goes on from them."""
    problems: tuple[str, ...]
    """Why it can never run."""

    @property
    def seconds(self) -> float | None:
        """The whole run at most; None if a training stage's time is not known."""
        times = [stage.seconds for stage in self.training]
        return None if None in times else sum(time for time in times if time is not None) + sum(self.other_s.values())

    @property
    def price(self) -> float | None:
        """All machines for the whole time; None if time or a price is not known."""
        prices = [machine.price_per_hour for machine in self.machines]
        if self.seconds is None or not prices or None in prices:
            return None
        return self.seconds / 3600 * sum(machine.count * (machine.price_per_hour or 0.0) for machine in self.machines)

    @property
    def disk_bytes(self) -> float:
        """Most that a run has on disk at any time: averaged weights stay, checkpoints go when their trainer has ended, and then come the
        bundle and the registry's copy of it.
        """
        kept = most = 0.0
        for stage in self.training:
            running = min(stage.trainers, stage.at_once or stage.trainers)
            kept += stage.trainers * stage.snapshot_bytes
            most = max(most, kept + running * stage.checkpoint_bytes)
        last = self.training[-1]
        return max(most, kept + 2 * last.trainers * last.parameters * FLOAT32)


def plan_run(recipe: Recipe, machines: Sequence[MachineConfig], paces: Mapping[str, Pace], *, folder: str) -> RunPlan:
    """Plan a run on some machines; starts nothing.

    Args:
        recipe: what is run.
        machines: what there is.
        paces: by stage, see `pace.paces`.
        folder: the recipe's, where the tables of its sources are looked for.

    Raises:
        UserError: if a source of photographs is not there, or its table is broken.
    """
    experts = len(recipe.experts.resolved_boundaries) + 1
    cluster, own = recipe.cluster, recipe.experts.cpus_per_worker
    together = own or cluster.cpus_per_worker
    stages = [
        ("pretrain", recipe.pretrain, 1, cluster.cpus_per_worker),
        ("experts", recipe.experts.train, experts, together),
        ("finetune", recipe.finetune.train, experts, together),
    ]
    problems: list[str] = []
    training = tuple(
        _plan_stage(recipe, name, train, trainers, cpus, machines, paces.get(name), problems) for name, train, trainers, cpus in stages
    )
    pictures, tars = count_pictures(recipe.data, folder)
    needed = max(train.workers for _, train, _, _ in stages)
    if pictures < needed and not tars:
        problems.append(f"data: {pictures} photographs for {needed} workers, each of which reads shards of its own")
    other = {name: pace.stage_s for name, pace in paces.items() if pace.stage_s is not None}
    trials = None if recipe.search is None else _trials(recipe, recipe.search, machines, problems)
    return RunPlan(
        machines=tuple(machines),
        training=training,
        on_pictures=_on_pictures(recipe, machines, problems),
        encoder_counted=recipe.model.text is None or reading_work(recipe.model.text).flop > 0,
        other_s=other,
        pictures=pictures,
        trials_at_once=trials,
        search_disk_bytes=0.0 if recipe.search is None else _search_disk_bytes(recipe.search, training[0].parameters),
        problems=tuple(problems),
    )


def _on_pictures(recipe: Recipe, machines: Sequence[MachineConfig], problems: list[str]) -> tuple[PicturePlan, ...]:
    """Plan preparing and measuring where they take long; what no machine has room for is among the problems."""
    room, side = _room(machines), isqrt(PHOTOGRAPH_PX) // recipe.model.scale
    preparing, measuring = preparing_work(recipe), measuring_work(recipe, (side, side))
    shares = {"prepare": preparing.share(recipe, room), "evaluate": measuring_share(recipe, (side, side), room)}
    found = []
    for stage, work in (("prepare", preparing), ("evaluate", measuring)):
        if work.gpus(recipe) or work.flop > ALONE_FLOP:
            found.append(PicturePlan(stage=stage, flop=work.flop, share=shares[stage], at_once=room.workers(shares[stage])))
    for one in found:
        if not one.at_once:
            have = ", ".join(f"{machine.count} x {Share(cpus=machine.cpus, gpus=machine.gpus)}" for machine in machines)
            problems.append(f"{one.stage}: a worker takes {one.share}, but the machines ({have}) have room for none")
    return tuple(found)


def _search_disk_bytes(search: SearchSection, parameters: int) -> float:
    """Return what the experts of all trials and finalists have on disk at most: as if none were shared and no trial stopped early.

    Each has its averaged weights from begin and end, and those of one rung of each trial a checkpoint for the next.
    """
    finalists = (search.finalists.top + OTHER_FINALISTS) * search.finalists.seeds
    trained = search.trials * len(search.rungs) + finalists
    return parameters * FLOAT32 * max(search.experts) * (trained * 2 + search.trials * STATE_COPIES)


def _trials(recipe: Recipe, search: SearchSection, machines: Sequence[MachineConfig], problems: list[str]) -> int:
    """Return how many trials run at once, by the search's own arithmetic; 0, with the reason among the problems, if not even one can."""
    room, (memory_bytes,) = _room(machines), worker_bytes(recipe, trial_training(recipe.experts.train)).values()
    share = room.attainable(share_of_worker(recipe.cluster, memory_bytes=memory_bytes), 1)
    try:
        return trials_at_once(share, room, wanted=search.max_concurrent)
    except UserError as error:
        problems.append(str(error))
        return 0


def _plan_stage(
    recipe: Recipe,
    name: str,
    train: TrainConfig,
    trainers: int,
    own_cpus: float,
    machines: Sequence[MachineConfig],
    pace: Pace | None,
    problems: list[str],
) -> TrainingPlan:
    room, gpu = _room(machines), recipe.cluster.gpus_per_worker > 0
    shares = {
        workers: share_of_worker(recipe.cluster, cpus=own_cpus, memory_bytes=memory_bytes)
        for workers, memory_bytes in worker_bytes(recipe, train).items()
    }
    # An elastic trainer starts with what there is room for.
    workers, share = workers_and_share(shares, room)
    train = train.on_workers(workers)
    size = training_size(recipe, train)
    memory = size.footprint(train, gpu=gpu)
    at_once = _at_once(name, train, trainers, share, machines, memory, problems)
    cpus = sum(machine.count * machine.cpus for machine in machines)
    loop = train_seconds(train, pace or Pace(samples_per_s=None, source=""))
    rounds = ceil(trainers / at_once) if at_once else 0
    seconds = None if loop is None else rounds * (start_seconds(min(at_once, trainers), train.workers, cpus) + loop + AFTER_S)
    return TrainingPlan(
        stage=name,
        trainers=trainers,
        workers=train.workers,
        share=share,
        at_once=at_once,
        crops=train.micro_batch_size,
        tokens=size.tokens,
        parameters=size.parameters,
        memory=memory,
        codec_counted=size.codec_counted,
        checkpoint_bytes=checkpoint_bytes(train, parameters=size.parameters),
        snapshot_bytes=snapshot_bytes(train, parameters=size.parameters),
        seconds=seconds,
        source=(pace.source if pace else "max_seconds") if seconds is not None else "",
    )


def _at_once(
    name: str, train: TrainConfig, trainers: int, share: Share, machines: Sequence[MachineConfig], memory: Footprint, problems: list[str]
) -> int:
    """Return how many trainers run at once; 0, with the reason among the problems, if not even one can."""
    room, without = _room(machines), replace(share, memory_bytes=0.0)
    slots = room.workers(without)
    if slots < train.workers:
        have = ", ".join(f"{machine.count} x {Share(cpus=machine.cpus, gpus=machine.gpus)}" for machine in machines)
        problems.append(f"{name}: {train.workers} workers of {without} each, but the machines ({have}) have room for {slots}")
        return 0
    gpu = share.gpus > 0
    on_device = memory.device_bytes(gpu=gpu)
    sharers = sharers_of_gpu(share.gpus) if gpu else 1
    limits = [machine.gpu_memory_gb * GIGA for machine in machines if gpu and machine.gpu_memory_gb is not None and machine.gpus]
    if limits and on_device * sharers > max(limits):
        each = "a worker takes" if sharers == 1 else f"{sharers} workers share a GPU, and each takes"
        problems.append(f"{name}: {each} {on_device / GIGA:.1f} GB of a GPU with {max(limits) / GIGA:.1f} GB: {_terms(memory)}")
        return 0
    reserved = memory.reserved_bytes(train.workers, gpu=gpu)
    slots = room.workers(replace(without, memory_bytes=reserved))
    if slots < train.workers:
        have = ", ".join(f"{machine.count} x {machine.memory_gb:.4g} GB" for machine in machines if machine.memory_gb is not None)
        problems.append(
            f"{name}: {train.workers} workers of {reserved / GIGA:.1f} GB of memory each, but the machines ({have}) have room for {slots}"
        )
        return 0
    return min(trainers, room.workers(share) // train.workers)


def _room(machines: Sequence[MachineConfig]) -> Room:
    return Room(
        nodes=tuple(
            Share(cpus=machine.cpus, gpus=machine.gpus, memory_bytes=inf if machine.memory_gb is None else machine.memory_gb * GIGA)
            for machine in machines
            for _ in range(machine.count)
        )
    )


def _terms(memory: Footprint) -> str:
    terms = ("weights", "gradients", "optimizer", "average", "activations", "codec", "step")
    return ", ".join(f"{term} {getattr(memory, term) / GIGA:.1f}" for term in terms)
