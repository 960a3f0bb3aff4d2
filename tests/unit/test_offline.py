"""`linearsr doctor --offline` says what a recipe lacks, what brings it, and opens no connection."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from linearsr_platform.cli.app import app
from linearsr_platform.errors import UserError
from linearsr_platform.recipe.load import load_recipe
from linearsr_platform.stages.preflight import check_before_training

SETTINGS = ["evaluate.metrics=[psnr_y,ssim_y,gmsd,niqe,lpips]", "model.text={folder: weights/all-MiniLM-L6-v2}"]


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr("socket.socket.connect", refuse)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.chdir(tmp_path)


def doctor(root: Path, *settings: str) -> tuple[int, dict[str, dict[str, object]]]:
    words = [word for one in settings for word in ("--set", one)]
    result = CliRunner().invoke(app, ["doctor", "--offline", str(root / "pipelines/smoke.yaml"), "--json", *words])
    assert result.exit_code in (0, 1), result.output
    return result.exit_code, {one["name"]: one for one in json.loads(result.output)["found"]}


def write_encoder(folder: Path, *, tokenizer: bool = True) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("config.json", "model.safetensors", *(["tokenizer.json"] if tokenizer else [])):
        (folder / name).write_text("{}")


def test_everything_that_is_missing_is_named_with_what_brings_it(root: Path, tmp_path: Path) -> None:
    code, found = doctor(root, *SETTINGS, "validation.weights=weights/metrics", "model.init_weights=weights/sana/network.safetensors")
    assert code == 1
    missing = {name: one["looked_in"] for name, one in found.items() if one["state"] == "missing"}
    assert missing == {
        "niqe_modelparameters.mat": f"{tmp_path}/weights/metrics/niqe_modelparameters.mat",
        "LPIPS_v0.1_alex-df73285e.pth": f"{tmp_path}/weights/metrics/LPIPS_v0.1_alex-df73285e.pth",
        "alexnet-owt-7be5be79.pth": f"{tmp_path}/weights/metrics/alexnet-owt-7be5be79.pth",
        "all-MiniLM-L6-v2": f"{tmp_path}/weights/all-MiniLM-L6-v2",
        "network.safetensors": f"{tmp_path}/weights/sana/network.safetensors",
    }
    assert found["LPIPS_v0.1_alex-df73285e.pth"]["needed_by"] == ["lpips in evaluate.metrics"]
    assert str(found["all-MiniLM-L6-v2"]["fix"]).endswith("--what text-encoder --into weights")
    assert "linearsr import-sana" in str(found["network.safetensors"]["fix"])
    packages = {name for name, one in found.items() if one["kind"] == "package"}
    assert packages == {"pyiqa", "transformers", "skimage", "sklearn"}


def test_the_command_that_it_names_fills_the_place_that_was_looked_in(root: Path, tmp_path: Path) -> None:
    mirror, encoder = tmp_path / "mirror", tmp_path / "mirror/all-MiniLM-L6-v2"
    write_encoder(encoder)
    (mirror / "niqe_modelparameters.mat").write_bytes(b"arrays")
    settings = ["evaluate.metrics=[psnr_y,ssim_y,gmsd,niqe]", SETTINGS[1], "validation.weights=shared/metrics"]
    _, found = doctor(root, *settings)
    for one in found.values():
        if one["fix"]:
            words = shlex.split(str(one["fix"]))[1:]
            done = CliRunner().invoke(app, [*words, "--from", str(mirror)])
            assert done.exit_code == 0, done.output
    code, found = doctor(root, *settings)
    assert (code, {one["detail"] for one in found.values()}) == (0, {"as recorded", ""})


def test_a_file_that_is_not_what_was_recorded_or_what_its_name_says_is_told(root: Path, tmp_path: Path) -> None:
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    (mirror / "niqe_modelparameters.mat").write_bytes(b"arrays")
    recipe = str(root / "pipelines/smoke.yaml")
    only = ["--set", "evaluate.metrics=[psnr_y,ssim_y,gmsd,niqe]"]
    assert CliRunner().invoke(app, ["prefetch", recipe, *only, "--from", str(mirror)]).exit_code == 0
    folder = tmp_path / "weights/metrics"
    (folder / "niqe_modelparameters.mat").write_bytes(b"other arrays")
    (folder / "LPIPS_v0.1_alex-df73285e.pth").write_bytes(b"cut off")
    code, found = doctor(root, SETTINGS[0], "validation.weights=weights/metrics")
    states = {name: one["state"] for name, one in found.items() if one["kind"] == "metrics"}
    assert code == 1
    assert states == {
        "niqe_modelparameters.mat": "wrong hash",
        "LPIPS_v0.1_alex-df73285e.pth": "wrong hash",
        "alexnet-owt-7be5be79.pth": "missing",
    }
    assert "expected df73285e" in str(found["LPIPS_v0.1_alex-df73285e.pth"]["detail"])


def test_a_folder_that_was_cut_off_is_not_taken_for_whole(root: Path, tmp_path: Path) -> None:
    folder = tmp_path / "weights/all-MiniLM-L6-v2"
    for prepare, problem in (
        (lambda: write_encoder(folder, tokenizer=False), "no tokenizer"),
        (lambda: (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors"), "no complete *.safetensors"),
        (
            lambda: (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "model-00002-of-00002.safetensors"}}'),
            "no model-00002-of-00002.safetensors",
        ),
        (lambda: shutil.rmtree(folder), "no such folder"),
    ):
        prepare()
        _, found = doctor(root, SETTINGS[1])
        assert (found[folder.name]["state"], found[folder.name]["detail"]) == ("missing", problem)


def test_basicsrs_parameters_of_niqe_do_as_well(root: Path, tmp_path: Path) -> None:
    (tmp_path / "niqe_pris_params.npz").write_bytes(b"arrays")
    code, found = doctor(root, "evaluate.metrics=[psnr_y,ssim_y,gmsd,niqe]", f"validation.weights={tmp_path}")
    assert code == 0, found


def test_weights_at_a_url_are_not_looked_at(root: Path) -> None:
    code, found = doctor(root, "model.init_weights=s3://bucket/sana/network.safetensors")
    assert (code, found["network.safetensors"]["state"]) == (0, "remote")


def test_people_read_one_line_for_each_thing_and_one_fix_for_each_kind(root: Path) -> None:
    words = ["doctor", "--offline", str(root / "pipelines/smoke.yaml"), "--set", SETTINGS[0], "--set", "validation.weights=weights/metrics"]
    result = CliRunner().invoke(app, words)
    assert result.exit_code == 1
    assert result.output.count("  fix: linearsr prefetch ") == 1
    assert "3 of 6 missing or wrong" in result.output


def test_the_verb_of_doctor_and_its_option_do_not_mix(root: Path) -> None:
    recipe = str(root / "pipelines/smoke.yaml")
    result = CliRunner().invoke(app, ["doctor", "--offline", recipe, "resume", recipe])
    assert (result.exit_code, "expected one or the other" in result.output) == (2, True)
    result = CliRunner().invoke(app, ["doctor", "--json"])
    assert (result.exit_code, "linearsr doctor --offline RECIPE" in result.output) == (2, True)
    assert CliRunner().invoke(app, ["doctor", "resume", "--help"]).exit_code == 0


def test_a_run_without_weights_names_the_command(root: Path, tmp_path: Path) -> None:
    settings = ["validation.metrics=[psnr_y,ssim_y,gmsd,niqe]", "validation.weights=gone", f"storage={tmp_path}"]
    recipe = load_recipe(str(root / "pipelines/smoke.yaml"), None, settings).recipe
    with pytest.raises(UserError, match=r"niqe_modelparameters.mat.*`linearsr prefetch RECIPE --what metrics`"):
        check_before_training(recipe)
