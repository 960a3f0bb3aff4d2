"""What is refused before a worker starts."""

from pathlib import Path

import pytest

from linearsr_platform.errors import UserError
from linearsr_platform.stages.preflight import check_writable


def test_storage_must_be_writable_and_seen_by_workers(tmp_path: Path) -> None:
    check_writable(str(tmp_path / "runs"))
    assert list(tmp_path.rglob("*test*")) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"storage: got .*file.*expected a place that can be written"):
        check_writable(str(tmp_path / "file"))
    with pytest.raises(UserError, match=r"storage: got 'memory://runs', the memory of this process"):
        check_writable("memory://runs")
