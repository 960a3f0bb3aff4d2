"""Whose tags an evaluation reads: those of the LR image where there are some, it says so, and is compared with its like alone."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import skimage.data
from PIL import Image
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from tiny_bundle import TINY, write_bundle

from linearsr import taggers
from linearsr.config import TagsConfig
from linearsr.taggers import Photo, Tag
from linearsr_platform.cli.app import app
from linearsr_platform.data.manifest import load_manifest
from linearsr_platform.data.prepare import prepare
from linearsr_platform.errors import UserError
from linearsr_platform.recipe.load import load_recipe
from linearsr_platform.registry.evaluation import Evaluation, ProtocolTable
from linearsr_platform.registry.gate import why_not_comparable
from linearsr_platform.stages import evaluate, report
from linearsr_platform.stages.measured_set import tags_told

NAMES = ("a", "b", "c")
SETTINGS = (
    "evaluate={protocols: [quickstart], metrics: [psnr_y], perceptual: psnr_y, step_sweep: [1]}",
    "promote.rules=[]",
    "data={sources: {mine: photos}, held_out: [a, b, c], validation_px: 0, min_side_px: 16}",
    "validation.crop_px=16",
)


class Tracked:
    """Keeps what a stage logs."""

    def __init__(self) -> None:
        self.files: dict[str, Any] = {}

    def log_metrics(self, step: int, values: Any) -> None:
        """Metrics are in the tables too."""

    def log_dict(self, value: Any, name: str) -> None:
        self.files[name] = value


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network for which it matters what it is told."""
    tags = TagsConfig(vocabulary=("cat", "cup"), max_tags=2)
    return write_bundle(tmp_path_factory.mktemp("model"), replace(TINY, tags=tags), noise=0.1)


def context_of(
    folder: Path, bundle: Path, root: Path, lr_tags: dict[str, list[str]], *, suffix: str = "png", source: dict[str, object] | None = None
) -> Any:
    """A run that has prepared photographs of a cat; those named in `lr_tags` have tags of their LR images too."""
    photos = folder / "photos"
    photos.mkdir(parents=True)
    for place, name in enumerate((*NAMES, "trained")):
        Image.fromarray(skimage.data.astronaut()[64 * place : 64 * place + 40, 100:148]).save(photos / f"{name}.{suffix}")
        fields = {"tags": ["cat"]} | ({"tags_lr": lr_tags[name]} if name in lr_tags else {})
        (photos / f"{name}.json").write_text(json.dumps(fields))
    loaded = load_recipe(
        str(root / "pipelines/quickstart.yaml"),
        None,
        [*SETTINGS, f"data.sources.mine={json.dumps({'url': str(photos), **(source or {})})}"],
    )
    prepare(loaded.recipe.data, recipe_folder=loaded.folder, output_url=str(folder / "prepared"))
    return SimpleNamespace(
        recipe=loaded.recipe,
        results={"prepare": SimpleNamespace(url=str(folder / "prepared")), "assemble": SimpleNamespace(url=str(bundle.parent))},
        metric_weights=None,
        display=SimpleNamespace(update=lambda name, done, total: None),
    )


def evaluated(folder: Path, bundle: Path, root: Path, lr_tags: dict[str, list[str]]) -> tuple[dict[str, Any], ProtocolTable]:
    """Run the stage; return what it leaves in `evaluation.json`, and its one table."""
    tracked: Any = Tracked()
    output = evaluate.run(context_of(folder, bundle, root, lr_tags), str(folder / "evaluate"), tracked)
    assert tracked.files["evaluation.json"] == output.data
    plain = json.loads(json.dumps(output.data))
    return plain, Evaluation.from_plain(plain["tables"]).tables["quickstart"]


def test_held_out_photographs_are_restored_with_the_tags_of_their_lr_images(tmp_path: Path, bundle: Path, root: Path) -> None:
    photographs = evaluate.held_out(context_of(tmp_path, bundle, root, {"a": ["cup", "cat"], "b": []}))
    told = {photograph.name: (photograph.tags, photograph.tags_of_lr) for photograph in photographs}
    assert told == {"a": (("cup", "cat"), True), "b": ((), True), "c": (("cat",), False)}
    assert [photograph.lr_tags for photograph in photographs] == [["cup", "cat"], [], None]
    untagged = replace(photographs[2], tags=())
    assert tags_told([photographs[2], untagged], []) == "told: of the original for 1 of 2, none for 1 of 2"
    # Where there is a picture already, nobody reads tags.
    assert replace(photographs[0], restored=np.zeros((4, 4, 3), dtype=np.uint8)).lr_tags is None


@pytest.mark.parametrize(("suffix", "halved"), [("png", True), ("jpg", True), ("jpg", False)])
def test_a_tagger_sees_the_very_lr_images_that_are_evaluated(
    tmp_path: Path, bundle: Path, root: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, halved: bool
) -> None:
    seen: dict[str, np.ndarray] = {}

    class Looking:
        """Keeps what it is shown."""

        def tag(self, photos: list[Photo]) -> list[list[Tag]]:
            seen.update((photo.path.stem, np.asarray(photo.image)) for photo in photos if photo.path is not None)
            return [[] for _ in photos]

    monkeypatch.setattr(taggers, "make_tagger", lambda name, config: Looking())
    monkeypatch.chdir(tmp_path)
    context = context_of(tmp_path, bundle, root, {}, suffix=suffix, source={"halve_jpeg": halved})
    # As another file among the photographs: a place in a split would now be another one.
    Image.new("RGB", (48, 40)).save(tmp_path / "photos/_first.png")
    recipe = tmp_path / "recipe.yaml"
    photos = f"{{url: 'photos/[_a-z]*', halve_jpeg: {halved}}}"
    recipe.write_text(f"extends: {root / 'pipelines/quickstart.yaml'}\ndata: {{sources: {{mine: {photos}}}, held_out: [a]}}\n")
    done = CliRunner().invoke(app, ["tag", "photos", "--lr", "--recipe", str(recipe)])
    assert done.exit_code == 0, done.output
    measured = {photograph.name: photograph.lr for photograph in evaluate.held_out(context)}
    assert set(measured) < set(seen)
    assert all(np.array_equal(seen[name], lr) for name, lr in measured.items())


