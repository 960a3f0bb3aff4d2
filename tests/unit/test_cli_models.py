"""`linearsr models` at the command line: what it shows, refuses and writes down, on a real SQLite registry."""

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner, Result

from linearsr_platform.cli.app import app
from linearsr_platform.registry.evaluation import Evaluation, ProtocolTable
from linearsr_platform.tracking.store import connect, default_uri

IMAGES = [f"image-{index}" for index in range(6)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A registry with a better, then a worse version of one model; they have no files, and none are needed here."""
    folder = tmp_path_factory.mktemp("runs")
    client = connect(default_uri(str(folder)))
    client.create_registered_model("net")
    for value in (24.0, 25.0, 23.0):
        values = {"one_step": {"psnr_y": dict.fromkeys(IMAGES, value)}}
        rows = {"one_step": {"psnr_y": value}, "bicubic": {"psnr_y": 22.0}}
        evaluation = Evaluation(tables={"classic": ProtocolTable(protocol={}, test_set="t", rows=rows, values=values)})
        tags = {"evaluation": evaluation.to_json(with_values=True), "bundle.boundaries": "[0.5]", "lineage.recipe_hash": f"hash-{value:g}"}
        client.create_model_version("net", "file:///nowhere", tags=tags, await_creation_for=0)
    client.set_registered_model_alias("net", "challenger", "1")
    return folder


def linearsr(store: Path, *words: str) -> Result:
    return CliRunner().invoke(app, ["models", *words, "--storage", str(store)])


def test_a_release_from_the_first_promotion_to_the_rollback(store: Path) -> None:
    assert "net was never promoted" in linearsr(store, "history", "net").output
    first = linearsr(store, "promote", "net")
    assert (first.exit_code, first.stdout.splitlines()[-1]) == (0, "models:/net@champion is version 1"), first.output
    assert "no champion yet" in first.stdout

    better = linearsr(store, "promote", "net/2")
    assert better.exit_code == 0
    assert "+1" in better.stdout
    worse = linearsr(store, "promote", "net/3")
    assert worse.exit_code == 1
    assert "FAIL" in worse.stdout
    assert "1 of 2 rules failed; models:/net@champion stays what it is" in worse.stderr
    forced = linearsr(store, "promote", "net/3", "--force", "--reason", "a demo")
    assert (forced.exit_code, forced.stdout.splitlines()[-1]) == (0, "models:/net@champion is version 3 by force")
    assert "version 2 again; it was 3" in linearsr(store, "rollback", "net").stdout

    history = linearsr(store, "history", "net").stdout
    assert "promote by force" in history
    assert "a demo" in history
    assert history.splitlines()[-1] == "champion: version 2"
    rows = json.loads(linearsr(store, "history", "net", "--json").stdout)
    assert [(row["action"], row["to_version"], row["forced"]) for row in rows] == [
        ("promote", 1, False),
        ("promote", 2, False),
        ("promote", 3, True),
        ("rollback", 2, False),
    ]
    listed = linearsr(store, "list").stdout
    assert "net.history" not in listed
    assert listed.splitlines()[2].split() == ["net", "2", "champion", "classic", "25.00", "-", "22.00"]


def test_two_versions_side_by_side(store: Path) -> None:
    compared = json.loads(linearsr(store, "compare", "net/1", "net/3", "--json").stdout)
    one_step = next(one for one in compared["metrics"] if one["row"] == "one_step")
    assert (one_step["first"], one_step["second"], one_step["paired"]["mean"], one_step["better"]) == (24.0, 23.0, -1.0, False)
    assert compared["lineage"] == {"recipe_hash": ["hash-24", "hash-23"]}
    text = linearsr(store, "compare", "net/1", "net/3").stdout
    assert "worse" in text
    assert "hash-23" in text
    assert json.loads(linearsr(store, "show", "net/1", "--json").stdout)["evaluation"]["classic"]["rows"]["one_step"] == {"psnr_y": 24.0}


def test_a_container_whose_user_has_no_account_promotes_too(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_account(uid: int) -> object:
        raise KeyError(f"getpwuid(): uid not found: {uid}")

    for name in ("LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", no_account)
    result = linearsr(store, "promote", "net/1", "--force", "--reason", "a container")
    assert result.exit_code == 0, result.output
    assert json.loads(linearsr(store, "history", "net", "--json").stdout)[-1]["by"] == f"uid {os.getuid()}"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("promote", "nett"), "did you mean 'net'"),
        (("show", "net@champoin"), "expected"),
        (("show", "net/9"), "expected one of 1, 2, 3"),
        (("promote", "net", "--force"), "fix: --reason TEXT"),
        (("promote", "net", "--reason", "x"), "--force"),
        (("promote", "net", "--set", "promote.seed=1"), "--recipe"),
        (("list", "--metric", "psnr_yy"), "did you mean 'psnr_y'"),
        (("replace-expert", "net/1", "--expert", "1", "--weights", "x"), "bundle_digest"),
    ],
)
def test_a_mistake_ends_with_2_and_says_what_would_be_right(store: Path, words: tuple[str, ...], said: str) -> None:
    result = linearsr(store, *words)
    assert (result.exit_code, said in result.stderr) == (2, True), result.stderr


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--storage", "s3://bucket/runs"), "fix: --tracking-uri http://HOST:5000"),
        (("--tracking-uri", "sqlite:///{folder}/typo/mlflow.db"), "there is no {folder}/typo/mlflow.db"),
        (("--tracking-uri", "http://[::1"), "Invalid IPv6 URL"),
        (("--storage", "{folder}/typo"), "fix: name the right one"),
    ],
)
def test_a_store_that_is_not_there_is_not_made(tmp_path: Path, options: tuple[str, ...], said: str) -> None:
    words = ["models", "list", *(option.format(folder=tmp_path) for option in options)]
    result = CliRunner().invoke(app, words)
    assert (result.exit_code, said.format(folder=tmp_path) in result.stderr) == (2, True), result.output
    assert list(tmp_path.iterdir()) == []
