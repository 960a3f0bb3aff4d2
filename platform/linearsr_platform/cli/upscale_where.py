"""Where `linearsr upscale` does its files: in this process, or in workers of a Ray cluster; and what is shown meanwhile."""

import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from pydantic import ValidationError

from linearsr.enlarge import Enlargement
from linearsr.residency import Residency
from linearsr.timing import Stopwatch
from linearsr_platform import storage
from linearsr_platform.cli.progress import display_beside_result
from linearsr_platform.data.crew import SerialCrew
from linearsr_platform.errors import UserError
from linearsr_platform.recipe.schema import ClusterConfig
from linearsr_platform.stages.picture_work import Job, Work
from linearsr_platform.stages.upscale_crew import Enlarger, FolderHere, warn_of_sampler
from linearsr_platform.stages.upscaling import Outcome, UpscaleRun, machine_here, timing_table, timings_as_json

if TYPE_CHECKING:
    from linearsr.bundle import Bundle

MOST_SKIPPED_LINES = 20
"""More files that are kept are told in one line."""

Results = Generator[tuple[int, list[Outcome]], None, None]
Do = Callable[[Sequence[Job]], Results]
"""Yields (position, what became of it) of every job, in any order."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What the options say of every picture, wherever it is enlarged."""

    open: Callable[[str | None, str | None], "Bundle"]
    """Loads the bundle, given the folders of codec and text encoder."""
    codec: str | None
    text_encoder: str | None
    request: Enlargement
    device: str
    memory_gb: float | None
    residency: Residency | None
    tile: int | None
    codec_tile: int | None
    compiled_kernels: bool


class Here:
    """This process."""

    def __init__(self, asked: Asked, threads: int | None, *, plan: bool, measured: bool) -> None:
        """Read the bundle; `plan` says what would be done instead of doing it, `measured` keeps the time of each part."""
        if threads is not None:
            torch.set_num_threads(threads)
        machine = machine_here(asked.device, asked.memory_gb, asked.residency, asked.tile, compiled_kernels=asked.compiled_kernels)
        self._watch = Stopwatch(machine.device, enabled=measured)
        with self._watch.section("load"):
            bundle = asked.open(asked.codec, asked.text_encoder)
        run = UpscaleRun(bundle, asked.request, machine, self._watch)
        self._function = run.plan if plan else run.enlarge

    def do(self, jobs: Sequence[Job]) -> Results:
        """Do one job after the other."""
        yield from SerialCrew().map_unordered(lambda: self._function, jobs)

    def timings(self) -> dict[str, object]:
        """Return the split of the time as a part of the JSON."""
        return {"timings": timings_as_json(self._watch)}

    def timing_table(self) -> str:
        """Return the split of the time as text."""
        return timing_table(self._watch)


@dataclass(frozen=True)
class Spread:
    """Workers of a Ray cluster, each with a model of its own."""

    address: str | None
    workers: int | None
    threads: int
    gpus: float
    secrets: tuple[str, ...]
    verbose: bool

    @property
    def alone(self) -> bool:
        """Whether nobody asked for workers, so that this process does the work."""
        return self.address is None and self.workers is None

    def refuse_alone(self) -> None:
        """Refuse options of workers where there are none.

        Raises:
            UserError: naming the option.
        """
        for option, given in (("--gpus-per-worker", self.gpus), ("--secret", self.secrets)):
            if given:
                raise UserError(f"{option}: got it without workers; expected --address ADDRESS or --workers N beside it")

    def prepare(self, *, plan: bool, timings: bool) -> None:
        """Refuse what workers cannot do, and bring the secrets, with which files are found, to this process too.

        Raises:
            UserError: naming the option.
        """
        for option, given, why in (
            ("--plan", plan, "a plan is made in this process"),
            ("--timings", timings, "workers do not measure their parts"),
        ):
            if given:
                raise UserError(f"{option}: got it with workers; {why}; fix: leave out --address and --workers")
        cluster = self.cluster
        if cluster.secrets:
            from linearsr_platform.cluster.session import bring_secrets

            bring_secrets(cluster.secrets)

    @property
    def cluster(self) -> ClusterConfig:
        """What cluster it is.

        Raises:
            UserError: for a secret that is no reference.
        """
        secrets = dict(secret.partition("=")[::2] for secret in self.secrets)
        count = self.workers or 1
        try:
            return ClusterConfig(
                address=self.address, num_cpus=count * self.threads, num_gpus=ceil(count * self.gpus), object_store_mb=100, secrets=secrets
            )
        except ValidationError as error:
            # Not what stands behind the name, which may be the secret itself.
            name = str(error.errors()[0]["loc"][1])
            rule = "NAME=env:VARIABLE or NAME=file:/PATH, the name in capitals"
            raise UserError(f"--secret: got a wrong reference for {name!r}; expected {rule}") from None

    def over(self, asked: Asked, work: Work) -> "Pool":
        """Return the workers, with the bundle checked here first: what is wrong with it is wrong with every picture.

        Raises:
            UserError: if the bundle cannot be loaded, or a file is given as a path that only this process knows.
        """
        # Codec and text encoder are folders of the workers' machines, which are this one without an address.
        here = self.address is None
        bundle = asked.open(asked.codec if here else None, asked.text_encoder if here else None)
        warn_of_sampler(bundle, asked.request)
        private = [url for job in work.jobs[:1] for url in (job.source, job.target) if not storage.is_shared(url)]
        if private:
            raise UserError(f"upscale: got {private[0]!r}, the memory of this process; expected a place that workers see")
        return Pool(self, asked, bundle)


