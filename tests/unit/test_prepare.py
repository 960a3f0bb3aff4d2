"""From photographs to shards: nothing is lost silently, nothing held out leaks, the same input gives the same bytes."""

import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path
from uuid import uuid4

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1] / "support"))

from prepared_photos import config, everything, fill, images, photo, run

from linearsr_platform import storage
from linearsr_platform.data.labels import Label, read_table
from linearsr_platform.data.manifest import load_manifest, verify_shards
from linearsr_platform.data.plan import make_keys
from linearsr_platform.data.sources import Candidate
from linearsr_platform.errors import StageError, UserError
from linearsr_platform.recipe.data_schema import DataConfig


def test_the_same_photographs_give_the_same_bytes(tmp_path: Path) -> None:
    fill(tmp_path / "in", "a.png", "b.jpg", "deep/c.webp", "d.png")
    run(config(tmp_path / "in", samples_per_shard=3), tmp_path / "one")
    run(config(tmp_path / "in", samples_per_shard=3), tmp_path / "two")
    first = everything(tmp_path / "one")
    assert first == everything(tmp_path / "two")
    assert {"manifest.json", "train/00000.tar", "train/00001.tar", "validation/00000.tar"} <= set(first)
    with tarfile.open(tmp_path / "one/train/00000.tar") as tar:
        assert {(member.mtime, member.uid, member.gid, member.uname) for member in tar} == {(0, 0, 0, "")}


def test_a_second_run_leaves_nothing_of_the_first(tmp_path: Path) -> None:
    fill(tmp_path / "in", "a.png", "b.png", "c.png")
    run(config(tmp_path / "in", samples_per_shard=1), tmp_path / "out")
    run(config(tmp_path / "in"), tmp_path / "fresh")
    run(config(tmp_path / "in"), tmp_path / "out")
    assert everything(tmp_path / "out") == everything(tmp_path / "fresh")


def test_the_validation_strip_is_cut_off_and_never_trained_on(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    photo(1, 96, 64).save(tmp_path / "in/wide.png")
    photo(2, 64, 96).save(tmp_path / "in/tall.png")
    photo(3, 40, 40).save(tmp_path / "in/small.png")
    manifest = run(config(tmp_path / "in"), tmp_path / "out")
    train, strips = images(manifest, tmp_path / "out", "train"), images(manifest, tmp_path / "out", "validation")
    assert np.array_equal(np.hstack([train["mine-wide"][0], strips["mine-wide"][0]]), np.asarray(photo(1, 96, 64)))
    assert np.array_equal(np.vstack([train["mine-tall"][0], strips["mine-tall"][0]]), np.asarray(photo(2, 64, 96)))
    assert strips["mine-wide"][0].shape == (64, 24, 3)
    assert strips["mine-wide"][1]["crop_box"] == [72, 0, 96, 64]
    assert train["mine-small"][0].shape == (40, 40, 3)
    assert "mine-small" not in strips


def test_held_out_photographs_reach_no_other_split_even_as_a_copy(tmp_path: Path) -> None:
    fill(tmp_path / "in", "a.png", "b.png", "secret.png")
    photo(2).save(tmp_path / "in/a_copy.bmp")
    manifest = run(config(tmp_path / "in", held_out=("secret",)), tmp_path / "out")
    assert list(images(manifest, tmp_path / "out", "held-out")) == ["mine-secret"]
    for split in ("train", "validation", "high-quality"):
        assert set(images(manifest, tmp_path / "out", split)) <= {"mine-a", "mine-b"}
    assert [(one.file, one.reason) for one in manifest.quarantined] == [("mine/a_copy.bmp", "the same picture as mine/secret.png")]
    with pytest.raises(UserError, match=r"'secert'.*'secret'\?"):
        run(config(tmp_path / "in", held_out=("secert",)), tmp_path / "out")


def test_every_refused_file_is_reported_with_its_reason(tmp_path: Path) -> None:
    folder = fill(tmp_path / "in", "good.png", "copy.png", "label.png")
    photo(0).save(folder / "copy.png")
    (folder / "label.json").write_text('{"tags": "a", "split": "test"}')
    (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:-5000])
    (folder / "text.jpg").write_text("no image")
    photo(9, 96, 23).save(folder / "thin.png")
    photo(9, 47, 47).save(folder / "halved.jpg")
    manifest = run(config(folder, validation_px=0), tmp_path / "out")
    reasons = {one.file.removeprefix("mine/"): one.reason for one in manifest.quarantined}
    assert reasons.pop("good.png") == "the same picture as mine/copy.png"
    assert "truncated" in reasons.pop("cut.png")
    assert "not an image" in reasons.pop("text.jpg")
    assert "96x23" in reasons.pop("thin.png")
    assert "23x23" in reasons.pop("halved.jpg")
    assert "expected one of train, held-out" in reasons.pop("label.png")
    assert not reasons
    assert manifest.counts["found"] == 7
    assert manifest.counts["quarantined"] == 6
    assert manifest.counts["train"] == 1


