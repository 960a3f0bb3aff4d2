"""A storage root that other machines of a cluster do not see is refused before anything starts there."""

import os
from pathlib import Path

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.chaos]


def test_a_folder_of_one_machine_is_refused_and_one_of_all_is_not(tmp_path: Path) -> None:
    from nodes import several_nodes

    from linearsr_platform.cluster.sight import require_shared_folder
    from linearsr_platform.errors import UserError

    # A path that leads there in this process alone, as a folder of one machine does.
    handle = os.open(tmp_path, os.O_RDONLY)
    try:
        with several_nodes(1):
            require_shared_folder(str(tmp_path))
            require_shared_folder("s3://bucket/that-nobody-asks-for")
            with pytest.raises(UserError, match=r"storage: got '/proc/self/fd/\d+/runs', a folder that \S+ \([0-9.]+\) of the cluster"):
                require_shared_folder(f"/proc/self/fd/{handle}/runs")
    finally:
        os.close(handle)

    assert list(tmp_path.rglob("seen-test-*")) == []
