"""The DeepSpeed configuration of a training stage, as a plain dict. Imports no DeepSpeed."""

from typing import Any

from linearsr_platform.recipe.train_schema import TrainConfig

BUCKET = 25_000_000
"""Gradients that are reduced at once, in elements. DeepSpeed's own 500 M take 2 GB, or a whole smaller network a second time; with fewer
a step of two workers and 200 M parameters took a fifth less CPU time, see tests/benchmarks/README.md."""


def clips_itself(config: TrainConfig) -> bool:
    """Tell whether DeepSpeed clips gradients and reports their norm.

    It does not report it for plain float32 training without ZeRO, so there the engine clips.
    """
    return config.zero.stage > 0 or config.precision == "bfloat16"


def deepspeed_config(config: TrainConfig, num_parameters: int) -> dict[str, Any]:
    """Return the configuration: defaults, over them the recipe's `zero.extra`, over it what the recipe itself sets.

    Args:
        config: the training stage.
        num_parameters: of the network. The bucket is made no larger.
    """
    defaults: dict[str, Any] = {
        "zero_optimization": {"reduce_bucket_size": min(BUCKET, num_parameters)},
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": None,
        "timers": {"throughput": {"enabled": False}},
    }
    fixed: dict[str, Any] = {
        "train_batch_size": config.batch_size,
        "train_micro_batch_size_per_gpu": config.micro_batch_size,
        "gradient_accumulation_steps": config.accumulation,
        "gradient_clipping": config.clip_norm if clips_itself(config) else 0.0,
        "zero_optimization": {"stage": config.zero.stage},
        "bf16": {"enabled": config.precision == "bfloat16"},
    }
    return _merged(_merged(defaults, config.zero.extra), fixed)


def _merged(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return `under` with the values of `over`, sections merged key by key."""
    both = {
        key: _merged(under[key], value) if isinstance(value, dict) and isinstance(under.get(key), dict) else value
        for key, value in over.items()
    }
    return {**under, **both}
