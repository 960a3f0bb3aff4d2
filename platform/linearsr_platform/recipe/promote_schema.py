"""The gate's section of the recipe: the rules between `challenger` and `champion`. Imports no torch.

A rule is a section whose key `rule` says which kind it is; all of them must hold.
"""

from typing import Annotated, Literal

from pydantic import Field

from linearsr_platform.recipe.section import NotNegative, Section, Seed

Artefact = Literal["seam", "colour_shift"]
SEAMS_AND_COLOUR: tuple[Artefact, ...] = ("seam", "colour_shift")
"""What `no_regression` is about unless it says otherwise; lower is better in both."""

Confidence = Annotated[float, Field(gt=0.5, lt=1)]
ModelOutput = Literal["one_step", "routed"]


class BetterRule(Section):
    """The challenger is better, and not by chance: the interval of its paired gain over the champion lies above 0 and `at_least`."""

    rule: Literal["better"]
    metric: str
    """Metric of the evaluation; which direction is better belongs to the metric."""
    protocol: str | None = None
    """Protocol it was measured under; may be left out where there is only one."""
    estimate: ModelOutput = "one_step"
    """Which of the model's two outputs it is taken from."""
    at_least: NotNegative = 0.0
    """Smallest gain, in the metric's unit, that counts."""
    confidence: Confidence = 0.95
    """Of the bootstrap interval over images."""


class NotWorseRule(Section):
    """No metric is worse than the champion's by more than `by`."""

    rule: Literal["not_worse"]
    metrics: tuple[str, ...] | Literal["all"] = "all"
    """Metrics that must hold; `all` are those that the champion was measured by."""
    protocol: str | None = None
    """Protocol they were measured under; may be left out where there is only one."""
    estimate: ModelOutput = "one_step"
    """Which of the model's two outputs they are taken from."""
    by: NotNegative = 0.0
    """How much worse is still allowed, in each metric's unit."""
    confidence: Confidence | None = None
    """Unset compares means; set asks that the whole bootstrap interval of the loss is within `by`, which needs more images."""


class NoRegressionRule(Section):
    """Neither seams on the tile grid nor colours got worse by more than `by`; fails where they were not measured."""

    rule: Literal["no_regression"]
    of: tuple[Artefact, ...] = SEAMS_AND_COLOUR
    """Which of them."""
    protocol: str | None = None
    """Protocol they were measured under; may be left out where there is only one."""
    estimate: ModelOutput = "routed"
    """Which of the model's two outputs they are taken from."""
    by: NotNegative = 0.0
    """How much worse is still allowed."""


class KneeFoundRule(Section):
    """Every expert was stopped at a knee that the detector confirmed."""

    rule: Literal["knee_found"]


class SameProtocolRule(Section):
    """Everything the champion was measured under, the challenger was too: the same protocols on the same images."""

    rule: Literal["same_protocol"]


PromotionRule = Annotated[
    BetterRule | NotWorseRule | NoRegressionRule | KneeFoundRule | SameProtocolRule,
    Field(discriminator="rule", description="a section whose key rule is better, not_worse, no_regression, knee_found or same_protocol"),
]


class PromoteSection(Section):
    """The gate between `challenger` and `champion`."""

    rules: tuple[PromotionRule, ...] = (
        SameProtocolRule(rule="same_protocol"),
        NotWorseRule(rule="not_worse", metrics=("psnr_y",)),
    )
    """All must hold. The first version has no champion to be compared with and passes every rule that compares."""
    seed: Seed = 0
    """Seed of the bootstrap."""
    resamples: Annotated[int, Field(ge=1000)] = 10000
    """Resamples of the bootstrap."""

    def under(self, protocol: str) -> "PromoteSection":
        """Return the same rules, those that name no protocol with this one, so that a version may later be measured under others too."""
        rules = tuple(
            rule.model_copy(update={"protocol": protocol}) if getattr(rule, "protocol", protocol) is None else rule for rule in self.rules
        )
        return self.model_copy(update={"rules": rules})
