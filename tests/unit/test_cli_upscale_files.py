"""`linearsr upscale` on folders, globs and shards: what is written, kept, skipped, refused and shown."""

import io
import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from tiny_bundle import write_bundle

from linearsr_platform.cli.app import app
from linearsr_platform.data import shard_files
from linearsr_platform.data.cache import ShardCache
from linearsr_platform.data.picture_shards import read_members, write_members
from linearsr_platform.stages import upscaling


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("model"))


def png(width: int = 12, height: int = 9, mode: str = "RGB") -> bytes:
    buffer = io.BytesIO()
    Image.radial_gradient("L").resize((width, height)).convert(mode).save(buffer, "PNG")
    return buffer.getvalue()


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["upscale", *map(str, arguments)])
    assert "Traceback" not in result.output
    return result.exit_code, result.output


@pytest.mark.parametrize(
    ("options", "size", "said"),
    [
        (("--scale", "2.5"), (30, 22), "reduced by Lanczos"),
        (("--size", "24x100"), (24, 18), "reduced by Lanczos"),
        (("--longest", "96"), (96, 72), "enlarged bicubically"),
        (("--colour-fix", "wavelet"), (48, 36), ""),
        (("--color-fix", "adain", "--tile", "8"), (48, 36), "2 x 2 tiles of 8 x 8, overlap 2"),
        (("--residency", "one", "--memory", "1"), (48, 36), ""),
    ],
)
def test_sizes_fixes_tiles_and_residency(bundle: Path, tmp_path: Path, options: tuple[str, ...], size: tuple[int, int], said: str) -> None:
    (tmp_path / "a.png").write_bytes(png())
    code, output = run(tmp_path / "a.png", tmp_path / "out.png", "--model", bundle, *options)
    assert code == 0, output
    assert said in output
    with Image.open(tmp_path / "out.png") as large:
        assert large.size == size


def test_a_broken_file_in_a_folder_does_not_stop_the_others_and_finished_ones_are_skipped(bundle: Path, tmp_path: Path) -> None:
    folder, out = tmp_path / "in", tmp_path / "out"
    (folder / "deeper").mkdir(parents=True)
    (folder / "a.png").write_bytes(png()[:80])
    (folder / "b.png").write_bytes(png(mode="LA"))
    Image.open(io.BytesIO(png())).save(folder / "deeper" / "c.tif")
    code, output = run(folder, out, "--model", bundle)
    assert code == 1
    assert "1 of 3 failed" in output
    assert "a.png: cannot be decoded" in " ".join(output.split())
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()) == ["b.png", "deeper/c.png"]
    with Image.open(out / "b.png") as grey:
        assert (grey.mode, grey.size) == ("LA", (48, 36))
    (folder / "a.png").write_bytes(png())
    before = (out / "b.png").stat().st_mtime_ns
    code, output = run(folder, out, "--model", bundle)
    assert code == 0, output
    assert output.count("exists and is kept; --overwrite replaces it") == 2
    assert "1 done, 2 skipped" in output
    assert (out / "b.png").stat().st_mtime_ns == before
    run(folder, out, "--model", bundle, "--overwrite")
    assert (out / "b.png").stat().st_mtime_ns > before


def test_a_glob_keeps_the_folders_below_its_fixed_part(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "in" / "x").mkdir(parents=True)
    for name in ("in/x/a.png", "in/x/b.jpg", "in/c.png"):
        (tmp_path / name).write_bytes(png())
    code, output = run(tmp_path / "in" / "**" / "*.png", tmp_path / "out", "--model", bundle)
    assert code == 0, output
    assert sorted(str(path.relative_to(tmp_path / "out")) for path in (tmp_path / "out").rglob("*.png")) == ["c.png", "x/a.png"]
    code, output = run(tmp_path / "in" / "*.bmp", tmp_path / "out", "--model", bundle)
    assert (code, "matches no image" in output) == (2, True)


