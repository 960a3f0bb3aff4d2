"""What one trainer is to do, as plain picklable data. Imports no torch."""

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from linearsr_platform.recipe.data_schema import ShardCacheConfig
from linearsr_platform.recipe.train_schema import TrainConfig, ValidationConfig
from linearsr_platform.train.kernels import kernels_here

if TYPE_CHECKING:
    from linearsr_platform.train.protocols import Task


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What is asked of the workers of a job that is trained to see how it takes a failure."""

    url: str
    """Folder to which every worker writes the crops of each of its batches."""
    kill: tuple[int, int] | None = None
    """Worker and step: the worker is killed in this step, once this attempt has left a checkpoint. Once only. None kills nobody."""


@dataclass(frozen=True, kw_only=True)
class TrainJob:
    """Everything the workers of one trainer need to know."""

    name: str
    """Of the stage or expert: `pretrain`, `expert-1`."""
    task: str
    """Import path of the task's class, `package.module:Class`."""
    task_config: object
    """Its only argument; picklable."""
    train: TrainConfig
    validation: ValidationConfig
    train_shards: tuple[str, ...]
    validation_shards: tuple[str, ...]
    output_url: str
    """Folder for `snapshots/` and `outcome.json`."""
    init_weights: str | None = None
    """Safetensors with the weights to start from; None starts from the task's own initialisation."""
    codec_digest: str | None = None
    """Hash of the latent codec: part of the job's identity, of its checkpoints and its snapshots. None where there is no codec."""
    seed: int = 0
    cache: Annotated[ShardCacheConfig | None, Field(exclude=True)] = None
    """Where remote shards are kept on each machine; no part of the job's identity. None downloads one whenever it is opened."""

    memory_bytes: Annotated[Mapping[int, float] | None, Field(exclude=True)] = None
    """Host memory that a worker is thought to take, which Ray keeps for it, by the number of workers that the trainer may have: fewer
    take more each. No part of the job's identity. None keeps none."""

    compiled_kernels: Annotated[bool, Field(exclude=True)] = False
    """Whether the task computes with kernels that the worker's machine compiles; no part of the job's identity."""

    rehearsal: Annotated[Rehearsal | None, Field(exclude=True)] = None
    """None trains in earnest; no part of the job's identity."""

    def build_task(self) -> "Task":
        """Import the task's class and build it, with compiled kernels if the job has some.

        Raises:
            ValueError: if `task` does not name something that can be imported.
            UserError: if kernels cannot be compiled here.
        """
        module, _, attribute = self.task.partition(":")
        if not module or not attribute:
            raise ValueError(f"job {self.name}: task: got {self.task!r}; expected 'package.module:Class'")
        factory = getattr(import_module(module), attribute, None)
        if factory is None:
            raise ValueError(f"job {self.name}: task: got {self.task!r}; expected a name that {module} defines")
        task: Task = factory(self.task_config)
        if self.compiled_kernels:
            task.kernels = kernels_here()
        return task
