"""Enlarging as pieces for a crew: what travels to a worker, and what the worker makes of it."""

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from linearsr.bundle import Bundle
from linearsr.enlarge import Enlargement
from linearsr.residency import Residency
from linearsr.schedule import warn_of_unvisited
from linearsr.timing import Stopwatch
from linearsr_platform.stages.picture_work import Job
from linearsr_platform.stages.upscaling import Outcome, UpscaleRun, machine_here, open_bundle


class Folder(Protocol):
    """A folder that can be had on any machine."""

    def unpack(self) -> Path:
        """Return it on this machine."""
        ...


@dataclass(frozen=True)
class FolderHere:
    """A folder that every worker sees."""

    path: Path

    def unpack(self) -> Path:
        """Return it."""
        return self.path


@dataclass(frozen=True, kw_only=True)
class Enlarger:
    """Makes the function that enlarges one file; picklable, a `data.crew.Make`.

    The same file gives the same bytes in every worker of the same kind of device with the same threads: seed and tiles are those of the
    options, never of a machine.
    """

    bundle: Folder
    request: Enlargement
    codec: str | None = None
    """Folder of the DC-AE on the workers."""
    text_encoder: str | None = None
    """Folder of the text encoder on the workers."""
    codec_tile: int | None = None
    """Latent positions along a side of the DC-AE's tiles; None takes the bundle's."""
    device: str = "auto"
    memory_gb: float | None = None
    """Of one worker; None takes its share of what is free."""
    residency: Residency | None = None
    tile: int | None = None
    cpus: float = 1.0
    gpus: float = 0.0
    """What a worker reserves: its share of a machine."""
    compiled_kernels: bool = False
    """Whether CPUs compute with kernels that each machine compiles."""

    def __call__(self) -> Callable[[Job], list[Outcome]]:
        """Read the bundle, and load the model with the first picture.

        Raises:
            UserError: if something is missing on this machine.
        """
        bundle = open_bundle(self.bundle.unpack(), self.codec, self.text_encoder, self.codec_tile)
        share = self.gpus if self.gpus else self.cpus / (os.cpu_count() or 1)
        cuts = self.memory_gb is not None
        machine = machine_here(
            self.device,
            self.memory_gb,
            self.residency,
            self.tile,
            share=min(1.0, share),
            cuts=cuts,
            compiled_kernels=self.compiled_kernels,
        )
        return UpscaleRun(bundle, self.request, machine, Stopwatch(enabled=False)).enlarge


def warn_of_sampler(bundle: Bundle, request: Enlargement) -> None:
    """Warn as every picture would if the sampler misses an expert; what workers warn of, nobody sees."""
    sampler = bundle.sampler
    if request.steps is not None and request.steps != sampler.num_steps:
        sampler = replace(sampler, num_steps=request.steps, times=None)
    if request.estimate == "routed":
        warn_of_unvisited(sampler, bundle.config.flow.shift, bundle.boundaries)