def test_two_files_that_would_become_one_are_refused(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    for name in ("a.png", "a.bmp"):
        (tmp_path / "in" / name).write_bytes(png())
    code, output = run(tmp_path / "in", tmp_path / "out", "--model", bundle)
    assert (code, "expected one source for each file" in " ".join(output.split())) == (2, True)


def test_a_shard_keeps_its_keys_and_members_and_corrects_what_they_say_of_size(bundle: Path, tmp_path: Path) -> None:
    facts = {"width_px": 12, "height_px": 9, "sha256": "old", "licence": "CC0"}
    samples = [
        ("x/0001", {"png": png(), "json": json.dumps(facts).encode(), "txt": b"cat"}),
        ("x/0002", {"jpg": b"broken", "txt": b"dog"}),
        ("x/0003", {"tif": png(), "seg.png": png(), "cls": b"3"}),
    ]
    write_members(str(tmp_path / "in.tar"), samples)
    code, output = run(tmp_path / "in.tar", tmp_path / "out.tar", "--model", bundle)
    assert (code, "x/0002.jpg: not a picture" in " ".join(output.split())) == (1, True)
    assert "left out of the new shard, which counts as done: --overwrite makes it again" in " ".join(output.split())
    made = dict(read_members(str(tmp_path / "out.tar")))
    assert {key: sorted(members) for key, members in made.items()} == {
        "x/0001": ["json", "png", "txt"],
        "x/0003": ["cls", "png", "seg.png"],
    }
    assert made["x/0003"]["seg.png"] == png(), "what is not the sample's picture stays as it is"
    told = json.loads(made["x/0001"]["json"])
    assert (told["width_px"], told["height_px"], told["licence"]) == (48, 36, "CC0")
    assert told["sha256"] != "old"
    with Image.open(io.BytesIO(made["x/0003"]["png"])) as large:
        assert large.size == (48, 36)
    assert "copied as they are: KEY.seg.png (1)" in " ".join(output.split())
    (tmp_path / "cut.tar").write_bytes((tmp_path / "in.tar").read_bytes()[:700])
    code, output = run(tmp_path / "cut.tar", tmp_path / "none.tar", "--model", bundle)
    assert (code, "cut.tar: cannot be read" in " ".join(output.split())) == (2, True)
    assert not (tmp_path / "none.tar").exists()
    with tarfile.open(tmp_path / "out.tar") as tar:
        assert {member.mtime for member in tar} == {0}, "the same shard gives the same file"


@pytest.mark.parametrize(
    ("samples", "said"),
    [
        ([("IMG_2024", {"05.01.png": png()}), ("005", {"lr.jpg": png()})], "without pictures (KEY.05.01.png (1), KEY.lr.jpg (1))"),
        ([], "without pictures (no members)"),
        ([("1", {"png": b"broken"})], "1.png: not a picture"),
    ],
)
def test_a_shard_of_which_nothing_is_enlarged_fails_and_is_not_written(
    bundle: Path, tmp_path: Path, samples: list[tuple[str, dict[str, bytes]]], said: str
) -> None:
    write_members(str(tmp_path / "in.tar"), samples)
    for target in (tmp_path / "out.tar", "--plan"):
        code, output = run(tmp_path / "in.tar", target, "--model", bundle)
        assert (code, said in " ".join(output.split())) == (2, True), output
        assert "counts as done" not in output
    assert [path.name for path in tmp_path.iterdir()] == ["in.tar"]


def test_the_part_of_a_photograph_that_a_sample_is_stays_that_part(bundle: Path, tmp_path: Path) -> None:
    facts = {"width_px": 5, "height_px": 4, "box": [3, 1, 8, 5], "crop_box": [3, 1, 8, 5], "sha256": "old", "latent_codec": "c"}
    write_members(str(tmp_path / "in.tar"), [("1", {"png": png(), "json": json.dumps(facts).encode(), "latent.npy": b"small"})])
    code, output = run(tmp_path / "in.tar", tmp_path / "out.tar", "--model", bundle, "--scale", "3")
    assert code == 0, output
    ((_, made),) = read_members(str(tmp_path / "out.tar"))
    told = json.loads(made["json"])
    assert (told["box"], told["width_px"], told["height_px"]) == ([9, 3, 24, 15], 15, 12)
    assert told["crop_box"] == [3, 1, 8, 5], "in the photograph that it was cut from"
    assert ("latent.npy" in made, "latent_codec" in told) == (False, False), "it is the small picture's"


def test_a_shard_whose_store_does_not_answer_fails_alone(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("a", "b"):
        write_members(str(tmp_path / "in" / f"{name}.tar"), [("1", {"png": png()})])
    open_shard = shard_files.open_shard

    def away(url: str, cache: ShardCache | None = None) -> shard_files.Shard:
        if url.endswith("a.tar"):
            raise shard_files.ShardAwayError("shard a.tar: its store does not answer")
        return open_shard(url, cache)

    monkeypatch.setattr(shard_files, "open_shard", away)
    code, output = run(tmp_path / "in", tmp_path / "out", "--model", bundle)
    assert (code, "shard a.tar: its store does not answer" in " ".join(output.split())) == (1, True), output
    assert [file.name for file in (tmp_path / "out").iterdir()] == ["b.tar"]


def test_a_shard_keeps_long_names_and_loses_no_picture_to_another(bundle: Path, tmp_path: Path) -> None:
    samples = [("ä" * 110, {"png": png()}), ("twice", {"tif": png(), "png": png()})]
    write_members(str(tmp_path / "in.tar"), samples)
    code, output = run(tmp_path / "in.tar", tmp_path / "out.tar", "--model", bundle)
    assert (code, "twice: got tif and png; expected one picture that becomes png" in " ".join(output.split())) == (1, True)
    assert [key for key, _ in read_members(str(tmp_path / "out.tar"))] == ["ä" * 110]


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory"), MemoryError()])
def test_a_picture_that_takes_all_memory_does_not_stop_the_others(
    bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    (tmp_path / "in").mkdir()
    for name, width in (("a.png", 12), ("b.png", 16)):
        (tmp_path / "in" / name).write_bytes(png(width))
    enlarge = upscaling.enlarge

    def too_large(upscaler, picture, *arguments, **options):
        if picture.size[0] == 12:
            raise error
        return enlarge(upscaler, picture, *arguments, **options)

    monkeypatch.setattr(upscaling, "enlarge", too_large)
    code, output = run(tmp_path / "in", tmp_path / "out", "--model", bundle)
    assert (code, "memory: ran out of it on 12 x 9 px" in " ".join(output.split())) == (1, True)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["b.png"]


def test_a_name_that_is_no_text_is_said_and_does_not_end_the_command(bundle: Path, tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / os.fsdecode(b"caf\xe9.png")).write_bytes(png())
    command = [sys.executable, "-m", "linearsr_platform", "upscale", str(folder), str(tmp_path / "out"), "--model", str(bundle)]
    for _ in range(2):
        done = subprocess.run(command, capture_output=True, check=False, env={**os.environ, "PYTHONIOENCODING": "utf-8:strict"})
        assert done.returncode == 0, done.stderr
    assert rb"caf\udce9.png  exists and is kept" in done.stdout


def test_a_plan_says_what_would_be_done_and_does_nothing(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(200, 100))
    code, output = run(tmp_path / "a.png", "--plan", "--model", bundle, "--scale", "2")
    assert code == 0, output
    assert "200 x 100 to 400 x 200: 200 x 100 tokens, whole, all experts" in output
    code, output = run(tmp_path / "a.png", "--plan", "--model", bundle, "--memory", "0.04")
    assert (code, "tiles of" in output, "one expert at a time" in output or "all experts" in output) == (0, True, True), output
    code, output = run(tmp_path / "a.png", "--plan", "--model", bundle, "--memory", "0.001")
    assert (code, "memory: got 1.0 MB; expected" in output) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_timings_name_every_part_and_add_up(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    result = CliRunner().invoke(app, ["upscale", str(tmp_path / "a.png"), str(tmp_path / "b.png"), "--model", str(bundle), "--json"])
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    parts = {part["name"]: part["count"] for part in told["timings"]["parts"]}
    expected = {"read": 1, "stem": 2, "tags": 2, "expert 1": 1, "expert 2": 1, "switch": 2, "decode": 1, "colour fix": 1}
    assert parts.items() >= expected.items()
    assert sum(part["seconds"] for part in told["timings"]["parts"]) == pytest.approx(told["timings"]["total_s"])
    assert told["pictures"][0]["width_px"] == 48
    code, output = run(tmp_path / "a.png", tmp_path / "c.png", "--model", bundle, "--timings")
    assert code == 0
    assert {"read", "switch", "decode", "write", "total"} <= {line.split()[0] for line in output.splitlines() if line.split()}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("a.png",), "got no OUT"),
        (("a.png", "o.png", "--colour-fix", "sepia"), "expected wavelet, adain or none"),
        (("a.png", "o.png", "--scale", "2", "--longest", "9"), "give one of --scale, --size and --longest"),
        (("a.png", "o.png", "--size", "big"), "WIDTHxHEIGHT"),
        (("a.png", "o.png", "--device", "abacus"), "expected auto, cpu or cuda"),
        (("a.png", "o.png", "--residency", "two"), "expected auto, all or one"),
        (("a.png", "o.png", "--memory", "-1"), "expected gigabytes above 0"),
        (("s.tar", "o.png"), "because s.tar is a shard"),
        (("a.png", "--workers", "2", "--plan"), "a plan is made in this process; fix: leave out --address and --workers"),
        (("a.png", "o.png", "--address", "auto", "--timings"), "workers do not measure their parts"),
        (("a.png", "o.png", "--gpus-per-worker", "1"), "--gpus-per-worker: got it without workers"),
        (("a.png", "o.png", "--secret", "KEY=env:KEY"), "--secret: got it without workers"),
        (("a.png", "o.png", "--workers", "1", "--secret", "KEY=hunter2"), "got a wrong reference for 'KEY'; expected NAME=env:VARIABLE"),
        (("a.png", "memory://o.png", "--workers", "1"), "the memory of this process; expected a place that workers see"),
    ],
)
def test_mistakes_exit_with_2(bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], said: str) -> None:
    monkeypatch.chdir(tmp_path)
    Path("a.png").write_bytes(png())
    Path("s.tar").write_bytes(b"")
    code, output = run(*arguments, "--model", bundle)
    assert code == 2, output
    assert said in " ".join(output.split())
    assert "hunter2" not in output
    assert not Path("o.png").exists()


def test_alpha_is_carried_and_16_bits_come_out_as_16_bits(bundle: Path, tmp_path: Path) -> None:
    layer = Image.open(io.BytesIO(png(mode="RGBA")))
    layer.putalpha(Image.fromarray(np.tile(np.array([[0, 255]], np.uint8).repeat(6, 1), (9, 1))))
    layer.save(tmp_path / "a.png")
    Image.fromarray(np.linspace(0, 65535, 108).astype(np.uint16).reshape(9, 12)).save(tmp_path / "deep.png")
    for name in ("a", "deep"):
        assert run(tmp_path / f"{name}.png", tmp_path / f"{name}-x4.png", "--model", bundle)[0] == 0
    with Image.open(tmp_path / "a-x4.png") as large:
        alpha = np.asarray(large)[..., 3]
        assert (alpha[:, :12] == 0).all()
        assert (alpha[:, -12:] == 255).all()
    with Image.open(tmp_path / "deep-x4.png") as large:
        assert large.mode == "I;16"
        assert len(np.unique(np.asarray(large))) > 300, "more levels than 8 bits have"
