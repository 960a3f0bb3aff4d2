"""A storage root, or weights, that other machines of a cluster do not see are refused before anything starts there."""

import os
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.chaos]
SMOKE = Path(__file__).parents[2] / "pipelines" / "smoke.yaml"


def test_files_of_one_machine_are_refused_and_those_of_all_are_not(tmp_path: Path) -> None:
    from nodes import several_nodes

    from linearsr_platform.cluster.sight import require_shared_files
    from linearsr_platform.errors import UserError
    from linearsr_platform.recipe.load import load_recipe

    def require(**settings: str) -> None:
        require_shared_files(load_recipe(str(SMOKE), None, [f"{key.replace('__', '.')}={value}" for key, value in settings.items()]).recipe)

    weights = tmp_path / "first.safetensors"
    weights.touch()
    handle = os.open(tmp_path, os.O_RDONLY)
    # A path that leads there in this process alone, as to a disk of one machine.
    own = f"/proc/self/fd/{handle}"
    try:
        with several_nodes(1):
            require(storage=str(tmp_path), model__init_weights=str(weights))
            require(storage="s3://bucket/that-nobody-asks-for")
            with pytest.raises(UserError, match=rf"storage: got '{own}/runs', which \S+ \([0-9.]+\) of the cluster cannot see"):
                require(storage=f"{own}/runs")
            with pytest.raises(UserError, match=rf"model.init_weights: got '{own}/first.safetensors', which \S+ \([0-9.]+\) of"):
                require(storage=str(tmp_path), model__init_weights=f"{own}/first.safetensors")
    finally:
        os.close(handle)

    assert list(tmp_path.rglob("seen-test-*")) == []
