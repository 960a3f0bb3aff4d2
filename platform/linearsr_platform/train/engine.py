"""The engine: one network under DeepSpeed, sharded over the workers of the process group by ZeRO."""

from collections.abc import Callable, Iterable
from importlib import import_module

import deepspeed
import deepspeed.ops
import numpy as np
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime import compiler
from safetensors.torch import load_file
from torch import Tensor, nn

from linearsr.attention import LinearAttention
from linearsr.probes import AttentionProbe
from linearsr_platform import storage
from linearsr_platform.errors import StageError
from linearsr_platform.recipe.train_schema import TrainConfig
from linearsr_platform.train import sharding
from linearsr_platform.train.deepspeed_config import clips_itself, deepspeed_config
from linearsr_platform.train.examination import Journal
from linearsr_platform.train.layout import layout, spans, untrained_spans
from linearsr_platform.train.processes import join_group, rank, world_size
from linearsr_platform.train.protocols import Batch, Task
from linearsr_platform.train.results import Sighting, StepResult
from linearsr_platform.train.spans import Span


class StepModule(nn.Module):
    """A task's network with the task's computation as its forward, because DeepSpeed hooks into one module's forward."""

    def __init__(self, task: Task, generator: torch.Generator) -> None:
        """Build the task's network."""
        super().__init__()
        self.network = task.build()
        self._task = task
        self._generator = generator

    def forward(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]] | dict[str, Tensor]:
        """Return loss and scalars in training mode, validation values in evaluation mode."""
        if self.training:
            return self._task.loss(self.network, batch, self._generator)
        return self._task.validate(self.network, batch)