def test_an_evaluation_says_whose_tags_it_read_and_is_compared_with_its_like_alone(tmp_path: Path, bundle: Path, root: Path) -> None:
    plain, without = evaluated(tmp_path / "without", bundle, root, {})
    assert plain["tags"] == "told: of the original for 3 of 3"
    # As every evaluation was before there were tags of LR images.
    assert set(without.protocol) == {"name", "metrics", "weights", "scale", "degradation", "seed"}
    kept = json.loads((tmp_path / "without/evaluate/test_set/lr/test_set.json").read_text())
    assert set(kept) == {"degradation", "seed", "tags"}

    told, said, tables = [], [], [without]
    for name, lr_tags in (
        ("some", {"a": ["cup"], "b": []}),
        ("all", {"a": ["cup"], "b": [], "c": ["cup"]}),
        ("other", {"a": ["cat"], "b": []}),
    ):
        plain, table = evaluated(tmp_path / name, bundle, root, lr_tags)
        read, _, digest = str(table.protocol["tags"]).partition(", ")
        assert f" ({digest})" in plain["tags"]
        told.append(plain["tags"].replace(f" ({digest})", ""))
        said.append(read)
        tables.append(table)
    assert said == ["of the LR image: 2 of 3", "of the LR image: 3 of 3", "of the LR image: 2 of 3"]
    both = "told: of an LR image for 2 of 3, of the original for 1 of 3"
    assert told == [both, "told: of an LR image for 3 of 3", both]
    assert len({table.test_set for table in tables}) == 1
    assert tables[1].rows["routed"] != without.rows["routed"]
    assert all("tags" in why_not_comparable(one, other) for one in tables for other in tables if one is not other)
    assert all(why_not_comparable(one, one) == "" for one in tables)


def test_the_test_set_of_a_run_takes_whose_tags_they_are_with_it(tmp_path: Path, bundle: Path, root: Path) -> None:
    _, table = evaluated(tmp_path, bundle, root, {"a": ["cup"], "b": []})
    folder = tmp_path / "evaluate/test_set"
    kept = json.loads((folder / "lr/test_set.json").read_text())
    assert (kept["tags"], kept["lr_tags"]) == ({"a": ["cup"], "b": [], "c": ["cat"]}, ["a", "b"])
    # What lies beside an LR picture is not read.
    (folder / "lr/c.json").write_text('{"tags": ["cup"]}')
    asked = [
        "evaluate",
        "--lr",
        str(folder / "lr"),
        "--original",
        str(folder / "original"),
        "--protocol",
        "quickstart",
        "--metric",
        "psnr_y",
    ]
    again = CliRunner().invoke(app, [*asked, str(bundle), "--json"])
    assert again.exit_code == 0, again.output
    found = Evaluation.from_json(again.stdout).tables["quickstart"]
    assert why_not_comparable(found, table) == ""
    assert found.rows == table.rows
    assert f"tags {table.protocol['tags']}" in " ".join(CliRunner().invoke(app, [*asked, str(bundle)]).stdout.split())
    finished = [*asked, "--restored", str(folder / "original"), "--json"]
    assert "tags" not in json.loads(CliRunner().invoke(app, finished).stdout)["tables"]["quickstart"]["protocol"]


@pytest.mark.parametrize("recorded", [True, False])
def test_the_report_says_it_if_the_evaluation_does(tmp_path: Path, bundle: Path, root: Path, recorded: bool) -> None:
    context = context_of(tmp_path, bundle, root, {"a": ["cup"]})
    tracked: Any = Tracked()
    output = evaluate.run(context, str(tmp_path / "evaluate"), tracked)
    if not recorded:  # Evaluations from before it was.
        del output.data["tags"]
    context.results["evaluate"] = SimpleNamespace(data=output.data)
    shown = report._evaluation(context)
    told = "tags told: of an LR image for 1 of 3 ("
    assert shown["tags_read"].startswith(told) == recorded
    assert all((told in column.protocol) == recorded for column in shown["metrics"])


def test_photographs_too_small_for_a_metric_are_refused_before_anything_is_trained(tmp_path: Path, bundle: Path, root: Path) -> None:
    context = context_of(tmp_path, bundle, root, {})
    manifest = load_manifest(context.results["prepare"].url)
    evaluate.check_held_out(context, manifest)
    section = context.recipe.evaluate.model_copy(update={"metrics": ("psnr_y", "ms_ssim")})
    context.recipe = context.recipe.model_copy(update={"evaluate": section})
    with pytest.raises(UserError, match=r"data\.held_out: got a photograph of 48 x 40 px; expected sides of at least 176 px for 'ms_ssim'"):
        evaluate.check_held_out(context, manifest)
