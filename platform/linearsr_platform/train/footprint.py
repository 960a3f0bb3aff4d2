"""What a training worker takes in memory and a trainer on disk, as arithmetic on the number of parameters. Imports no torch.

Source: ZeRO (Rajbhandari et al. 2020, arXiv 1910.02054, section 3.1 and 5), with this project's average of weights and restore points.
"""

from dataclasses import dataclass
from math import ceil, log2

from linearsr_platform.recipe.train_schema import TrainConfig
from linearsr_platform.train.deepspeed_config import deepspeed_config

FLOAT32 = 4
MOMENTS = 2
"""Of AdamW."""
STATE_COPIES = 1 + MOMENTS + 1
"""Float32 numbers of a parameter in a checkpoint: weight, moments and average."""
PROCESS_BYTES = 0.95e9
"""Resident memory of a worker with torch, DeepSpeed and metrics, before there is a network."""
READER_BYTES = 0.15e9
"""Decoded photographs of a block, shards' bytes and validation crops, as they come to with photographs of a few megapixels. Both
together were measured as 1.12 to 1.18 GB."""
LOADER_BYTES = 0.3e9
"""Of a process that decodes, crops and degrades ahead, beside what it shares with the others; measured as 0.29 GB."""
TRAINER_BYTES = 0.5e9
"""Memory of the other processes of one trainer: what starts it, controller, synchronisation, its share of the autoscaler."""
DEVICE_BYTES = 1.0e9
"""CUDA context, communication buffers and libraries' workspaces on a GPU."""
LIVE = 10**9
"""Parameters that ZeRO 3 has gathered at once, by DeepSpeed's default of `stage3_max_live_parameters`."""
RESTORE_POINTS = 2
"""Kept by the guard in host memory; see `train.recovery.POINTS`."""
SAVED_COPIES = 3
"""Of the averaged weights when a validation saves them: whole, and twice as bytes, because safetensors joins those of each parameter."""


@dataclass(frozen=True, kw_only=True)
class Footprint:
    """Bytes of one worker."""

    weights: float
    """Of the network, in the dtype it runs in."""
    gradients: float
    optimizer: float
    """AdamW's moments, and float32 weights where the network runs in another dtype."""
    average: float
    """Exponential moving average of weights."""
    activations: float
    """What a forward of one micro-batch keeps for its backward."""
    codec: float
    """Weights of a DC-AE, and what coding a batch holds beyond the activations, which are not there then."""
    restore_points: float
    """Of the guard, in host memory."""
    checkpoint_copy: float
    """What a checkpoint is written from while training goes on, in host memory."""
    step: float
    """What an update holds beyond the activations, which are gone by then: this worker's gradients once more in one piece and in float32, a
    bucket of them on their way to other workers, and with ZeRO 3 the weights of others."""
    saving: float
    """Of worker 0 alone, in host memory: what it saves after a validation. On a CPU without gradients and activations, which are gone
    then."""
    fixed: float
    """Process, context and buffers, whatever is trained."""

    @property
    def model(self) -> float:
        """All that is on the device that trains: what ZeRO may share out, activations, and the codec."""
        return self.weights + self.gradients + self.optimizer + self.average + self.activations + self.codec + self.step

    def device_bytes(self, *, gpu: bool) -> float:
        """Bytes on the device that trains; on a CPU that is host memory, of worker 0."""
        return self.model + DEVICE_BYTES if gpu else self.host_bytes(gpu=False)

    def host_bytes(self, *, gpu: bool) -> float:
        """Bytes in host memory, of worker 0."""
        return self._host_bytes(self.saving, gpu=gpu)

    def reserved_bytes(self, workers: int, *, gpu: bool) -> float:
        """Host memory that each of a trainer's workers reserves: its own, and its part of what worker 0 saves and of other processes."""
        return self._host_bytes(self.saving / workers, gpu=gpu) + TRAINER_BYTES / workers

    def _host_bytes(self, saving: float, *, gpu: bool) -> float:
        # Where the host trains, it takes no step while it saves.
        working = saving if gpu else self.model - self.step + max(self.step, saving)
        return self.restore_points + self.checkpoint_copy + self.fixed + working


def footprint(
    train: TrainConfig,
    *,
    parameters: int,
    activation_bytes: float,
    codec_weight_bytes: float = 0.0,
    coding_bytes: float = 0.0,
    gpu: bool = False,
) -> Footprint:
    """Return what one worker of a training stage takes.

    Args:
        train: the stage.
        parameters: of the network, all of them trained.
        activation_bytes: of one micro-batch.
        codec_weight_bytes: of a DC-AE.
        coding_bytes: what it holds while it codes the largest batch.
        gpu: whether it trains on one, so that checkpoints are copied through pinned memory.
    """
    stage, workers = train.zero.stage, train.workers
    dtype = 2 if train.precision == "bfloat16" else FLOAT32
    shared_optimizer, shared_gradients, shared_weights = (workers if stage >= least else 1 for least in (1, 2, 3))
    # Float32 ZeRO keeps its share of master weights as flat copies of the parameters; without ZeRO the parameters are the masters.
    copies = 1 if dtype != FLOAT32 or stage > 0 else 0
    owned = parameters / shared_optimizer
    state = owned * FLOAT32 * STATE_COPIES
    gradients = parameters * dtype / shared_gradients
    zero = deepspeed_config(train, parameters)["zero_optimization"]
    passing = zero["reduce_bucket_size"] + (min(parameters, zero.get("stage3_max_live_parameters", LIVE)) if stage == 3 else 0)
    # In one piece, and where that is no float32 once more.
    step = owned * (FLOAT32 + (dtype if dtype != FLOAT32 else 0)) + passing * dtype
    saved = SAVED_COPIES * FLOAT32 * float(parameters)
    return Footprint(
        weights=parameters * dtype / shared_weights,
        gradients=gradients,
        optimizer=owned * FLOAT32 * (MOMENTS + copies),
        average=owned * FLOAT32,
        activations=activation_bytes,
        codec=codec_weight_bytes + max(0.0, coding_bytes - activation_bytes),
        restore_points=RESTORE_POINTS * state if train.guard.enabled else 0.0,
        # Torch takes pinned memory in powers of two.
        checkpoint_copy=float(2 ** ceil(log2(state))) if gpu else state,
        step=max(0.0, step - activation_bytes),
        saving=saved if gpu else max(0.0, saved - gradients - activation_bytes),
        fixed=PROCESS_BYTES + READER_BYTES + train.loader_workers * LOADER_BYTES,
    )


def checkpoint_bytes(train: TrainConfig, *, parameters: int) -> float:
    """Return what a trainer's full checkpoints are on disk at most, the one being written among them; they go when it has ended."""
    saves = train.max_steps // train.checkpoint_every + 1
    return parameters * FLOAT32 * STATE_COPIES * min(train.keep_checkpoints + 1, saves)


def snapshot_bytes(train: TrainConfig, *, parameters: int) -> float:
    """Return what the averaged weights of a trainer's validations are on disk at most; they stay."""
    return parameters * FLOAT32 * (min(train.knee.keep, train.max_steps // train.validate_every + 1) + 1)
