"""Weights come into one folder, whole, checked and recorded; a second time nothing moves. Over real connections on loopback."""

import hashlib
import json
import sys
from base64 import b64encode
from datetime import date
from pathlib import Path
from urllib.parse import urlsplit

import fsspec
import pytest
from typer.testing import CliRunner

from linearsr.metric_table import METRICS
from linearsr_platform.cli.app import app
from linearsr_platform.recipe.load import load_recipe
from linearsr_platform.recipe.needs import needs_of
from linearsr_platform.recipe.weight_sources import METRIC_FILES, TAGGER_FILES, hash_beginning
from linearsr_platform.stages.download import WrongHashError, fetch, only_one
from linearsr_platform.stages.hub_folder import bring_from_hub
from linearsr_platform.stages.prefetch import Prefetch

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))
from web_folder import web_folder

TODAY = date(2026, 1, 2)
CONTENT = bytes(range(256)) * 20_000


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def save_autoencoder(folder: Path) -> None:
    autoencoder = pytest.importorskip("diffusers").AutoencoderDC(
        attention_head_dim=8,
        encoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
        decoder_block_types=("ResBlock",) * 3 + ("EfficientViTBlock",) * 3,
        encoder_block_out_channels=(8, 8, 16, 16, 32, 32),
        decoder_block_out_channels=(8, 8, 16, 16, 32, 32),
        encoder_layers_per_block=(1,) * 6,
        decoder_layers_per_block=(1,) * 6,
        scaling_factor=0.41407,
    )
    autoencoder.save_pretrained(folder)


@pytest.fixture
def mirror(tmp_path: Path) -> Path:
    """A folder as somebody fills it by hand: files by name, and one folder."""
    folder = tmp_path / "mirror"
    save_autoencoder(folder / "dc-ae")
    (folder / "dc-ae/README.md").write_text("not a part of it")
    (folder / "niqe_modelparameters.mat").write_bytes(b"two arrays")
    return folder


@pytest.fixture
def arguments(root: Path, tmp_path: Path) -> list[str]:
    """A recipe that needs NIQE's parameters and a DC-AE, and says where it keeps neither."""
    settings = ["model.flow.loss_weighting=latent", "model.codec={kind: dc-ae, factor: 32, source: elsewhere/dc-ae}"]
    settings += ["evaluate.metrics=[psnr_y,ssim_y,gmsd,niqe]", f"storage={tmp_path}"]
    return [str(root / "pipelines/smoke.yaml"), *(word for one in settings for word in ("--set", one))]


def run(*words: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [*map(str, words)])
    return result.exit_code, result.output


def test_every_file_that_a_metric_reads_has_a_publisher() -> None:
    wanted = {file for spec in METRICS.values() for file in spec.weights_files}
    assert wanted - METRIC_FILES.keys() == set()
    for name, source in {**METRIC_FILES, **TAGGER_FILES}.items():
        assert source.urls or source.page, name
        assert all(url.startswith("https://") and url.endswith(f"/{name}") for url in source.urls), name
        assert source.licence
    assert hash_beginning("vgg16-397923af.pth", METRIC_FILES["vgg16-397923af.pth"]) == "397923af"
    clip = METRIC_FILES["RN50.pt"]
    assert hash_beginning("RN50.pt", clip) in clip.urls[0]


def test_the_addresses_are_those_that_pyiqa_and_torchvision_ask() -> None:
    arch_util = pytest.importorskip("pyiqa.archs.arch_util")
    clip_model = pytest.importorskip("pyiqa.archs.clip_model")
    torchvision = pytest.importorskip("torchvision.models")
    from_pyiqa = [name for name, source in METRIC_FILES.items() if source.urls[0].startswith("https://huggingface.co/chaofengc/")]
    assert len(from_pyiqa) == 7
    for name in from_pyiqa:
        assert arch_util.get_url_from_name(name) == METRIC_FILES[name].urls[0]
    assert METRIC_FILES["RN50.pt"].urls == (clip_model._MODELS["RN50"],)
    published = {torchvision.VGG16_Weights.IMAGENET1K_V1.url, torchvision.AlexNet_Weights.IMAGENET1K_V1.url}
    assert published == {METRIC_FILES[name].urls[0] for name in ("vgg16-397923af.pth", "alexnet-owt-7be5be79.pth")}


