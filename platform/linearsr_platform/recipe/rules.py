"""Rules between settings of a recipe: everything that can be known before a worker starts."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from itertools import pairwise
from math import ceil

from linearsr.experts import EFFECTIVE_LOG_SNR, noise_level
from linearsr.metric_table import ARTEFACTS, METRICS
from linearsr_platform.recipe.promote_schema import BetterRule, NoRegressionRule, NotWorseRule
from linearsr_platform.recipe.schema import TRAINING_STAGES, Recipe
from linearsr_platform.recipe.train_schema import TrainConfig

ROUNDING = 1e-9
"""Slack of comparisons between sums of decimal fractions."""


@dataclass(frozen=True)
class Broken:
    """A rule that does not hold."""

    key: str
    """Dotted key of the setting to blame."""
    value: object
    """What it is set to."""
    rule: str
    """What would be right."""
    fix: str = ""
    """What to do, if the rule does not say it."""


@dataclass(frozen=True)
class Rule:
    """A rule and the settings it reads; it is left out when one of them is wrong by itself."""

    needs: tuple[str, ...]
    """Dotted keys of what the rule reads."""
    check: Callable[[Recipe], Iterator[Broken]]
    """Yields what is broken."""


def all_rules() -> Iterator[Rule]:
    """Yield every rule of a recipe, those of training stages once for each stage."""
    yield Rule(("model.preset", "model.backbone"), _one_backbone)
    yield Rule(("model.scale", "model.codec"), _codec_reaches_scale)
    yield Rule(("model.flow", "model.codec"), _loss_suits_codec)
    yield Rule(("model.tag_dropout", "model.tags_from_lr"), _tags_leave_room)
    yield Rule(("model.codec", "validation.crop_px"), _validation_crop)
    yield Rule(("data.validation_px", "validation.crop_px"), _validation_strip)
    yield Rule(("data.latents", "augmentation"), _latents_stay_as_they_are)
    yield Rule(("data.latents", "degradation"), _latents_are_the_target)
    for key in ("validation.metrics", "evaluate.metrics"):
        yield Rule((key,), partial(_known, key))
    yield Rule(("validation.metrics", "validation.weights"), _validation_has_weights)
    yield Rule(("evaluate", "validation.weights"), _evaluation_has_weights)
    yield Rule(("evaluate.protocols",), _a_protocol_once)
    yield Rule(("evaluate.protocols", "evaluate.metrics", "evaluate.perceptual"), _claim_is_measured)
    yield Rule(("evaluate", "promote.rules"), _gate_is_measured)
    yield Rule(("experts.boundaries",), _boundaries_ascend)
    yield Rule(("experts.boundaries", "experts.anchor", "search"), _anchor_splits_range)
    yield Rule(("cluster", *(f"{where}.workers" for where in TRAINING_STAGES)), _devices)
    yield Rule(("search", "validation.metrics"), _search_is_measured)
    yield Rule(("search",), _rungs_ascend)
    yield Rule(("search",), _experts_fit_range)
    yield Rule(("search", "model.codec", "data.validation_px"), _score_crop)
    yield Rule(("search", "experts.train"), _rungs_can_go_on)
    for where in TRAINING_STAGES:
        yield from _stage_rules(where)


def _stage_rules(where: str) -> Iterator[Rule]:
    """Yield the rules of the training stage at a dotted key."""

    def rule(check: Callable[[Recipe, str, TrainConfig], Iterator[Broken]], own: tuple[str, ...], others: tuple[str, ...] = ()) -> Rule:
        needs = (*(f"{where}.{key}" for key in own), *others)
        return Rule(needs, lambda recipe: check(recipe, where, recipe.training_stage(where)))

    yield rule(_batch_divides, ("batch_size", "workers", "accumulation"))
    yield rule(_elastic_divides, ("batch_size", "workers", "min_workers"))
    yield rule(_warmup_ends, ("warmup_steps", "max_steps"))
    yield rule(_crop_fits, ("crop_px",), ("model.codec",))
    yield rule(_latents_hold_a_crop, ("crop_px",), ("data.latents", "data.min_side_px"))
    yield rule(_knee_is_measured, ("knee.metrics",), ("validation.metrics",))
    yield rule(_workers_fit, ("workers", "min_workers"), ("cluster", "experts.cpus_per_worker"))


def _one_backbone(recipe: Recipe) -> Iterator[Broken]:
    preset, backbone = recipe.model.preset, recipe.model.backbone
    if preset is None and backbone is None:
        yield Broken("model.preset", None, "a named backbone, or one written out", "set either model.preset or model.backbone")
    if preset is not None and backbone is not None:
        yield Broken("model.preset", preset, "null where model.backbone is set", "remove one of the two")


def _codec_reaches_scale(recipe: Recipe) -> Iterator[Broken]:
    factor, scale = recipe.model.codec.factor, recipe.model.scale
    if factor < scale:
        yield Broken("model.codec.factor", factor, f"at least model.scale, {scale}")


def _loss_suits_codec(recipe: Recipe) -> Iterator[Broken]:
    weighting, kind = recipe.model.flow.loss_weighting, recipe.model.codec.kind
    if weighting == "pixel" and kind == "dc-ae":
        rule = "latent with codec dc-ae: it is not orthonormal, so errors in latents do not weigh in the picture as they are"
        yield Broken("model.flow.loss_weighting", weighting, rule)


def _tags_leave_room(recipe: Recipe) -> Iterator[Broken]:
    model = recipe.model
    if model.tags_from_lr > 1 - model.tag_dropout + ROUNDING:
        yield Broken("model.tags_from_lr", model.tags_from_lr, f"at most what model.tag_dropout leaves, {1 - model.tag_dropout:g}")


def _validation_crop(recipe: Recipe) -> Iterator[Broken]:
    crop, factor = recipe.validation.crop_px, recipe.model.codec.factor
    if crop % factor:
        yield Broken("validation.crop_px", crop, f"a multiple of model.codec.factor, {factor}")


def _validation_strip(recipe: Recipe) -> Iterator[Broken]:
    strip, crop = recipe.data.validation_px, recipe.validation.crop_px
    if 0 < strip < crop:
        yield Broken("data.validation_px", strip, f"0, or at least validation.crop_px, {crop}")


def _known(where: str, recipe: Recipe) -> Iterator[Broken]:
    """Artefacts are measured anyway and in no training; a set's metric is none of a validation's few crops."""
    evaluated = where == "evaluate.metrics"
    names = (recipe.evaluate.metrics or ()) if evaluated else recipe.validation.metrics
    scopes = ("picture", "set") if evaluated else ("picture",)
    known = [name for name, spec in METRICS.items() if spec.scope in scopes]
    for index, name in enumerate(names):
        if name not in known:
            near = get_close_matches(name, known, n=1)
            yield Broken(f"{where}[{index}]", name, f"one of {', '.join(known)}", f"did you mean {near[0]}?" if near else "")


def _validation_has_weights(recipe: Recipe) -> Iterator[Broken]:
    for index, name in enumerate(recipe.validation.metrics):
        yield from _has_weights(f"validation.metrics[{index}]", name, recipe)


def _evaluation_has_weights(recipe: Recipe) -> Iterator[Broken]:
    if recipe.evaluate.metrics is not None:
        for index, name in enumerate(recipe.evaluate.metrics):
            yield from _has_weights(f"evaluate.metrics[{index}]", name, recipe)
        return
    for index, protocol in enumerate(recipe.evaluate.protocols):
        learned = [name for name in recipe.evaluate.measured(protocol) if METRICS[name].needs == "weights"]
        if learned and recipe.validation.weights is None:
            rule = f"the weights of {', '.join(learned)} in a folder"
            fix = "name the folder in validation.weights, which `linearsr prefetch` fills, or list evaluate.metrics"
            yield Broken(f"evaluate.protocols[{index}]", protocol, rule, fix)


def _has_weights(where: str, name: str, recipe: Recipe) -> Iterator[Broken]:
    if recipe.validation.weights is None and name in METRICS and METRICS[name].needs == "weights":
        files = ", ".join(METRICS[name].weights_files)
        yield Broken(
            where, name, f"its weights ({files}) in a folder", "name the folder in validation.weights; `linearsr prefetch` fills it"
        )


def _a_protocol_once(recipe: Recipe) -> Iterator[Broken]:
    protocols = recipe.evaluate.protocols
    if not protocols or len(set(protocols)) < len(protocols):
        yield Broken("evaluate.protocols", list(protocols), "at least one protocol, each once")


def _claim_is_measured(recipe: Recipe) -> Iterator[Broken]:
    metric = recipe.evaluate.perceptual
    measured = [name for protocol in recipe.evaluate.protocols[:1] for name in recipe.evaluate.measured(protocol)]
    if metric not in measured:
        yield Broken("evaluate.perceptual", metric, f"one of evaluate.metrics ({', '.join(measured)})")


def _gate_is_measured(recipe: Recipe) -> Iterator[Broken]:
    """Rules on artefacts are always measured; they too must say under which protocol where there are several."""
    protocols = recipe.evaluate.protocols
    for index, rule in enumerate(recipe.promote.rules):
        where = f"promote.rules[{index}]"
        if not isinstance(rule, BetterRule | NotWorseRule | NoRegressionRule):
            continue
        if rule.protocol is None and len(protocols) > 1:
            yield Broken(f"{where}.protocol", None, f"one of evaluate.protocols ({', '.join(protocols)}), as there are several")
            continue
        named = rule.protocol or next(iter(protocols), "")
        if named not in protocols:
            yield Broken(f"{where}.protocol", named, f"one of evaluate.protocols ({', '.join(protocols)})")
            continue
        measured = (*recipe.evaluate.measured(named), *ARTEFACTS)
        for key, name in _judged_metrics(rule):
            if name not in measured:
                yield Broken(f"{where}.{key}", name, f"one of evaluate.metrics ({', '.join(measured)})")
            elif METRICS[name].scope == "set" and getattr(rule, "confidence", None) is not None:
                yield Broken(
                    f"{where}.{key}", name, "a metric of single images, which an interval needs", "use not_worse without confidence"
                )


def _judged_metrics(rule: BetterRule | NotWorseRule | NoRegressionRule) -> Iterator[tuple[str, str]]:
    """Yield the metrics that a rule names, each with its key."""
    if isinstance(rule, BetterRule):
        yield "metric", rule.metric
    elif isinstance(rule, NotWorseRule) and rule.metrics != "all":
        yield from ((f"metrics[{place}]", name) for place, name in enumerate(rule.metrics))
    elif isinstance(rule, NoRegressionRule):
        yield from ((f"of[{place}]", name) for place, name in enumerate(rule.of))


def _boundaries_ascend(recipe: Recipe) -> Iterator[Broken]:
    boundaries = recipe.experts.boundaries
    if boundaries == "bisection":
        return
    ordered = all(low < high for low, high in pairwise(boundaries))
    if not ordered or not all(0 < t < 1 for t in boundaries):
        yield Broken("experts.boundaries", list(boundaries), "strictly ascending numbers between 0 and 1")


def _anchor_splits_range(recipe: Recipe) -> Iterator[Broken]:
    highest, lowest = (noise_level(value) for value in EFFECTIVE_LOG_SNR)
    bisected = recipe.experts.boundaries == "bisection" or recipe.search is not None
    if bisected and not lowest < recipe.experts.anchor < highest:
        yield Broken("experts.anchor", recipe.experts.anchor, f"a noise level between {lowest:.4f} and {highest:.4f}, which are bisected")


def _search_is_measured(recipe: Recipe) -> Iterator[Broken]:
    measured = recipe.validation.metrics
    if recipe.search is not None and recipe.search.metric not in measured:
        yield Broken("search.metric", recipe.search.metric, f"one of validation.metrics ({', '.join(measured)})")


def _rungs_ascend(recipe: Recipe) -> Iterator[Broken]:
    if recipe.search is None:
        return
    rungs, most = recipe.search.rungs, max(recipe.search.experts)
    if not all(low < high for low, high in pairwise(rungs)) or rungs[0] < most:
        yield Broken("search.rungs", list(rungs), f"strictly ascending steps, at least {most}: one for each expert")


def _experts_fit_range(recipe: Recipe) -> Iterator[Broken]:
    if recipe.search is None:
        return
    (low, high), least, most = recipe.search.log_snr, recipe.search.min_width_log_snr, max(recipe.search.experts)
    if high <= low:
        yield Broken("search.log_snr", [low, high], "an ascending range")
    elif ceil(least / recipe.search.step_log_snr - ROUNDING) * most * recipe.search.step_log_snr > high - low + ROUNDING:
        rule = f"at most {(high - low) / most:.3g}: {most} experts share {high - low:.4g} in log-SNR"
        yield Broken("search.min_width_log_snr", least, rule, "lower it, search.step_log_snr or search.experts")


def _score_crop(recipe: Recipe) -> Iterator[Broken]:
    if recipe.search is None:
        return
    crop, factor, strip = recipe.search.score.crop_px, recipe.model.codec.factor, recipe.data.validation_px
    if crop % factor:
        yield Broken("search.score.crop_px", crop, f"a multiple of model.codec.factor, {factor}")
    if 0 < strip < crop:
        yield Broken("search.score.crop_px", crop, f"at most data.validation_px, {strip}")


def _rungs_can_go_on(recipe: Recipe) -> Iterator[Broken]:
    """A cosine would have fallen to 0 at the end of the first rung."""
    if recipe.search is not None and len(recipe.search.rungs) > 1 and recipe.experts.train.schedule != "constant":
        rule = "constant where search.rungs has several: training goes on from the rung before"
        yield Broken("experts.train.schedule", recipe.experts.train.schedule, rule)


def _devices(recipe: Recipe) -> Iterator[Broken]:
    cluster = recipe.cluster
    for name in ("gpus_per_worker", "gpus_per_picture_worker"):
        gpus = getattr(cluster, name)
        if cluster.address is None and gpus > cluster.num_gpus:
            yield Broken(f"cluster.{name}", gpus, f"at most cluster.num_gpus, {cluster.num_gpus}, on a local cluster")
        if gpus > 1 and gpus % 1:
            yield Broken(f"cluster.{name}", gpus, "a whole number above 1: Ray gives whole GPUs, or a part of one")
    several = [where for where in TRAINING_STAGES if recipe.training_stage(where).workers > 1]
    if 0 < cluster.gpus_per_worker < 1 and several:
        rule = f"at least 1 where {several[0]}.workers is above 1: the workers of one trainer cannot share a GPU"
        yield Broken("cluster.gpus_per_worker", cluster.gpus_per_worker, rule, "give each a whole one, or take one worker")


def _batch_divides(_: Recipe, where: str, stage: TrainConfig) -> Iterator[Broken]:
    parts = stage.workers * stage.accumulation
    if stage.batch_size % parts:
        yield Broken(f"{where}.batch_size", stage.batch_size, f"a multiple of workers x accumulation = {parts}")


def _elastic_divides(_: Recipe, where: str, stage: TrainConfig) -> Iterator[Broken]:
    least = stage.min_workers
    if least is None:
        return
    if least > stage.workers:
        yield Broken(f"{where}.min_workers", least, f"at most workers, {stage.workers}")
    uneven = [count for count in range(least, stage.workers) if stage.batch_size % count]
    if uneven:
        yield Broken(
            f"{where}.batch_size", stage.batch_size, f"a multiple of every number of workers from min_workers on, also of {uneven[0]}"
        )


def _warmup_ends(_: Recipe, where: str, stage: TrainConfig) -> Iterator[Broken]:
    if stage.warmup_steps > stage.max_steps:
        yield Broken(f"{where}.warmup_steps", stage.warmup_steps, f"at most max_steps, {stage.max_steps}")


def _crop_fits(recipe: Recipe, where: str, stage: TrainConfig) -> Iterator[Broken]:
    factor = recipe.model.codec.factor
    if stage.crop_px % factor:
        yield Broken(f"{where}.crop_px", stage.crop_px, f"a multiple of model.codec.factor, {factor}")


def _latents_hold_a_crop(recipe: Recipe, where: str, stage: TrainConfig) -> Iterator[Broken]:
    if recipe.data.latents and recipe.data.min_side_px < stage.crop_px:
        rule = f"at least {where}.crop_px, {stage.crop_px}, with data.latents, which cannot be mirrored at the edges"
        yield Broken("data.min_side_px", recipe.data.min_side_px, rule, "raise it, or lower crop_px")


def _latents_stay_as_they_are(recipe: Recipe) -> Iterator[Broken]:
    given = recipe.augmentation
    if recipe.data.latents and (given.flips or given.colour or given.scales != (1.0, 1.0)):
        value = {"flips": given.flips, "scales": list(given.scales), "colour": given.colour}
        rule = "flips: false, scales: [1.0, 1.0], colour: false with data.latents, which are those of the pictures as they are"
        yield Broken("augmentation", value, rule, "switch it off, or data.latents")


def _latents_are_the_target(recipe: Recipe) -> Iterator[Broken]:
    """Otherwise training would aim at the picture, and validation at its sharpened copy."""
    if recipe.data.latents and recipe.degradation.sharpens_target:
        rule = "false with data.latents, which are those of the pictures as they are, not sharpened"
        yield Broken("degradation.l1_gt_usm", True, rule, "set it, or switch off data.latents")


def _knee_is_measured(recipe: Recipe, where: str, stage: TrainConfig) -> Iterator[Broken]:
    measured = recipe.validation.metrics
    for index, name in enumerate(stage.knee.metrics):
        if name not in measured:
            yield Broken(f"{where}.knee.metrics[{index}]", name, f"one of validation.metrics ({', '.join(measured)})")


def _workers_fit(recipe: Recipe, where: str, stage: TrainConfig) -> Iterator[Broken]:
    """A trainer too big for its local cluster would only wait until `queue_timeout_s`."""
    cluster = recipe.cluster
    if cluster.address is not None or cluster.num_cpus is None:
        return
    shared = None if where == "pretrain" else recipe.experts.cpus_per_worker
    needed = stage.least_workers * (cluster.cpus_per_worker if shared is None else shared)
    if needed > cluster.num_cpus:
        rule = f"workers that need at most cluster.num_cpus = {cluster.num_cpus} CPUs together, not {needed:g}"
        yield Broken(f"{where}.{'workers' if stage.min_workers is None else 'min_workers'}", stage.least_workers, rule)