@dataclass(frozen=True)
class Pool:
    """The workers of one command."""

    spread: Spread
    asked: Asked
    bundle: "Bundle"

    def do(self, jobs: Sequence[Job]) -> Results:
        """Spread jobs over the workers; the cluster is opened with the first result that is asked for, and left at the end."""
        if not jobs:
            return
        # Who enlarges here shall not wait for Ray's import.
        from linearsr_platform.cluster.capacity import Share
        from linearsr_platform.cluster.crew import RayCrew
        from linearsr_platform.cluster.session import cluster_session
        from linearsr_platform.cluster.shipping import ship_folder

        spread, asked = self.spread, self.asked
        with cluster_session(spread.cluster, verbose=spread.verbose):
            here, folder = spread.address is None, Path(self.bundle.folder)
            enlarger = Enlarger(
                bundle=FolderHere(folder.absolute()) if here else ship_folder(folder),
                request=asked.request,
                codec=_absolute(asked.codec) if here else asked.codec,
                text_encoder=_absolute(asked.text_encoder) if here else asked.text_encoder,
                device=asked.device,
                memory_gb=asked.memory_gb,
                residency=asked.residency,
                tile=asked.tile,
                codec_tile=asked.codec_tile,
                compiled_kernels=asked.compiled_kernels,
                cpus=float(spread.threads),
                gpus=spread.gpus,
            )
            crew = RayCrew(Share(cpus=float(spread.threads), gpus=spread.gpus), most=spread.workers)
            yield from crew.map_unordered(enlarger, [job.absolute() for job in jobs])

    def timings(self) -> dict[str, object]:
        """Return nothing: workers do not measure their parts."""
        return {}

    def timing_table(self) -> str:
        """Return nothing, as `timings`."""
        return ""


def _absolute(source: str | None) -> str | None:
    """Return a folder as a process with another working directory finds it; what is none is a name that needs no folder."""
    return storage.absolute(source) if source is not None and Path(source).expanduser().is_dir() else source


def show(work: Work, do: Do, *, skip: bool, as_json: bool) -> list[Outcome]:
    """Go through the jobs with a progress display; in the way of JSON on standard output nothing else is written there.

    Args:
        work: the jobs.
        do: who does them.
        skip: whether a job whose target is there is left out.
        as_json: whether standard output belongs to JSON.

    Returns: what became of every picture, in order of the jobs.
    """
    finished = work.finished() if skip else frozenset()
    made = {place: [Outcome(job.name, storage.shown(job.target), "skipped")] for place, job in enumerate(work.jobs) if job in finished}
    places = [place for place in range(len(work.jobs)) if place not in made]
    started_s = time.monotonic()
    with display_beside_result(as_json=as_json) as display:
        display.stage_started("upscale")
        display.task("upscale", len(work.jobs), "files")
        kept = [line for outcomes in made.values() for outcome in outcomes for line in outcome.lines()]
        for line in kept if len(kept) <= MOST_SKIPPED_LINES else [f"{len(kept)} files exist and are kept; --overwrite replaces them"]:
            display.message(line)
        with closing(do([work.jobs[place] for place in places])) as results:
            for position, outcomes in results:
                made[places[position]] = outcomes
                for line in (line for outcome in outcomes if outcome.status != "failed" for line in outcome.lines()):
                    display.message(line)
                display.update("upscale", len(made), len(work.jobs))
        found = [outcome for place in sorted(made) for outcome in made[place]]
        counts = {status: sum(one.status == status for one in found) for status in ("done", "planned", "skipped", "failed")}
        said = ", ".join(f"{count} {status}" for status, count in counts.items() if count)
        display.stage_finished("upscale", time.monotonic() - started_s, said)
    return found