def test_nothing_is_written_when_nothing_can_be_used(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/x.png").write_text("no image")
    with pytest.raises(UserError, match=r"mine/x.png: not an image"):
        run(config(tmp_path / "in"), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_table_says_what_is_taken_across_its_sources(tmp_path: Path) -> None:
    fill(tmp_path / "one", "a.png", "extra.png")
    (tmp_path / "two").mkdir()
    photo(7).save(tmp_path / "two/b.png")
    rows = ["file,split,quality,tags,licence,source", "a.png,train,high,Cat; red  Fur;cat,CC0,Ann", 'b.png,held-out,,"cup, table",PD,']
    (tmp_path / "t.csv").write_text("\n".join(rows))
    data = config(sources={name: {"url": str(tmp_path / name), "table": "t.csv"} for name in ("one", "two")})
    manifest = run(data, tmp_path / "out", folder=tmp_path)
    assert list(images(manifest, tmp_path / "out", "train")) == ["one-a"]
    _, meta = images(manifest, tmp_path / "out", "high-quality")["one-a"]
    assert (meta["tags"], meta["licence"], meta["source"]) == (["cat", "red fur"], "CC0", "Ann")
    _, meta = images(manifest, tmp_path / "out", "held-out")["two-b"]
    assert (meta["tags"], meta["source"], meta["width_px"], meta["height_px"]) == (["cup", "table"], "two", 96, 64)
    assert manifest.vocabulary == ("cat", "red fur")
    assert manifest.licences == {"CC0": 1, "PD": 1}
    (tmp_path / "t.csv").write_text("\n".join([*rows, "gone.png,,,,,", "lost.png,,,,,"]))
    with pytest.raises(UserError, match=r"gone.png, lost.png.*\(one, two\)"):
        run(data, tmp_path / "out", folder=tmp_path)


def test_all_broken_lines_of_a_table_are_shown(tmp_path: Path) -> None:
    fill(tmp_path / "in", "a.png")
    (tmp_path / "t.csv").write_text("file,split,quality,tags\na.png,test,,\nb.png,,best,\na.png,,,x\na.png,,,x\nc.png,,,x,y\n")
    with pytest.raises(UserError) as caught:
        run(config(sources={"mine": {"url": str(tmp_path / "in"), "table": "t.csv"}}), tmp_path / "out", folder=tmp_path)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[0].rpartition(" ")[2] for line in lines] == ["2", "3", "5", "6"]


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ('file,split\na.png,"train\nb.png,held-out\nc.png,\n', "line 4: got no table .unexpected end of data"),
        ("file,tags\na.png," + "x" * 200_000, "line 2: got no table .field larger than field limit"),
        ('file,tags\na.png,"cup" red\n', "line 2: got no table"),
        ("file,tags,tags\na.png,cup,\n", "got columns file, tags, tags; expected `file` and some of .*, each once"),
    ],
)
def test_a_table_of_which_nobody_can_say_what_it_means_is_refused(tmp_path: Path, table: str, said: str) -> None:
    fill(tmp_path / "in", "a.png", "b.png", "c.png")
    (tmp_path / "t.csv").write_text(table)
    with pytest.raises(UserError, match=said):
        run(config(sources={"mine": {"url": str(tmp_path / "in"), "table": "t.csv"}}), tmp_path / "out", folder=tmp_path)


