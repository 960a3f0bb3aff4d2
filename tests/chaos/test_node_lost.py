"""A machine of a cluster is lost with a worker of every trainer, under ZeRO 1, 2 and 3, and another one comes later."""

import time
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.chaos, pytest.mark.slow]
AWAY_S = 5.0


def test_a_lost_node_costs_at_most_two_checkpoint_intervals(undisturbed: Path, tmp_path: Path) -> None:
    import ray
    from nodes import homes, several_nodes
    from three_stages import INTERVAL, Watch, assert_equal, jobs_of, note, train

    jobs = jobs_of(tmp_path)
    names = [job.name for job in jobs]
    lost_at: list[float] = []

    with several_nodes(2) as nodes:

        def lose_a_node(watch: Watch) -> None:
            nodes.make_room()
            if not lost_at and all(watch.checkpoints.get(name, 0) >= INTERVAL for name in names):
                on_each = homes()
                assert sorted(map(len, on_each.values())) == [3, 3], "each node has a worker of each trainer"
                assert nodes.lose(nodes.workers()[0]) in on_each
                lost_at.append(time.monotonic())
            elif len(lost_at) == 1 and time.monotonic() >= lost_at[0] + AWAY_S:
                nodes.add()
                lost_at.append(time.monotonic())

        nodes.fill(2)
        watch = Watch(lose_a_node)
        train(jobs, nodes.config, tmp_path, watch)
        assert len(lost_at) == 2
        note("a node", watch, names)
        for name in names:
            assert [0 <= steps < 2 * INTERVAL for steps, _ in watch.lost(name)] == [True]
        assert_equal(tmp_path, undisturbed, names)
        end = time.monotonic() + 10
        while ray.available_resources().get("CPU", 0.0) < 2 and time.monotonic() < end:
            time.sleep(0.2)
        assert ray.available_resources()["CPU"] == 2


def test_an_elastic_trainer_goes_on_with_the_workers_that_are_left(tmp_path: Path) -> None:
    import ray
    from nodes import homes, several_nodes
    from three_stages import STEPS, Watch, note
    from toy_training import toy_job

    from linearsr_platform.cluster.board import ProgressBoard
    from linearsr_platform.cluster.experts import fit_all

    settings = {"max_steps": STEPS, "checkpoint_every": 5, "log_every": 1, "accumulation": 1, "workers": 2, "min_workers": 1}
    lost_at: list[int] = []
    ends = {}
    with several_nodes(2) as nodes:

        def lose_a_node(watch: Watch) -> None:
            if not lost_at and watch.checkpoints.get("elastic", 0) >= 10:
                assert len(homes()) == 2
                nodes.lose(nodes.workers()[0])
                lost_at.append(watch.step("elastic"))

        watch, losses, workers = Watch(lose_a_node), {}, {}

        def listen(events) -> None:
            watch(events)
            for event in events:
                if event.kind == "start":
                    workers.setdefault(event.source, []).append(event.values["workers"])
                elif event.kind == "metrics":
                    losses[event.source, event.step] = event.values["loss"]

        board = ProgressBoard.start()
        for name in ("undisturbed", "elastic"):
            job = toy_job(tmp_path, name, task="QuietToyTask", pause_s=0.2 * (name == "elastic"), **settings)
            ends[name] = fit_all([job], nodes.config, storage_url=str(tmp_path / "ray"), board=board, on_poll=listen)[name]
        board.close()
        assert ray.cluster_resources()["CPU"] == 1
    note("a node, of a trainer that may go on with fewer workers", watch, ["elastic"])
    assert workers == {"undisturbed": [2], "elastic": [2, 1]}
    assert [end.steps for end in ends.values()] == [STEPS, STEPS]
    assert lost_at[0] < STEPS
    assert [0 <= steps < 10 for steps, _ in watch.lost("elastic")] == [True]
    # The same batches, summed in another order.
    for step in range(1, STEPS + 1):
        assert losses["elastic", step] == pytest.approx(losses["undisturbed", step], rel=0, abs=1e-5)
