"""Which of a trainer's weights its MLflow run keeps."""

from pathlib import Path

import pytest

from linearsr_platform.stages.kept_weights import Policy, kept_weights
from linearsr_platform.train.outcome import TrainOutcome


def outcome(folder: Path, metrics: dict[str, object]) -> TrainOutcome:
    """Five validations; the snapshot of the best one is gone."""
    history = [{"step": float(step), "gmsd": value} for step, value in ((10, 0.5), (20, 0.1), (30, 0.2), (40, 0.3), (50, 0.4))]
    for step in (10, 30, 40, 50):
        (folder / f"step_{step:08d}.safetensors").write_bytes(b"")
    return TrainOutcome(
        steps=50,
        stopped_by="knee",
        knee_step=40,
        knee_weights=str(folder / "step_00000040.safetensors"),
        last_weights=str(folder / "step_00000050.safetensors"),
        decision={"metrics": metrics},
        history=history,
        seconds=1.0,
        samples_per_s=1.0,
    )


@pytest.mark.parametrize(
    ("policy", "metrics", "steps"),
    [
        ("none", {"gmsd": {}}, []),
        ("knee", {"gmsd": {}}, [40]),
        ("best", {"gmsd": {}}, [30]),
        ("best", {}, [40]),
        ("all", {"gmsd": {}}, [10, 30, 40, 50]),
    ],
)
def test_a_policy_keeps_its_weights(tmp_path: Path, policy: Policy, metrics: dict[str, object], steps: list[int]) -> None:
    found = kept_weights(outcome(tmp_path, metrics), policy)
    assert found == [str(tmp_path / f"step_{step:08d}.safetensors") for step in steps]
