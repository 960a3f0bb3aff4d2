"""Settings of the search over expert boundaries. Imports no torch."""

from typing import Annotated

from pydantic import Field

from linearsr.experts import EFFECTIVE_LOG_SNR
from linearsr_platform.recipe.section import Count, Experts, Name, Positive, Section, Seed
from linearsr_platform.recipe.train_schema import TrainConfig


class ProfileSection(Section):
    """The profiling pass over the pre-trained network: what its gradients say about the noise axis. Source: method.md 5.3."""

    levels: Annotated[int, Field(ge=8, le=256)] = 64
    """Levels that the range of log-SNR is divided into."""
    samples: Annotated[int, Field(ge=4)] = 32
    """Gradients a level; the error falls with their root."""
    crops: Count = 4
    """Training crops a gradient."""


class ScoreSection(Section):
    """How a trial is scored: its experts together restore held-back crops as a release would."""

    crops: Annotated[int, Field(ge=2)] = 32
    """Crops from the held-back strips, at least 2; the same noise and degradation for every trial."""
    crop_px: Count = 128
    batch_size: Count = 8
    steps: Count = 12
    """Sampler steps on its grid; `sampler` gives the rest. An expert that they leave out gets one more, so that none goes unmeasured."""


class FinalistsSection(Section):
    """What is trained anew at the end, through the same trainers as a run, to tell a win from noise."""

    top: Count = 2
    """Best trials that are repeated, beside the paper's boundaries, uniform ones and a single expert."""
    seeds: Annotated[int, Field(ge=2)] = 3
    """Trainings of each with other seeds; none of them the search's own."""


class SearchSection(Section):
    """The search over expert boundaries. Source: method.md part 5."""

    parent: Name | None = None
    """Run under the same storage root whose pre-trained network is taken; unset pre-trains here."""
    experts: Annotated[tuple[Experts, ...], Field(min_length=1)] = (4,)
    """How many experts a trial may have."""
    log_snr: tuple[float, float] = EFFECTIVE_LOG_SNR
    """Range in which boundaries may lie."""
    step_log_snr: Positive = 0.25
    """Boundaries lie on a grid of this step, so that the same intervals come again and need not be trained again."""
    min_width_log_snr: Positive = 0.5
    """Least width of an expert's interval."""
    trials: Count = 16
    """Boundaries that are tried, the proposals among them. More may be asked for later: the search goes on where it was."""
    rungs: Annotated[tuple[Count, ...], Field(min_length=1)] = (200, 400)
    """Optimizer steps of all experts of a trial together, ascending; after each rung but the last the worse trials stop."""
    reduction: Annotated[float, Field(gt=1)] = 2.0
    """One in this many trials goes on to the next rung."""
    metric: str = "psnr_y"
    """Metric of the scores, one of `validation.metrics`."""
    max_concurrent: Count | None = None
    """Trials at once at most, for which a running cluster's autoscaler is asked; unset takes as many as there is room for as they begin."""
    seed: Seed = 0
    """Of the searcher and of the experts' training."""
    profile: ProfileSection = ProfileSection()
    score: ScoreSection = ScoreSection()
    finalists: FinalistsSection = FinalistsSection()


def trial_training(train: TrainConfig) -> TrainConfig:
    """Return a run's training on one worker with the same batches, for a number of steps that the knee does not cut short."""
    knee = train.knee.model_copy(update={"stop": False})
    # One worker has nobody to share parameters out to, and with stage 3 DeepSpeed keeps every engine of a process for ever.
    zero = train.zero.model_copy(update={"stage": min(train.zero.stage, 2)})
    accumulation = train.workers * train.accumulation
    alone = {"workers": 1, "min_workers": None, "accumulation": accumulation}
    return train.model_copy(update={**alone, "max_seconds": None, "knee": knee, "zero": zero})