def test_a_table_of_an_old_mac_is_read(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes(b'\xef\xbb\xbffile,tags\ra.png,cup\rb.png,"sky, sea"\r')
    assert {name: label.tags for name, label in read_table(str(tmp_path / "t.csv")).items()} == {"a.png": ("cup",), "b.png": ("sky", "sea")}


def test_tags_come_from_side_files(tmp_path: Path) -> None:
    folder = fill(tmp_path / "in", "a.png", "b.png", "c.png")
    (folder / "a.txt").write_text("Tree, sky\nriver")
    (folder / "b.json").write_text(json.dumps({"tags": ["lake"], "licence": "CC0", "quality": "high", "id": 3}))
    manifest = run(config(f"{folder}/[ab].png"), tmp_path / "out")
    train = images(manifest, tmp_path / "out", "train")
    assert {key: meta["tags"] for key, (_, meta) in train.items()} == {"mine-a": ["tree", "sky", "river"], "mine-b": ["lake"]}
    assert list(images(manifest, tmp_path / "out", "high-quality")) == ["mine-b"]


@pytest.mark.parametrize("side", [rb'{"tags": ["cup \ud83d"]}', b'{"tags": ' + b"[" * 100_000, b"[]"])
def test_a_side_file_that_nothing_can_be_made_of_costs_its_photograph_and_no_other(tmp_path: Path, side: bytes) -> None:
    (fill(tmp_path / "in", "a.png", "b.png") / "a.json").write_bytes(side)
    manifest = run(config(tmp_path / "in"), tmp_path / "out")
    assert [one.file for one in manifest.quarantined] == ["mine/a.png"]
    assert manifest.quarantined[0].reason.startswith("its label a.json cannot be read: ")


def test_without_marks_the_sharper_half_is_of_high_quality(tmp_path: Path) -> None:
    folder = fill(tmp_path / "in", "a.png", "b.png")
    for name in "cd":
        photo(ord(name), 6, 4).resize((96, 64), Image.Resampling.BICUBIC).save(folder / f"{name}.png")
    manifest = run(config(folder), tmp_path / "out")
    assert set(images(manifest, tmp_path / "out", "high-quality")) == {"mine-a", "mine-b"}


def test_equal_names_get_different_keys(tmp_path: Path) -> None:
    manifest = run(config(fill(tmp_path / "in", "x/y.png", "x-y.png", "x.y.jpg", "z.png", "z.jpg")), tmp_path / "out")
    keys = set(images(manifest, tmp_path / "out", "train"))
    assert len(keys) == 5
    assert not any("." in key or "/" in key for key in keys)


def test_shards_are_even_and_enough_for_every_worker(tmp_path: Path) -> None:
    fill(tmp_path / "in", *(f"{i}.png" for i in range(7)))
    manifest = run(config(tmp_path / "in"), tmp_path / "out", min_shards=3)
    assert [shard.samples for shard in manifest.splits["train"].shards] == [3, 2, 2]
    assert [shard.samples for shard in manifest.splits["high-quality"].shards] == [2, 1, 1]
    with pytest.raises(UserError, match=r"got 7 photographs.*at least 8"):
        run(config(tmp_path / "in"), tmp_path / "out", min_shards=8)


def test_the_first_samples_of_a_shard_are_of_all_sources(tmp_path: Path) -> None:
    for number in range(32):
        source = tmp_path / ("early" if number < 16 else "late")
        source.mkdir(exist_ok=True)
        photo(number).save(source / f"{number:02}.png")
    manifest = run(config(sources={name: {"url": str(tmp_path / name)} for name in ("early", "late")}), tmp_path / "out")
    for split in ("train", "validation"):
        first = list(images(manifest, tmp_path / "out", split))[:16]
        assert 4 <= sum(key.startswith("early") for key in first) <= 12, first


def test_remote_stores_work_like_folders(tmp_path: Path) -> None:
    store = f"memory://{uuid4().hex}"
    fill(tmp_path / "in", "a.png", "b.png", "sub/c.png")
    for path in (tmp_path / "in").rglob("*.png"):
        storage.write_bytes(storage.join(store, "in", str(path.relative_to(tmp_path / "in"))), path.read_bytes())
    storage.write_text(storage.join(store, "in/a.txt"), "sky")
    manifest = run(config(f"{store}/in"), f"{store}/out")
    assert load_manifest(f"{store}/out") == manifest
    verify_shards(manifest, f"{store}/out")
    train = images(manifest, f"{store}/out", "train")
    assert sorted(train) == ["mine-a", "mine-b", "mine-sub-c"]
    assert train["mine-a"][1]["tags"] == ["sky"]
    assert run(config(f"{store}/in/*.png"), f"{store}/out").counts["found"] == 2


def test_metadata_describes_the_picture_that_is_stored(tmp_path: Path) -> None:
    manifest = run(config(fill(tmp_path / "in", "a.png")), tmp_path / "out")
    with tarfile.open(tmp_path / "out/train/00000.tar") as tar:
        png, text = (tar.extractfile(member).read() for member in tar.getmembers())  # type: ignore[union-attr]
    meta = json.loads(text)
    assert meta["sha256"] == hashlib.sha256(png).hexdigest()
    assert (meta["width_px"], meta["height_px"]) == Image.open(io.BytesIO(png)).size
    assert meta["file"] == "mine/a.png"
    assert manifest.digest == load_manifest(str(tmp_path / "out")).digest


def test_a_flipped_byte_or_a_cut_shard_is_refused_by_name(tmp_path: Path) -> None:
    manifest = run(config(fill(tmp_path / "in", "a.png", "b.png")), tmp_path / "out")
    shard = tmp_path / "out/train/00000.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:5000] + bytes([whole[5000] ^ 1]) + whole[5001:])
    with pytest.raises(StageError, match=r"train/00000\.tar: got sha256"):
        verify_shards(manifest, str(tmp_path / "out"))
    verify_shards(manifest, str(tmp_path / "out"), ["validation"])
    # At a member's boundary, where reading itself would see nothing wrong.
    shard.write_bytes(whole[: len(whole) // 2 // 512 * 512])
    with pytest.raises(StageError, match=r"train/00000\.tar: got \d+ bytes"):
        verify_shards(manifest, str(tmp_path / "out"))
    shard.unlink()
    with pytest.raises(StageError, match=r"train/00000\.tar: got no such file"):
        verify_shards(manifest, str(tmp_path / "out"))


def test_a_missing_or_foreign_manifest_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="run the stage `prepare`"):
        load_manifest(str(tmp_path))
    (tmp_path / "manifest.json").write_text('{"version": 99}')
    with pytest.raises(UserError, match="got version 99; expected 1"):
        load_manifest(str(tmp_path))
    (tmp_path / "manifest.json").write_text('{"version": 1}')
    with pytest.raises(UserError, match="recipe_hash"):
        load_manifest(str(tmp_path))


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("package://no_such_photos/data", "pip install no-such-photos"),
        ("package://PIL/no/such", "does not exist"),
        ("/no/such/folder", "no file at /no/such/folder"),
        ("no-such-scheme://x", "no-such-scheme"),
    ],
)
def test_a_source_that_is_not_there_is_the_users_mistake(url: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        run(config(url), tmp_path / "out")


def test_photographs_too_small_for_a_validation_strip_are_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data.validation_px: got 64, but .* 96 px"):
        run(config(fill(tmp_path / "in", "a.png"), validation_px=64), tmp_path / "out")


def test_the_quickstart_table_fits_the_installed_packages(tmp_path: Path, root: Path) -> None:
    sources = {"skimage": "package://skimage/data", "sklearn": "package://sklearn/datasets/images"}
    data = DataConfig.model_validate({"sources": {name: {"url": url, "table": "photos.csv"} for name, url in sources.items()}})
    manifest = run(data, tmp_path, folder=root / "pipelines/quickstart")
    assert set(images(manifest, tmp_path, "held-out")) == {"skimage-coffee", "skimage-rocket", "sklearn-flower"}
    assert manifest.counts["train"] == manifest.counts["validation"] == 7
    assert not manifest.quarantined
    held_out_tags = {tag for _, meta in images(manifest, tmp_path, "held-out").values() for tag in meta["tags"]}
    assert {"sky", "rocket", "wood", "plant"} <= held_out_tags & set(manifest.vocabulary)


def test_keys_fit_a_tar_s_header_with_every_suffix_and_differ() -> None:
    names = [f"{'folder/' * 20}{number}.jpg" for number in range(3)] + ["猫.jpg", "犬.jpg", "short.jpg"]
    keys = make_keys([Candidate("mine", name, name, Label()) for name in names])
    assert len(set(keys)) == len(names)
    assert keys[-1] == "mine-short"
    assert max(map(len, keys)) + len(".text_lr.npy") <= 100


def test_two_held_out_photographs_of_one_name_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    fill(tmp_path / "in", "a/cat.png", "b/cat.png", "dog.png")
    with pytest.raises(UserError, match=r"data\.held_out: got .*a/cat\.png and .*b/cat\.png, both named 'cat'"):
        run(config(tmp_path / "in", held_out=("cat",)), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.tar"))
