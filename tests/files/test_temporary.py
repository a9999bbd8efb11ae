"""Temporary folders: gone at the end, and those of killed processes at the next start."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from equilibrium_mcore.files.temporary import OWNER_FILE, temporary_folder

HOLD = """
import sys, time
from equilibrium_mcore.files.temporary import temporary_folder
with temporary_folder("kept_") as folder:
    print(folder, flush=True)
    time.sleep(600)
"""


@pytest.fixture
def elsewhere(tmp_path, monkeypatch) -> Path:
    """A folder for temporary files, of this process and its children."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr("tempfile.tempdir", None)
    return tmp_path


def test_it_is_gone_at_the_end_also_after_an_error(elsewhere):
    with pytest.raises(ZeroDivisionError), temporary_folder("kept_") as folder:
        (folder / "file").write_text("x")
        raise ZeroDivisionError
    assert folder.parent == elsewhere and list(elsewhere.iterdir()) == []


def test_what_a_killed_process_left_goes_and_nothing_else(elsewhere):
    holders = [
        subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    killed, alive = (Path(holder.stdout.readline().strip()) for holder in holders)
    foreign = elsewhere / "kept_by_somebody"
    foreign.mkdir()
    holders[0].send_signal(signal.SIGKILL)
    holders[0].wait()
    assert (killed / OWNER_FILE).is_file()
    try:
        with temporary_folder("another_"):
            assert killed.is_dir()  # another tool's
        with temporary_folder("kept_"):
            assert not killed.exists() and alive.is_dir() and foreign.is_dir()
    finally:
        for holder in holders:
            holder.kill()
            holder.wait()
            holder.stdout.close()
