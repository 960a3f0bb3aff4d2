"""A crew of Ray actors: every piece is done whoever dies, an error says which piece it is about, and nothing is kept afterwards."""

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from crew_pieces import CrewPiece, MakeReader, MakeSquarer, marks
from rich.console import Console
from toy_training import CPUS, free_cpus

from linearsr_platform.cli.progress import PlainDisplay
from linearsr_platform.cluster import shipping
from linearsr_platform.cluster.capacity import Share
from linearsr_platform.cluster.crew import LOSSES, RayCrew
from linearsr_platform.cluster.experts import machines
from linearsr_platform.cluster.preparing import RayExecutor
from linearsr_platform.errors import StageError, UserError
from linearsr_platform.recipe.load import load_recipe
from linearsr_platform.stages import evaluate
from linearsr_platform.stages.context import RecipeContext
from linearsr_platform.stages.measured_set import MakeMeasurer, measure_all
from linearsr_platform.stages.measuring import RESTORED, Measured, Photograph, Request

ONE = Share(cpus=1)
SMOKE = Path(__file__).parents[2] / "pipelines" / "smoke.yaml"


def numbers(count: int) -> list[CrewPiece]:
    return [CrewPiece(f"number {number}", number) for number in range(count)]


def test_every_piece_is_done_once_by_workers_that_are_made_once(cluster: object, tmp_path: Path) -> None:
    results = dict(RayCrew(ONE).map_unordered(MakeSquarer(str(tmp_path)), numbers(20)))
    assert results == {number: number**2 for number in range(20)}
    assert 1 <= marks(tmp_path, "made") <= CPUS
    assert {marks(tmp_path, piece.name) for piece in numbers(20)} == {1}
    assert free_cpus() == CPUS
    assert list(RayCrew(ONE).map_unordered(MakeSquarer(str(tmp_path / "absent")), [])) == []


def test_no_more_work_at_once_than_there_is_memory_for(cluster: object, tmp_path: Path) -> None:
    """Two machines' worth of CPUs and memory for one and a half workers: a second one is never started."""
    (node,) = machines()
    share = Share(cpus=1, memory_bytes=node.memory_bytes / 1.5)
    assert dict(RayCrew(share).map_unordered(MakeSquarer(str(tmp_path)), numbers(6))) == {number: number**2 for number in range(6)}
    assert marks(tmp_path, "made") == 1
    # One that is asked for waits, and the first does all the same.
    assert len(dict(RayCrew(share, most=2).map_unordered(MakeSquarer(str(tmp_path)), numbers(6)))) == 6
    assert marks(tmp_path, "made") == 2
    assert free_cpus() == CPUS


def test_a_gpu_that_torch_does_not_find_is_an_error_and_no_slow_work(cluster: object, tmp_path: Path) -> None:
    share, told = Share(cpus=1, gpus=1), r"workers: got GPU 0 of \S+ reserved, but torch \S+ finds no CUDA there; fix: the driver"
    with pytest.raises(StageError, match=told):
        list(RayCrew(share).map_unordered(MakeSquarer(str(tmp_path)), numbers(1)))
    with pytest.raises(StageError, match=told):
        list(RayExecutor(share).map_unordered(MakeSquarer(str(tmp_path))._square, numbers(1)))
    assert list(tmp_path.iterdir()) == []
    assert free_cpus() == CPUS


def test_the_piece_of_a_killed_worker_is_done_again(cluster: object, tmp_path: Path) -> None:
    pieces = [*numbers(3), CrewPiece("unlucky", 7, "die once"), *numbers(3)]
    results = dict(RayCrew(ONE, most=2).map_unordered(MakeSquarer(str(tmp_path)), pieces))
    assert results == {0: 0, 1: 1, 2: 4, 3: 49, 4: 0, 5: 1, 6: 4}
    assert marks(tmp_path, "unlucky") == 2
    assert free_cpus() == CPUS