class DeepSpeedEngine:
    """Satisfies `linearsr_platform.train.protocols.Engine`."""

    def __init__(self, task: Task, config: TrainConfig, *, seed: int, init_weights: str | None = None) -> None:
        """Build and shard the task's network in every worker. The launcher must have set `LOCAL_RANK`.

        Args:
            task: what is trained.
            config: the training stage.
            seed: of the noise in training; each worker derives its own.
            init_weights: URL of safetensors to start from.

        Raises:
            ValueError: if the process group has another size than the config says; see `TrainConfig.on_workers`.
            StageError: if `init_weights` are not of this network.
        """
        join_group()
        if world_size() != config.workers:
            raise ValueError(f"train.workers: got {config.workers}; expected the size of the process group, {world_size()}")
        _join_deepspeed()
        self.generator = torch.Generator().manual_seed(_worker_seed(seed))
        module = StepModule(task, self.generator)
        if init_weights is not None:
            _load_weights(module.network, init_weights)
        self.zero_stage: int = config.zero.stage
        self.precision: str = config.precision
        self._clip_norm = None if clips_itself(config) else config.clip_norm
        self._parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        num_parameters = sum(parameter.numel() for parameter in self._parameters)
        # Torch's fused AdamW is as fast on CPU as DeepSpeed's own, which compiles C++ first. Its lr is set before every step.
        optimizer = torch.optim.AdamW(self._parameters, lr=0.0, betas=config.betas, weight_decay=config.weight_decay, fused=True)
        self._network = module.network
        self._attentions = {name: part for name, part in module.network.named_modules() if isinstance(part, LinearAttention)}
        self.attentions = tuple(self._attentions)
        self._engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=deepspeed_config(config, num_parameters), dist_init_required=False
        )
        # For bfloat16 without ZeRO, DeepSpeed has taken an empty step to make AdamW's state, and AdamW has counted it as an update.
        self.prepare_moments(None)
        self.layout = layout(self._network, self._engine.optimizer, self.zero_stage)

    def train_step(self, batches: Iterable[Batch], lr: float, *, probe: bool = False, loss_limit: float | None = None) -> StepResult:
        """Accumulate the gradients of the micro-batches and move the weights once, at learning rate `lr`; see the protocol."""
        return self._step(batches, lr, probe=probe, loss_limit=loss_limit, before_backward=lambda: None)

    def _step(
        self, batches: Iterable[Batch], lr: float, *, probe: bool, loss_limit: float | None, before_backward: Callable[[], None]
    ) -> StepResult:
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        probes = self._hang_probes() if probe else []
        losses, scalars = [], []
        for batch in batches:
            loss, logged = self._engine(self._moved(batch))
            before_backward()
            # Times 0 rather than left out: the other workers wait for this one's share of the gradient.
            self._engine.backward(loss if loss_limit is None else loss * (loss.detach() <= loss_limit))
            grad_norm = self._clip()
            self._engine.step()
            losses.append(loss.detach())
            scalars.append(logged)
        means = {name: torch.stack([logged[name] for logged in scalars]).mean() for name in scalars[0]}
        stacked = torch.stack(losses)
        return StepResult(
            stacked.mean(),
            means,
            self._engine.get_global_grad_norm() if grad_norm is None else grad_norm,
            screened=None if loss_limit is None else (stacked > loss_limit).sum(),
            attention=self._take_probes(probes),
        )

    def examine(self, batches: Iterable[Batch]) -> tuple[StepResult, list[Sighting]]:
        """Take a step while looking at every part of the network; see the protocol."""
        with Journal(self._network) as journal:
            result = self._step(batches, 0.0, probe=False, loss_limit=None, before_backward=journal.watch_gradients)
        return result, journal.sightings()

    def capture(self, into: sharding.Shares | None = None) -> sharding.Shares:
        """Copy this worker's weights and moments to host memory, that of an earlier copy if it is given."""
        return sharding.capture(self._engine.optimizer, self.zero_stage, into)

    def restore(self, captured: sharding.Shares) -> None:
        """Set weights and moments to what `capture` returned on each worker."""
        sharding.restore(self._engine.optimizer, self.zero_stage, captured)

    @torch.no_grad()
    def validate(self, batch: Batch) -> dict[str, Tensor]:
        """Measure a batch with the present weights: metric name -> (B,) values."""
        self._engine.eval()
        values: dict[str, Tensor] = self._engine(self._moved(batch))
        self._engine.train()
        return values

    def master_weights(self) -> list[Tensor]:
        """Return the float32 weights that this worker owns, in a fixed order."""
        return sharding.master_weights(self._engine.optimizer, self.zero_stage)

    def publish(self) -> None:
        """Make the network use the master weights of all workers."""
        sharding.publish(self._engine.optimizer, self.zero_stage)

    def full_weights(self) -> dict[str, Tensor]:
        """Return the state dict of the task's network, parameters in float32, on the CPU; empty on workers other than 0."""
        return sharding.full_weights(self._network, self._engine.optimizer, keep=rank() == 0)

    def spans(self) -> list[Span]:
        """Return live weights, moments if there are any yet, buffers and frozen parameters, as far as this worker has them."""
        optimizer, stage = self._engine.optimizer, self.zero_stage
        found = spans("weight", self.layout, self.master_weights(), replicated=stage == 0)
        moments = sharding.moments(optimizer, stage)
        if moments and all(moments):
            for name in sharding.MOMENTS:
                found += spans(name, self.layout, [one[name] for one in moments], replicated=stage == 0)
        return found + untrained_spans(self._network, stage)

    def optimizer_step(self) -> float | None:
        """Return the number of updates that AdamW has counted; None before the first, or where this worker owns nothing."""
        moments = sharding.moments(self._engine.optimizer, self.zero_stage)
        return float(moments[0]["step"]) if moments and all(moments) else None

    def prepare_moments(self, step: float | None) -> None:
        """Make room for the moments of `step` updates; None takes them away."""
        sharding.prepare_moments(self._engine.optimizer, self.zero_stage, step)

    def close(self) -> None:
        """Let go of DeepSpeed's hooks and buffers; the engine is of no use afterwards."""
        self._engine.destroy()

    def _moved(self, batch: Batch) -> Batch:
        return {name: value.to(self._engine.device, non_blocking=True) for name, value in batch.items()}

    def _hang_probes(self) -> list[AttentionProbe]:
        probes = []
        for attention in self._attentions.values():
            attention.probe = AttentionProbe()
            probes.append(attention.probe)
        return probes

    def _take_probes(self, probes: list[AttentionProbe]) -> Tensor | None:
        for attention in self._attentions.values():
            attention.probe = None
        return torch.stack([probe.reading() for probe in probes]) if probes else None

    def _clip(self) -> Tensor | None:
        """Clip where DeepSpeed keeps the norm to itself, once all micro-batches are in; returns the norm there."""
        if self._clip_norm is None or not self._engine.is_gradient_accumulation_boundary():
            return None
        return nn.utils.clip_grad_norm_(self._parameters, self._clip_norm)


def _join_deepspeed() -> None:
    """Put DeepSpeed on the process group, without the shared-memory collective that it would compile from C++ first."""
    if get_accelerator().device_name() == "cpu":
        # On a GPU nobody asks for it, and looking at the table makes DeepSpeed probe each of its kernels.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed(dist_backend=dist.get_backend())
    _import_muon()


def _import_muon() -> None:
    """Import an optimizer that nobody here uses, as every ZeRO engine will, but not compiled: that alone brings torch's Inductor."""
    usual = compiler.compile
    compiler.compile = lambda: compiler.dummy_decorator
    try:
        import_module("deepspeed.runtime.zero.muon.original_muon")
    finally:
        compiler.compile = usual


def _worker_seed(seed: int) -> int:
    """Return a seed that differs between workers."""
    return int(np.random.SeedSequence([seed, rank()]).generate_state(1, np.uint64)[0])


def _load_weights(network: nn.Module, url: str) -> None:
    """Set a network's weights from a safetensors file."""
    with storage.local_path(url) as path:
        weights = load_file(path)
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise StageError(f"init_weights: got {url}; expected the weights of this network: {error}; fix: use the same `model`") from error
