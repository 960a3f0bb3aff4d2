"""Temporary folders: gone at the end, and gone at the next occasion where their process was killed."""

import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from linearsr_platform.scratch import remove_abandoned, scratch_folder

KILLED = """
import os, signal
from linearsr_platform.scratch import scratch_folder
with scratch_folder() as folder:
    (folder / "half").write_bytes(bytes(100))
    print(folder, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_removed_and_what_is_in_use_is_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    killed = subprocess.run([sys.executable, "-c", KILLED], env={"TMPDIR": str(tmp_path)}, capture_output=True, text=True, check=False)
    left = Path(killed.stdout.strip())
    assert (left / "half").is_file(), killed.stderr
    with scratch_folder() as mine:
        just_made = Path(tempfile.mkdtemp(prefix="linearsr-scratch-"))
        assert remove_abandoned() == 1
        assert mine.is_dir()
        assert just_made.is_dir()
        assert not left.exists()
        just_made.rmdir()
    assert list(tmp_path.iterdir()) == []
