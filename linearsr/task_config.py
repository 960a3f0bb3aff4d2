"""What a training task is built from, as plain values: processes that only pass it on read it without torch."""

from dataclasses import dataclass

from linearsr.config import AugmentationConfig, LatentStatistics, ModelConfig, TextSource
from linearsr.degradation_config import Degradation


@dataclass(frozen=True, kw_only=True)
class TaskConfig:
    """Everything a worker needs to build the task; picklable."""

    model: ModelConfig
    statistics: LatentStatistics
    interval: tuple[float, float]
    """Noise levels that this network trains on; (0, 1) for one network over all of them."""
    degradation: Degradation
    augmentation: AugmentationConfig
    crop_px: int
    """Side of a training crop, HR pixels."""
    validation_steps: int
    """Euler steps of a validation, spread over `interval`."""
    metrics: tuple[str, ...]
    """Names in `linearsr.metrics.METRICS`."""
    metric_weights: str | None = None
    """Local folder with the weights of learned metrics."""
    codec_digest: str | None = None
    """Hash that the codec must have on every worker; None takes whatever is there."""
    seed: int = 0
    text: TextSource | None = None
    """Where embeddings come from, for a network that reads prompts."""
