"""A crew of Ray actors: everything is done once, lost workers are replaced, errors name the piece, and nothing stays reserved."""

import time
from contextlib import closing
from pathlib import Path

import pytest

from linearsr_platform.cluster.capacity import Share
from linearsr_platform.cluster.crew import LOSSES, RayCrew
from linearsr_platform.cluster.shipping import ship_folder
from linearsr_platform.data.crew import SerialCrew
from linearsr_platform.errors import StageError, UserError

pytestmark = [pytest.mark.ray, pytest.mark.distributed]
SHARE = Share(cpus=1)


def test_each_worker_makes_its_function_once_and_all_pieces_are_done(cluster, tmp_path: Path) -> None:
    from crew_pieces import MakeSquare, Number
    from toy_training import free_cpus

    pieces = [Number(value) for value in range(12)]
    found = dict(RayCrew(SHARE).map_unordered(MakeSquare(str(tmp_path), waits_for=2), pieces))
    (tmp_path / "serial").mkdir()
    alone = dict(SerialCrew().map_unordered(MakeSquare(str(tmp_path / "serial")), pieces))
    assert {place: result[0] for place, result in found.items()} == {place: result[0] for place, result in alone.items()}
    made = {int(path.name.removeprefix("made-")) for path in tmp_path.glob("made-*")}
    assert {result[1] for result in found.values()} <= made
    assert len(made) == 2
    assert {result[2] for result in found.values()} == {1}
    assert free_cpus() == 2
    assert list(RayCrew(SHARE).map_unordered(MakeSquare(str(tmp_path), refuses=True), [])) == []


def test_a_piece_whose_worker_is_killed_is_done_by_another_one(cluster, tmp_path: Path) -> None:
    from crew_pieces import MakeSquare, Number
    from toy_training import free_cpus

    make = MakeSquare(str(tmp_path), dies_at=3)
    found = dict(RayCrew(SHARE).map_unordered(make, [Number(value) for value in range(6)]))
    assert (tmp_path / "died").exists()
    assert {place: result[0] for place, result in found.items()} == {value: value**2 for value in range(6)}
    assert free_cpus() == 2


def test_what_goes_wrong_says_with_which_piece(cluster, tmp_path: Path) -> None:
    from crew_pieces import MakeSquare, Number
    from toy_training import free_cpus

    pieces = [Number(value) for value in range(4)]

    def run(name: str, **faults) -> None:
        (tmp_path / name).mkdir()
        list(RayCrew(SHARE, most=1).map_unordered(MakeSquare(str(tmp_path / name), **faults), pieces))

    with pytest.raises(StageError, match=r"^number 2: ZeroDivisionError: by nought"):
        run("fails", fails_at=2)
    with pytest.raises(UserError, match="model: got none"):
        run("refuses", refuses=True)
    with pytest.raises(StageError, match=rf"^number 1: its worker was lost {LOSSES} times: .*out of memory most likely"):
        run("dies", dies_at=1, always=True)
    assert free_cpus() == 2


def test_who_stops_early_leaves_nothing_reserved(cluster, tmp_path: Path) -> None:
    from crew_pieces import MakeSquare, Number
    from toy_training import free_cpus

    with closing(RayCrew(SHARE).map_unordered(MakeSquare(str(tmp_path)), [Number(value) for value in range(9)])) as results:
        next(results)
    assert free_cpus() == 2


def test_a_folder_travels_to_workers_and_is_gone_with_them(cluster, tmp_path: Path) -> None:
    from crew_pieces import MakeReader, Number

    (tmp_path / "below").mkdir()
    (tmp_path / "below" / "file").write_bytes(b"weights")
    ((_, (folder, content)),) = RayCrew(SHARE).map_unordered(MakeReader(ship_folder(tmp_path)), [Number(0)])
    assert content == b"weights"
    assert folder != str(tmp_path)
    end = time.monotonic() + 20
    while Path(folder).exists() and time.monotonic() < end:
        time.sleep(0.1)
    assert not Path(folder).exists()