def test_a_piece_that_kills_every_worker_is_named(cluster: object, tmp_path: Path) -> None:
    pieces = [CrewPiece("poison", 1, "die"), *numbers(2)]
    with pytest.raises(StageError, match=r"^poison: its worker was lost 3 times: .*fix: fewer workers on a machine"):
        list(RayCrew(ONE, most=2).map_unordered(MakeSquarer(str(tmp_path)), pieces))
    assert marks(tmp_path, "poison") == LOSSES
    with pytest.raises(StageError, match=r"^workers: got 3 lost one after the other before they could begin"):
        list(RayCrew(ONE, most=1).map_unordered(MakeSquarer(str(tmp_path), dies=True), numbers(2)))
    assert free_cpus() == CPUS


def test_an_error_names_its_piece_and_a_mistake_stays_one(cluster: object, tmp_path: Path) -> None:
    make = MakeSquarer(str(tmp_path))
    with pytest.raises(StageError, match=r"^broken: ZeroDivisionError: by zero; fix the cause"):
        list(RayCrew(ONE).map_unordered(make, [*numbers(3), CrewPiece("broken", what="fault")]))
    with pytest.raises(UserError, match=r"^theirs: got it wrong$"):
        list(RayCrew(ONE).map_unordered(make, [CrewPiece("wrong", what="mistake")]))
    assert free_cpus() == CPUS


def test_who_stops_early_or_finds_no_room_leaves_nothing(cluster: object, tmp_path: Path) -> None:
    results = RayCrew(ONE).map_unordered(MakeSquarer(str(tmp_path)), numbers(9))
    next(results)
    results.close()  # type: ignore[attr-defined]
    assert free_cpus() == CPUS
    with pytest.raises(StageError, match=r"^workers: got no room for one of 64 CPUs in 0.5 s; expected room on a cluster of 2 CPUs"):
        list(RayCrew(Share(cpus=64), patience_s=0.5).map_unordered(MakeSquarer(str(tmp_path)), numbers(1)))
    assert free_cpus() == CPUS


def test_a_folder_is_sent_in_chunks_and_gone_with_the_worker(cluster: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shipping, "CHUNK_BYTES", 1000)
    content = {"a.bin": os.urandom(2500), "deeper/b.bin": os.urandom(1000), "empty.bin": b""}
    for name, data in content.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    shipped = shipping.ship_folder(tmp_path)
    assert [len(chunks) for chunks in shipped.files.values()] == [3, 1, 0]
    found = dict(RayCrew(ONE, most=1).map_unordered(MakeReader(shipped), [CrewPiece(name) for name in content]))
    assert [data for _, (_, data) in sorted(found.items())] == list(content.values())
    (folder,) = {folder for folder, _ in found.values()}
    end = time.monotonic() + 10
    while Path(folder).exists() and time.monotonic() < end:
        time.sleep(0.1)
    assert not Path(folder).exists()


def test_measured_numbers_do_not_depend_on_who_measures(cluster: object, tmp_path: Path) -> None:
    dice = np.random.default_rng(0)
    photographs = []
    for name in "abcd":
        original = dice.integers(0, 256, (48, 64, 3), dtype=np.uint8)
        noise = dice.integers(-9, 10, original.shape)
        restored = (original + noise).clip(0, 255).astype(np.uint8)
        photographs.append(Photograph(name=name, original=original, restored=restored))
    request = Request(metrics={"classic": ("psnr_y", "ssim_y")})
    opened: list[str] = []

    def measured(parallel_from: int, folder: str) -> list[Measured]:
        loaded = load_recipe(str(SMOKE), overrides=[f"data.parallel_from={parallel_from}"])
        context: Any = RecipeContext(
            loaded=loaded, storage_url=str(tmp_path), display=PlainDisplay(Console()), open_cluster=lambda: opened.append(folder)
        )
        make = MakeMeasurer(request=request, results_url=str(tmp_path / folder))
        return measure_all(photographs, make, lambda count: evaluate._crew(context, count, (16, 16)), lambda done, total: None)

    alone = measured(5, "alone")
    assert measured(4, "crew") == alone
    assert opened == ["crew"]
    assert [one.values["classic"][RESTORED]["psnr_y"] > 20 for one in alone] == [True] * 4
    kept = [{path.name: path.read_bytes() for path in (tmp_path / folder).iterdir()} for folder in ("alone", "crew")]
    assert kept[0] == kept[1]
    assert len(kept[0]) == 4
