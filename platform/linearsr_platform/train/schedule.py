"""The learning rate as a pure function of the step. Imports no torch."""

from math import cos, pi

from linearsr_platform.recipe.train_schema import TrainConfig


def learning_rate(step: int, config: TrainConfig) -> float:
    """Return the learning rate of the update that follows `step` earlier ones.

    Warm-up rises linearly and reaches the peak `lr` at the last of its `warmup_steps` updates. After it the rate is
    constant, or half a cosine from the peak down to 0 at `max_steps`.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.schedule == "constant":
        return config.lr
    done = (step - config.warmup_steps) / max(1, config.max_steps - config.warmup_steps)
    return config.lr * (1 + cos(pi * min(1.0, done))) / 2