def test_a_download_that_is_cut_off_goes_on_where_it_was(tmp_path: Path) -> None:
    (tmp_path / "served").mkdir()
    (tmp_path / "served/a.pth").write_bytes(CONTENT)
    seen: list[tuple[int, int]] = []
    with web_folder(tmp_path / "served") as server:
        server.cut_at = 3_000_000
        found = fetch(f"{server.url}/a.pth", tmp_path / "a.pth", sha256=sha256(CONTENT)[:8], on_bytes=lambda *two: seen.append(two))
        assert server.asked == [("/a.pth", ""), ("/a.pth", "bytes=3000000-")]
    assert found == sha256(CONTENT)
    assert (tmp_path / "a.pth").read_bytes() == CONTENT
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "served"]


def test_a_file_that_changed_meanwhile_comes_whole(tmp_path: Path) -> None:
    (tmp_path / "served").mkdir()
    served, part = tmp_path / "served/a.mat", tmp_path / "a.mat.part-download"
    served.write_bytes(CONTENT)
    with web_folder(tmp_path / "served") as server:
        # As a process leaves it that was killed: a part, and the version it is of.
        part.write_bytes(CONTENT[:1000])
        name = hashlib.sha256(f"{server.url}/a.mat".encode()).hexdigest()
        part.with_name(f"{part.name}.json").write_text(json.dumps({"url": name, "version": f'"{sha256(CONTENT)}"'}))
        served.write_bytes(CONTENT[::-1])
        fetch(f"{server.url}/a.mat", tmp_path / "a.mat")
        assert server.asked == [("/a.mat", "bytes=1000-")]
    assert (tmp_path / "a.mat").read_bytes() == CONTENT[::-1]


def test_a_part_that_was_whole_already_is_no_obstacle(tmp_path: Path) -> None:
    (tmp_path / "served").mkdir()
    (tmp_path / "served/a.mat").write_bytes(CONTENT)
    part = tmp_path / "a.mat.part-download"
    with web_folder(tmp_path / "served") as server:
        part.write_bytes(CONTENT)
        name = hashlib.sha256(f"{server.url}/a.mat".encode()).hexdigest()
        part.with_name(f"{part.name}.json").write_text(json.dumps({"url": name, "version": f'"{sha256(CONTENT)}"'}))
        fetch(f"{server.url}/a.mat", tmp_path / "a.mat")
    assert (tmp_path / "a.mat").read_bytes() == CONTENT


def test_a_wrong_file_replaces_nothing(tmp_path: Path) -> None:
    (tmp_path / "served").mkdir()
    (tmp_path / "served/a.pth").write_bytes(CONTENT)
    (tmp_path / "a.pth").write_bytes(b"right")
    with web_folder(tmp_path / "served") as server, pytest.raises(WrongHashError, match=rf"{sha256(CONTENT)}; expected 01234567\.\.\."):
        fetch(f"{server.url}/a.pth", tmp_path / "a.pth", sha256="01234567")
    assert (tmp_path / "a.pth").read_bytes() == b"right"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.pth", "served"]


