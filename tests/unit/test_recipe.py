"""Recipes: what YAML means, how layers merge, and that every mistake is reported at once, each where it was made."""

import json
import random
import sys
from copy import deepcopy
from functools import partial
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings, strategies

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from minimal_recipe import MINIMAL, problems_of, write_recipe

from linearsr.guard import GuardConfig
from linearsr_platform.errors import RecipeErrors
from linearsr_platform.recipe.document import parse_document
from linearsr_platform.recipe.identity import changes, stable_hash
from linearsr_platform.recipe.load import load_recipe
from linearsr_platform.recipe.merge import Layer, Merged
from linearsr_platform.recipe.validate import validate


@pytest.fixture
def write(tmp_path):
    return partial(write_recipe, tmp_path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4), ("1E5", 1e5), ("-2e3", -2000.0), ("+.5", 0.5), ("3.", 3.0), ("12", 12), ("-7", -7),
        ("true", True), ("False", False), ("~", None), ("", None), ("null", None),
        ("no", "no"), ("on", "on"), ("2024-01-01", "2024-01-01"), ("1:30", "1:30"), ("1_000", "1_000"), (".inf", ".inf"), ("0x10", "0x10"),
        ("'3'", "3"), ("s3://bucket/a", "s3://bucket/a"), ("[1e3, a]", [1000.0, "a"]),
    ],
)  # fmt: skip
def test_yaml_reads_numbers_as_numbers_and_nothing_else_as_something_else(text, value):
    document = parse_document(f"key: {text}", "f.yaml")
    assert document.problems == []
    read = document.value["key"]
    assert read == value
    assert type(read) is type(value)


