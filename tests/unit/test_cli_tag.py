"""`linearsr tag`: side files that `prepare` reads, a person's words kept, one clear sentence for each mistake."""

import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from linearsr_platform.cli.app import app
from linearsr_platform.data.labels import Label, read_side_file

spec = find_spec("skimage")
assert spec is not None
assert spec.submodule_search_locations
PHOTOS = Path(spec.submodule_search_locations[0], "data")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "photos/deeper").mkdir(parents=True)
    shutil.copy(PHOTOS / "coffee.png", tmp_path / "photos/cup.png")
    shutil.copy(PHOTOS / "chelsea.png", tmp_path / "photos/deeper/cat.png")
    return tmp_path / "photos"


def run(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, ["tag", *map(str, arguments)])
    return result.exit_code, " ".join(result.output.split())


def test_photographs_are_tagged_once_and_again_only_when_told(folder: Path) -> None:
    code, output = run(folder)
    assert code == 0, output
    assert "espresso 0.9" in output
    assert "2 of 2 photographs" in output
    assert read_side_file(str(folder / "cup.json")).tags == ("espresso",)
    assert "tabby" in read_side_file(str(folder / "deeper/cat.json")).tags
    fields = json.loads((folder / "cup.json").read_text())
    assert fields["tagged"]["tags"]["by"] == "imagenet"
    before = (folder / "cup.json").read_bytes()
    code, output = run(folder, "--threshold", 0, "--top-k", 2)
    assert "0 of 2 photographs" in output
    assert (folder / "cup.json").read_bytes() == before
    run(folder, "--threshold", 0, "--top-k", 2, "--overwrite")
    assert len(read_side_file(str(folder / "cup.json")).tags) == 2


def test_what_a_person_wrote_stays(folder: Path) -> None:
    (folder / "cup.json").write_text(json.dumps({"licence": "CC0", "quality": "high"}))
    (folder / "deeper/cat.txt").write_text("my cat, sofa")
    code, output = run(folder)
    assert code == 0, output
    assert read_side_file(str(folder / "cup.json")) == Label(tags=("espresso",), licence="CC0", high_quality=True)
    assert not (folder / "deeper/cat.json").exists()
    code, output = run(folder, "--lr")
    assert code == 0, output
    label = read_side_file(str(folder / "deeper/cat.json"))
    assert label.tags == ("my cat", "sofa")
    assert label.tags_lr
    assert (folder / "deeper/cat.txt").read_text() == "my cat, sofa"


def test_tags_of_the_degraded_photograph_follow_the_recipe(folder: Path, root: Path) -> None:
    code, output = run(folder, "--lr", "--recipe", root / "pipelines/quickstart.yaml", "--threshold", 0, "--top-k", 3)
    assert code == 0, output
    first = json.loads((folder / "cup.json").read_text())
    assert (len(first["tags_lr"]), "tags" in first) == (3, False)
    run(folder, "--lr", "--recipe", root / "pipelines/quickstart.yaml", "--threshold", 0, "--top-k", 3, "--overwrite")
    assert json.loads((folder / "cup.json").read_text()) == first


def test_a_picture_that_cannot_be_read_is_told_at_the_end(folder: Path) -> None:
    (folder / "broken.png").write_bytes((folder / "cup.png").read_bytes()[:500])
    (folder / "gone[x].png").symlink_to("nowhere")
    (folder / "folder.png").mkdir()
    code, output = run(folder)
    assert code == 1
    assert "2 of 4 photographs cannot be read: broken.png, gone[x].png" in output
    assert output.count("gone[x].png") == 2, "in the table too"
    assert "2 of 4 photographs error:" in output, "what failed is not written"
    assert (folder / "cup.json").is_file()
    assert not (folder / "broken.json").exists()


def test_photographs_behind_links_to_folders_are_tagged_as_prepare_takes_them(folder: Path) -> None:
    (folder.parent / "elsewhere").mkdir()
    (folder / "cup.png").rename(folder.parent / "elsewhere/cup.png")
    (folder / "linked").symlink_to(folder.parent / "elsewhere")
    code, output = run(folder)
    assert code == 0, output
    assert (folder / "linked/cup.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nowhere",), "no such folder"),
        (("empty",), "got a folder without images"),
        (("good", "--tagger", "best"), "expected one of side-file, imagenet, clip, ram, dape"),
        (("good", "--tagger", "clip"), "--vocabulary FILE"),
        (("good", "--tagger", "clip", "--vocabulary", "absent.txt"), "one word or phrase a line"),
        (("good", "--tagger", "dape"), "ram_tag_list_threshold.txt, DAPE.pth"),
        (("good", "--recipe", "r.yaml"), "got one without --lr"),
        (("labelled",), "the label beside it cannot be read"),
        (("twins",), "a.json: got a.jpg and a.png; expected one photograph"),
    ],
)
def test_mistakes_exit_with_2_and_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], said: str
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("empty", "good", "labelled", "twins"):
        Path(name).mkdir()
    for name in ("good", "labelled", "twins"):
        Image.new("RGB", (16, 16)).save(f"{name}/a.png")
    Image.new("RGB", (16, 16)).save("twins/a.jpg")
    Path("labelled/a.json").write_text("{")
    before = sorted(Path().rglob("*"))
    code, output = run(*arguments)
    assert code == 2, output
    assert said in output
    assert "Traceback" not in output
    assert sorted(Path().rglob("*")) == before