def test_a_recipe_finds_what_was_brought_and_nothing_moves_twice(
    mirror: Path, arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with web_folder(mirror) as server:
        code, output = run("prefetch", *arguments, "--from", server.url)
        assert code == 0, output
        first = len(server.asked)
        code, again = run("prefetch", *arguments, "--from", server.url)
        assert code == 0, again
        assert again.count("present") == 2
        # Only the mirror's own manifest, which it has not, is asked for.
        assert {path for path, _ in server.asked[first:]} <= {"/manifest.json"}
    files = json.loads((tmp_path / "weights/manifest.json").read_text())["files"]
    assert sorted(files) == ["dc-ae/config.json", "dc-ae/diffusion_pytorch_model.safetensors", "metrics/niqe_modelparameters.mat"]
    assert files["metrics/niqe_modelparameters.mat"]["sha256"] == sha256(b"two arrays")
    assert files["metrics/niqe_modelparameters.mat"]["needed_by"] == ["niqe in evaluate.metrics"]
    printed = next(line for line in output.splitlines() if line.lstrip().startswith("--set")).split()
    assert printed == ["--set", "validation.weights=weights/metrics", "--set", "model.codec.source=weights/dc-ae"]
    assert "model:\n    codec:\n      source: weights/dc-ae" in output
    code, found = run("doctor", "--offline", *arguments, *printed)
    assert code == 0, found
    assert found.count("as recorded") == 2


def test_what_was_changed_is_brought_again(mirror: Path, arguments: list[str], tmp_path: Path) -> None:
    into = tmp_path / "weights"
    run("prefetch", *arguments, "--from", mirror, "--into", into)
    for file in (into / "metrics/niqe_modelparameters.mat", into / "dc-ae/config.json"):
        file.write_bytes(b"damaged")
    code, output = run("prefetch", *arguments, "--from", mirror, "--into", into)
    assert (code, output.count("brought")) == (0, 2), output
    assert (into / "metrics/niqe_modelparameters.mat").read_bytes() == b"two arrays"
    assert (into / "dc-ae/config.json").read_bytes() == (mirror / "dc-ae/config.json").read_bytes()


def test_a_file_that_is_gone_from_a_folder_is_brought_again(root: Path, tmp_path: Path) -> None:
    for name in ("config.json", "model.safetensors", "tokenizer.json", "special_tokens_map.json"):
        (tmp_path / "mirror/encoder").mkdir(parents=True, exist_ok=True)
        (tmp_path / "mirror/encoder" / name).write_text("{}")
    words = ["prefetch", root / "pipelines/smoke.yaml", "--set", "model.text={folder: encoder}", "--from", tmp_path / "mirror"]
    words += ["--into", tmp_path / "weights"]
    assert run(*words)[0] == 0
    (tmp_path / "weights/encoder/special_tokens_map.json").unlink()
    assert "brought" in run(*words)[1]
    assert (tmp_path / "weights/encoder/special_tokens_map.json").is_file()
    (tmp_path / "mirror/encoder/tokenizer.json").unlink()
    code, output = run(*words[:-1], tmp_path / "other")
    assert (code, "no tokenizer" in output) == (1, True)


def test_a_folder_whose_files_came_only_in_part_is_not_present(root: Path, tmp_path: Path) -> None:
    encoder = tmp_path / "mirror/encoder"
    encoder.mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        (encoder / name).write_text("{}")
    words = ["prefetch", root / "pipelines/smoke.yaml", "--set", "model.text={folder: encoder}", "--into", tmp_path / "weights"]
    with web_folder(tmp_path / "mirror") as server:
        server.gone.add("/encoder/tokenizer_config.json")  # Still in the listing.
        assert run(*words, "--from", server.url)[0] == 1
        server.gone.clear()
        code, output = run(*words, "--from", server.url)
    assert (code, "brought" in output) == (0, True)
    assert (tmp_path / "weights/encoder/tokenizer_config.json").read_text() == "{}"


def test_a_login_in_an_address_is_used_and_not_shown(tmp_path: Path) -> None:
    (tmp_path / "served").mkdir()
    (tmp_path / "served/a.pth").write_bytes(CONTENT)
    with web_folder(tmp_path / "served") as server:
        fetch(f"{server.url.replace('//', '//bob:s%40cret@')}/a.pth", tmp_path / "a.pth")
        assert server.logins == ["Basic " + b64encode(b"bob:s@cret").decode()]
    assert (tmp_path / "a.pth").read_bytes() == CONTENT


def test_a_login_is_not_sent_on_to_another_host(tmp_path: Path) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store/a.pth").write_bytes(CONTENT)
    with web_folder(tmp_path / "store") as store, web_folder(tmp_path) as server:
        server.moved["/a.pth"] = f"{store.url}/a.pth"
        server.moved["/old.pth"] = "/store/a.pth"
        for name in ("a.pth", "old.pth"):
            fetch(f"{server.url.replace('//', '//bob:secret@')}/{name}", tmp_path / name)
            assert (tmp_path / name).read_bytes() == CONTENT
        assert (store.logins, len(server.logins)) == ([], 3)


def test_a_folder_that_was_filled_is_a_mirror_whose_hashes_count(mirror: Path, arguments: list[str], tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    run("prefetch", *arguments, "--from", mirror, "--into", first)
    (first / "metrics/niqe_modelparameters.mat").write_bytes(b"damaged on the way")
    code, output = run("prefetch", *arguments, "--from", first, "--into", second)
    assert code == 1
    assert f"expected {sha256(b'two arrays')}" in output
    assert not (second / "metrics/niqe_modelparameters.mat").exists()
    assert (second / "dc-ae/config.json").is_file()


def test_a_file_under_a_publishers_name_must_have_its_hash(mirror: Path, arguments: list[str], tmp_path: Path) -> None:
    (mirror / "LPIPS_v0.1_alex-df73285e.pth").write_bytes(b"something else")
    words = [*arguments, "--set", "evaluate.metrics=[psnr_y,ssim_y,gmsd,niqe,lpips]", "--from", mirror, "--into", tmp_path / "weights"]
    code, output = run("prefetch", *words)
    assert code == 1
    assert "LPIPS_v0.1_alex-df73285e.pth" in output
    assert "expected df73285e..." in output
    assert sorted(path.name for path in (tmp_path / "weights/metrics").iterdir()) == ["niqe_modelparameters.mat"]
    record = {"sha256": sha256(b"something else")}
    (mirror / "manifest.json").write_text(json.dumps({"files": {"metrics/LPIPS_v0.1_alex-df73285e.pth": record}}))
    code, output = run("prefetch", *words)
    assert (code, "got a mirror whose manifest says" in output) == (1, True)


def test_weights_come_from_an_object_store(mirror: Path, arguments: list[str], tmp_path: Path) -> None:
    store = fsspec.filesystem("memory")
    store.put(str(mirror), "/prefetch-mirror", recursive=True)
    overrides = [word for word in arguments[1:] if word != "--set"]
    needs = needs_of(load_recipe(arguments[0], None, [*overrides, "validation.weights=anywhere"]).recipe)
    outcomes = Prefetch(into=tmp_path / "weights", mirror="memory://prefetch-mirror", today=TODAY).run(needs)
    assert [(one.need.target, one.state) for one in outcomes] == [("metrics/niqe_modelparameters.mat", "brought"), ("dc-ae", "brought")]
    assert (tmp_path / "weights/dc-ae/diffusion_pytorch_model.safetensors").is_file()


def test_the_hubs_own_client_brings_a_folder(mirror: Path, tmp_path: Path) -> None:
    """Against a server that speaks the part of the hub's protocol that the client uses."""
    commit = "0123456789abcdef0123456789abcdef01234567"
    files = sorted(path for path in (mirror / "dc-ae").iterdir() if path.is_file())
    hub = tmp_path / "hub"
    (hub / "owner/dc-ae/resolve").mkdir(parents=True)
    (hub / f"owner/dc-ae/resolve/{commit}").symlink_to(mirror / "dc-ae")
    api = hub / "api/models/owner"
    api.mkdir(parents=True)
    tree = [{"type": "file", "path": file.name, "size": file.stat().st_size, "oid": sha256(file.read_bytes())[:40]} for file in files]
    answers = {
        "/api/models/owner/dc-ae": {"id": "owner/dc-ae", "sha": commit, "siblings": []},
        f"/api/models/owner/dc-ae/tree/{commit}": tree,
    }
    with web_folder(hub) as server:
        server.fixed = {path: json.dumps(content).encode() for path, content in answers.items()}
        server.headers = {"X-Repo-Commit": commit}
        source = bring_from_hub("owner/dc-ae", tmp_path / "dc-ae", ("config.json", "*.safetensors"), endpoint=server.url)
        asked = {urlsplit(path).path for path, _ in server.asked}
    assert source == f"hub owner/dc-ae@{commit}"
    assert not any(path.endswith("README.md") for path in asked)
    brought = sorted(path.name for path in (tmp_path / "dc-ae").iterdir() if not path.name.startswith("."))
    assert brought == ["config.json", "diffusion_pytorch_model.safetensors"]
    for name in brought:
        assert (tmp_path / "dc-ae" / name).read_bytes() == (mirror / "dc-ae" / name).read_bytes()


def test_a_dry_run_asks_nobody_and_writes_nothing(arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr("socket.socket.connect", refuse)
    code, output = run("prefetch", *arguments, "--dry-run", "--into", tmp_path / "weights", "--tagger", "dape")
    assert code == 1
    assert "https://huggingface.co/chaofengc/IQA-PyTorch-Weights/resolve/main/niqe_modelparameters.mat" in output
    assert "mit-han-lab/dc-ae-f32c32-sana-1.0-diffusers" in output
    assert "DAPE.pth: no source: no address for programs; https://github.com/cswry/SeeSR" in output
    assert not (tmp_path / "weights").exists()


def test_two_do_not_write_into_one_folder(arguments: list[str], mirror: Path, tmp_path: Path) -> None:
    with only_one(tmp_path / "weights"):
        code, output = run("prefetch", *arguments, "--from", mirror, "--into", tmp_path / "weights")
    assert code == 1
    assert "another `linearsr prefetch`" in output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--what", "metric"], "--what: got 'metric'; expected some of metrics, codec"),
        (["--what", "tagger"], "fix: --tagger ram"),
        (["--tagger", "imagenet"], "--tagger: got 'imagenet'; expected one of ram, dape, clip"),
        (["--into", "s3://bucket/weights"], "expected a folder of this machine"),
        (["--hub", "codec=dcae"], "--hub: got 'codec=dcae'"),
        (["--hub", "metrics=a/b"], "--hub: got 'metrics'"),
        (["--set", "evaluate.metrics=[psnr_z]"], 'evaluate.metrics[0]: got "psnr_z"'),
    ],
)
def test_mistakes_are_told(arguments: list[str], words: list[str], message: str) -> None:
    code, output = run("prefetch", *arguments, *words)
    assert code == 2
    assert message in output