@pytest.mark.parametrize(
    ("text", "line", "part"),
    [
        ("a: [1,\nb: 2", 2, "not valid YAML"),
        ("a: 1\nb: *nowhere", 2, "undefined alias"),
        ("a: 1\n---\nb: 2", 2, "single document"),
        ("a: 1\nb:\n  c: 1\n  c: 2", 4, "already on line 3"),
        ("a: &x\n  b: *x", 1, "does not contain itself"),
        ("a: !!python/name:os.system x", 1, "without a YAML tag"),
        ("a: 1e999", 1, "finite"),
        (f"a: 1{'0' * 400}", 1, "finite"),
        ('a: "\\ud83d"', 1, "whole characters"),
        ('"\\ud83d": 1', 1, "whole characters"),
        (f"a: {'[' * 60}{']' * 60}", 1, "nested too deep"),
        (f"a: {'[' * 9000}", None, "nested too deep"),
        ("a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40)), 1, "repeated too often"),
        ("? [a, b]\n: 1", 1, "plain words"),
        ("a: 1\n<<: 2", 2, "a mapping, or a list of mappings"),
        ("<<: [{a: 1},\n 3]", 2, "a mapping, or a list of mappings"),
        ("a: &a\n  <<: *a", 1, "no part of"),
        ("a: &a {b: {<<: *a}}", 1, "no part of"),
        ("a: &a {x: 1, x: 2}\nb: {<<: *a}", 1, "already on line 1"),
        (f"a: &a {{{', '.join(f'k{i}: 1' for i in range(400))}}}\nb: {{<<: [{', '.join(['*a'] * 400)}]}}", 1, "repeated too often"),
        ("a: \0", None, "not valid YAML"),
    ],
)
def test_what_yaml_cannot_mean_is_a_problem_with_its_line(text, line, part):
    problem = parse_document(text, "f.yaml").problems[0]
    assert problem.file == (f"f.yaml:{line}" if line else "f.yaml")
    assert part in problem.rule


def test_a_merge_key_gives_what_its_mapping_does_not_say_with_the_line_it_is_written_on():
    text = """a: &a {x: 1, y: [2]}
b: &b
  y: 3
  <<: *a
c: {z: 0, <<: [*b, {x: 4, w: 5}], x: 6}
"<<": kept
"""
    document = parse_document(text, "f.yaml")
    assert document.problems == []
    assert document.value == {"a": {"x": 1, "y": [2]}, "b": {"y": 3, "x": 1}, "c": {"z": 0, "x": 6, "y": 3, "w": 5}, "<<": "kept"}
    assert (document.lines["b", "x"], document.lines["b", "y"], document.lines["c", "y"], document.lines["c", "x"]) == (1, 3, 3, 5)


def test_a_minimal_recipe_resolves_every_default(write):
    loaded = load_recipe(write(MINIMAL))
    assert loaded.recipe.pretrain.lr == 1e-4
    assert loaded.resolved["sampler"]["num_steps"] == 20
    assert loaded.resolved["experts"]["train"]["betas"] == [0.9, 0.999]
    assert Path(loaded.folder, "recipe.yaml").is_file()
    assert loaded.hash == stable_hash(json.loads(json.dumps(loaded.resolved)))


def test_the_hash_is_of_the_meaning_not_of_the_text(write):
    loaded = load_recipe(write(MINIMAL))
    reordered = "# a comment\n" + yaml.safe_dump(loaded.resolved, sort_keys=True)
    assert load_recipe(write(reordered, "again.yaml")).hash == loaded.hash
    assert load_recipe(write(MINIMAL), None, ["pretrain.lr=2e-4"]).hash != loaded.hash


def test_a_recipe_without_the_sampler_s_history_keeps_its_hash_and_one_that_keeps_history_is_another(write):
    before = load_recipe(write(MINIMAL), None, ["sampler.kind=dpm++2m"])
    assert set(before.resolved["sampler"]) == {"kind", "num_steps", "guidance_scale", "temperature", "times", "grid"}
    written, kept = (load_recipe(write(MINIMAL), None, ["sampler.kind=dpm++2m", f"sampler.history={how}"]) for how in ("drop", "keep"))
    assert written.hash == before.hash
    assert kept.hash != before.hash
    assert [str(change) for change in changes(before.resolved, kept.resolved, "run")] == ["sampler.history: not set -> keep"]
    again = load_recipe(write(yaml.safe_dump(kept.resolved), "again.yaml"))
    assert (again.recipe.sampler.history, again.hash) == ("keep", kept.hash)


def test_a_mapping_that_is_set_replaces_the_section_and_a_dotted_key_adds_to_it(write):
    recipe = write(MINIMAL)
    before = set(load_recipe(recipe).recipe.data.sources)
    assert set(load_recipe(recipe, None, ["data.sources.mine=photos"]).recipe.data.sources) == before | {"mine"}
    assert set(load_recipe(recipe, None, ["data.sources={mine: photos}"]).recipe.data.sources) == {"mine"}


def test_layers_merge_in_order_sections_deeply_and_lists_whole(write):
    recipe = write(MINIMAL + "cluster: {num_cpus: 2, object_store_mb: 100}\nevaluate: {step_sweep: [1, 2, 4]}\n")
    profile = write("storage: s3://bucket/runs\ncluster: {num_cpus: 8}\nevaluate: {step_sweep: [3]}\n", "profile.yaml")
    got = load_recipe(recipe, profile, ["cluster.num_cpus=16", "pretrain.max_steps=20", "pretrain.max_steps=30"]).recipe
    assert (got.cluster.num_cpus, got.cluster.object_store_mb) == (16, 100)
    assert got.evaluate.step_sweep == (3,)
    assert (got.storage, got.pretrain.max_steps, got.pretrain.lr) == ("s3://bucket/runs", 30, 1e-4)


def test_a_source_may_be_given_as_its_url(write):
    sources = load_recipe(write(MINIMAL), None, ["data.sources.interior=package://interior_photos/images"]).recipe.data.sources
    assert set(sources) == {"photos", "interior"}
    assert sources["interior"].url == "package://interior_photos/images"
    replaced = load_recipe(write(MINIMAL + "  # end\n"), None, ["data.sources.photos=/mine"]).resolved
    assert replaced["data"]["sources"]["photos"]["url"] == "/mine"


def test_every_mistake_is_reported_at_once_with_place_value_rule_and_nearest_key(write):
    recipe = write(
        "name: my run\n"
        "sed: 3\n"
        "data: {sources: {photos: {ulr: /photos}}, held_out: coffee}\n"
        "model: {scale: 3, backbone: {width: 64, num_block: 3, head_width: 0}}\n"
        "pretrain: {max_steps: 1e4, lr: fast, betas: [0.9, 1], batch_size: '8'}\n"
        "experts: {boundaries: [0.2, x], train: {max_steps: 10, workers: 3}}\n"
        "finetune: {subset: best}\n"
        "sampler: {num_steps: 2, times: [0.5, 1]}\n"
        "evaluate: {metrics: [psnr_y, gmds]}\n"
    )
    profile = write("cluster: 3\n", "profile.yaml")
    found = {problem.key: problem for problem in problems_of(recipe, profile, ["promote.resamples=9", "validation.crop_px=30"])}
    expected = {
        "name": (1, '"my run"', "letters, digits", ""),
        "sed": (2, "3", "a known key", "did you mean seed?"),
        "data.sources.photos.url": (3, "", "this is missing", ""),
        "data.sources.photos.ulr": (3, '"/photos"', "a known key", "did you mean data.sources.photos.url?"),
        "data.held_out": (3, '"coffee"', "a list (text each)", ""),
        "model.scale": (4, "3", "one of 1, 2, 4, 8", ""),
        "model.backbone.num_blocks": (4, "", "this is missing", ""),
        "model.backbone.num_block": (4, "3", "a known key", "did you mean model.backbone.num_blocks?"),
        "pretrain.max_steps": (5, "10000.0", "a whole number >= 1", "write 10000"),
        "pretrain.lr": (5, '"fast"', "a number > 0", ""),
        "pretrain.betas[1]": (5, "1", "a number >= 0 and < 1", ""),
        "pretrain.batch_size": (5, '"8"', "a whole number >= 1", ""),
        "experts.boundaries": (6, '[0.2, "x"]', "a list (a number each), or bisection", ""),
        "experts.train.batch_size": (6, "8", "a multiple of workers x accumulation = 3", ""),
        "finetune.subset": (7, '"best"', "one of high-quality, train", ""),
        "finetune.train": (7, "", "this is missing", ""),
        "sampler.times": (8, "[0.5, 1]", "num_steps = 2 descending numbers", ""),
        "evaluate.metrics[1]": (9, '"gmds"', "one of psnr_y", "did you mean gmsd?"),
        "evaluate.perceptual": (9, '"gmsd"', "one of evaluate.metrics (psnr_y, gmds)", ""),
        "cluster": (f"{profile}:1", "3", "a section with keys like address", ""),
        "promote.resamples": ("--set promote.resamples=9", "9", "a whole number >= 1000", ""),
        "validation.crop_px": ("--set validation.crop_px=30", "30", "a multiple of model.codec.factor, 4", ""),
    }
    assert set(found) == set(expected)
    for key, (place, value, rule, fix) in expected.items():
        problem = found[key]
        assert problem.file == (f"{recipe}:{place}" if isinstance(place, int) else place), key
        assert (problem.value, problem.fix) == (value, fix), key
        assert problem.rule.startswith(rule), problem.rule
        assert key in str(problem)


@pytest.mark.parametrize(
    ("overrides", "key"),
    [
        (["model.backbone={width: 64, num_blocks: 1}"], "model.preset"),
        (["model.preset=null"], "model.preset"),
        (["model.codec.factor=2"], "model.codec.factor"),
        (["model.codec={kind: dc-ae, factor: 32}"], "model.codec.source"),
        (["model.codec={kind: dc-ae, factor: 32, source: x}", "model.flow.loss_weighting=pixel"], "model.flow.loss_weighting"),
        (["model.tag_dropout=0.7", "model.tags_from_lr=0.4"], "model.tags_from_lr"),
        (["model.text={folder: minilm, max_tokens: 1}"], "model.text.max_tokens"),
        (["model.backbone={width: 64, num_blocks: 1, head_width: 48}", "model.preset=null"], "model.backbone.head_width"),
        (["experts.boundaries=[0.9, 0.2]"], "experts.boundaries"),
        (["experts.anchor=0.99"], "experts.anchor"),
        (["pretrain.batch_size=9", "pretrain.workers=2"], "pretrain.batch_size"),
        (["finetune.train.warmup_steps=11"], "finetune.train.warmup_steps"),
        (["experts.train.crop_px=66"], "experts.train.crop_px"),
        (["pretrain.knee.metrics=[lpips]"], "pretrain.knee.metrics[0]"),
        (["validation.metrics=[psnr_y, ssim_y, gmsd, lpips]"], "validation.metrics[3]"),
        (["evaluate.metrics=[psnr_y, gmsd, musiq]"], "evaluate.metrics[2]"),
        (["promote.rules=[{rule: better, metric: niqe}]"], "promote.rules[0].metric"),
        (["promote.rules=[{rule: knee_found}, {rule: not_worse, metrics: [gmsd, vif]}]"], "promote.rules[1].metrics[1]"),
        (["promote.rules=[{rule: not_worse, protocol: stablesr}]"], "promote.rules[0].protocol"),
        (["evaluate.protocols=[quickstart, classic]", "promote.rules=[{rule: no_regression}]"], "promote.rules[0].protocol"),
        (["evaluate.protocols=[classic, classic]", "evaluate.perceptual=psnr_y", "promote.rules=[]"], "evaluate.protocols"),
        (["evaluate.protocols=[classic]"], "evaluate.perceptual"),
        (["evaluate.protocols=[quickstart, seesr]", "promote.rules=[]", "validation.weights=null"], "evaluate.protocols[1]"),
        (["evaluate.metrics=[psnr_y, gmsd, seam]"], "evaluate.metrics[2]"),
        (["validation.metrics=[psnr_y, ssim_y, gmsd, fid]", "validation.weights=w"], "validation.metrics[3]"),
        (["data.validation_px=64"], "data.validation_px"),
        (["sampler.history=keep"], "sampler.history"),
        (["seed=-1"], "seed"),
        (["evaluate.seed=9223372036854775808"], "evaluate.seed"),
        (["cluster.gpus_per_worker=1"], "cluster.gpus_per_worker"),
        (["cluster.gpus_per_worker=0.5", "cluster.num_gpus=1", "pretrain.workers=2"], "cluster.gpus_per_worker"),
        (["cluster.gpus_per_worker=1.5", "cluster.num_gpus=3"], "cluster.gpus_per_worker"),
        (["cluster.num_cpus=1", "pretrain.workers=2"], "pretrain.workers"),
        (["cluster.num_cpus=1", "pretrain.workers=2", "pretrain.min_workers=2"], "pretrain.min_workers"),
    ],
)
def test_impossible_combinations_are_refused_at_the_key_to_blame(write, overrides, key):
    assert [problem.key for problem in problems_of(write(MINIMAL), None, overrides)] == [key]


def test_the_guard_is_on_unless_told_otherwise_and_its_mistakes_are_named(write):
    recipe = write(MINIMAL)
    assert load_recipe(recipe).recipe.pretrain.guard == GuardConfig()
    assert load_recipe(recipe, None, ["pretrain.guard.lr_cut=0.25"]).recipe.pretrain.guard == GuardConfig(lr_cut=0.25)
    found = {problem.key: problem for problem in problems_of(recipe, None, ["finetune.train.guard={lr_cut: 0.0, max_rollback: 2}"])}
    assert found["finetune.train.guard.max_rollback"].fix == "did you mean finetune.train.guard.max_rollbacks?"
    found = {problem.key: problem for problem in problems_of(recipe, None, ["finetune.train.guard.window=2", "pretrain.guard.strikes=3.5"])}
    assert set(found) == {"finetune.train.guard.window", "pretrain.guard.strikes"}


def test_mistakes_in_the_gate_s_rules_are_named_at_their_key(write):
    rules = "[{rule: beter, metric: psnr_y}, {rule: better}, {rule: not_worse, bye: 1}, {rule: better, metric: psnr_y, at_least: -1}, {}]"
    found = {problem.key: problem for problem in problems_of(write(MINIMAL), None, [f"promote.rules={rules}"])}
    assert set(found) == {
        "promote.rules[0].rule",
        "promote.rules[1].metric",
        "promote.rules[2].bye",
        "promote.rules[3].at_least",
        "promote.rules[4]",
    }
    assert found["promote.rules[0].rule"].fix == "did you mean better?"
    assert found["promote.rules[1].metric"].rule == "this is missing; expected text"
    assert found["promote.rules[2].bye"].fix == "did you mean promote.rules[2].by?"
    assert found["promote.rules[3].at_least"].rule == "a number >= 0"
    assert "whose key rule is better, not_worse" in found["promote.rules[4]"].rule


def test_a_rule_is_silent_while_a_setting_it_reads_is_wrong(write):
    misspelt = problems_of(
        write(MINIMAL), None, ["evaluate.metrcs=[psnr_y]", "evaluate.perceptual=vif", "promote.rules=[{rule: better, metric: vif}]"]
    )
    assert [problem.key for problem in misspelt] == ["evaluate.metrcs"]


def test_metrics_with_weights_are_welcome_where_their_folder_is_named(write):
    loaded = load_recipe(write(MINIMAL), None, ["validation.weights=s3://bucket/weights", "evaluate.metrics=[psnr_y, gmsd, lpips]"])
    assert "lpips" in loaded.recipe.evaluate.metrics


@pytest.mark.parametrize(
    ("text", "part"),
    [(None, "no such file"), ("", "empty"), ("# nothing\n", "empty"), ("- a\n", "mapping"), ("a: [", "not valid YAML")],
)
def test_files_that_hold_no_settings_are_named(write, tmp_path, text, part):
    path = str(tmp_path / "missing.yaml") if text is None else write(text, "odd.yaml")
    for arguments in ((path,), (write(MINIMAL), path)):
        (problem,) = problems_of(*arguments)
        assert problem.file.startswith(path)
        assert part in problem.rule


def test_a_folder_or_a_binary_file_is_no_recipe(tmp_path):
    assert "cannot be read" in problems_of(str(tmp_path))[0].rule
    (tmp_path / "image.png").write_bytes(b"\x89PNG\r\n")
    assert "UTF-8" in problems_of(str(tmp_path / "image.png"))[0].rule


@pytest.mark.parametrize("override", ["seed", "=3", "a..b=1", "pretrain.lr=[1", "pretrain.lr=*x"])
def test_a_set_that_cannot_be_read_is_named_beside_other_errors(write, override):
    found = problems_of(write(MINIMAL), None, [override, "seed=x"])
    assert [problem.file for problem in found] == [f"--set {override}", "--set seed=x"]


@pytest.mark.parametrize("override", ["tracking.uri='http://[::1'", "storage=s3://[bucket]/p", "data.sources.more=s3://[bucket]/p"])
def test_a_url_that_cannot_be_taken_apart_is_named(write, override):
    (problem,) = problems_of(write(MINIMAL), None, [override])
    assert (problem.file, problem.key.startswith(override.partition("=")[0])) == (f"--set {override}", True)
    assert "broken" in problem.rule


def test_a_repeated_key_and_a_wrong_value_of_it_are_both_told(write):
    found = problems_of(write(MINIMAL + "seed: x\nseed: 3\n"))
    assert [(problem.key, problem.file.rsplit(":", 1)[1]) for problem in found] == [("seed", "12"), ("seed", "11")]


JSON_VALUES = strategies.recursive(
    strategies.none()
    | strategies.booleans()
    | strategies.integers()
    | strategies.floats(allow_nan=False, allow_infinity=False)
    | strategies.text(),
    lambda inner: strategies.lists(inner, max_size=3) | strategies.dictionaries(strategies.text(), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=50, deadline=None, derandomize=True)
@given(values=strategies.lists(JSON_VALUES, min_size=1, max_size=4), choice=strategies.randoms(use_true_random=False))
def test_no_value_anywhere_breaks_the_checker_itself(values, choice):
    document = parse_document(MINIMAL, "recipe.yaml").value
    recipe, _ = validate(_merged(document))
    tree = recipe.model_dump(mode="json")
    for value in values:
        _replace_somewhere(tree, value, choice)
    _, problems = validate(_merged(tree))
    assert all(str(problem).startswith("recipe.yaml: ") for problem in problems)


def _merged(tree):
    merged = Merged()
    merged.add(Layer("recipe.yaml", deepcopy(tree)))
    return merged


def _replace_somewhere(tree: dict, value: object, choice: random.Random) -> None:
    key = choice.choice(sorted(tree))
    if isinstance(tree[key], dict) and tree[key] and choice.random() < 0.8:
        _replace_somewhere(tree[key], value, choice)
    else:
        tree[key] = value


def test_the_one_protocol_of_earlier_recipes_is_named_as_what_it_is_now(write):
    (problem,) = problems_of(write(MINIMAL), None, ["evaluate.protocol=classic"])
    assert (problem.key, problem.fix) == ("evaluate.protocol", "did you mean evaluate.protocols?")


def test_rules_on_several_protocols_find_their_metrics_and_are_kept_with_their_protocol(write):
    rules = "[{rule: same_protocol}, {rule: not_worse, metrics: [maniqa-pipal]%s}, {rule: no_regression%s}]"
    settings = ["evaluate.protocols=[quickstart, osediff]", "evaluate.metrics=[psnr_y, gmsd, maniqa]", "validation.weights=w"]
    named = load_recipe(write(MINIMAL), None, [*settings, "promote.rules=" + rules % ((", protocol: osediff",) * 2)]).recipe
    assert named.evaluate.measured("quickstart") == ("psnr_y", "gmsd", "maniqa")
    assert named.evaluate.measured("osediff") == ("psnr_y", "gmsd", "maniqa-pipal")
    problems = problems_of(write(MINIMAL), None, [*settings, "promote.rules=" + rules % ((", protocol: quickstart",) * 2)])
    assert [problem.key for problem in problems] == ["promote.rules[1].metrics[0]"]
    one = load_recipe(write(MINIMAL), None, ["promote.rules=[{rule: no_regression}, {rule: knee_found}]"]).recipe
    assert [getattr(rule, "protocol", "-") for rule in one.gate.rules] == ["quickstart", "-"]
    assert one.promote.rules[0].protocol is None


def test_a_recipe_as_it_is_kept_holds_no_password(write):
    loaded = load_recipe(write(MINIMAL), None, ["tracking.uri=postgresql://me:hush@host/mlflow"])
    assert loaded.recipe.tracking.uri == "postgresql://me:hush@host/mlflow"
    assert "hush" not in str(loaded.resolved)
    other = load_recipe(write(MINIMAL), None, ["tracking.uri=postgresql://me:changed@host/mlflow"])
    assert other.hash == loaded.hash


def test_a_problem_shows_no_password_in_its_url(write):
    with pytest.raises(RecipeErrors) as caught:
        load_recipe(write(MINIMAL), None, ["tracking.uri=http://ada:secret@[::1:5000"])
    assert "http://***@[::1:5000" in str(caught.value.errors[0])
    assert not any("secret" in str(problem) for problem in caught.value.errors)
