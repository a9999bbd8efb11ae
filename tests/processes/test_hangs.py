"""A process that makes no progress writes where it is; one that does writes nothing."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from equilibrium_mcore.processes.hangs import progress, stacks_when_stuck

ROOT = Path(__file__).resolve().parents[2]
STUCK = """
import ctypes, pathlib, sys, threading, time, os
from equilibrium_mcore.processes.hangs import stacks_when_stuck
path = pathlib.Path(sys.argv[1])
def leave():
    while not path.stat().st_size:
        time.sleep(0.01)
    time.sleep(0.2)
    os._exit(7)
with stacks_when_stuck(path, seconds=0.3):
    threading.Thread(target=leave, daemon=True).start()
    def waits_for_the_others():
        library, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(256)
        library.pthread_mutex_lock(mutex)
        library.pthread_mutex_lock(mutex)
    waits_for_the_others()
"""


def test_a_process_that_is_stuck_in_c_says_where(tmp_path):
    path = tmp_path / "stacks" / "rank_00000.txt"
    path.parent.mkdir()
    path.touch()
    done = subprocess.run([sys.executable, "-c", STUCK, path], cwd=ROOT, timeout=300, check=False)
    assert done.returncode == 7
    assert "waits_for_the_others" in path.read_text()


def test_progress_starts_the_clock_again_and_leaves_no_file(tmp_path):
    path = tmp_path / "stacks" / "rank_00000.txt"
    with stacks_when_stuck(path, seconds=600):
        for _ in range(3):
            progress()
            time.sleep(0.01)
        assert path.exists()
    assert not path.parent.exists()
    progress()  # outside of it, nothing is armed


def test_more_is_told_once_for_each_stop(tmp_path):
    path, calls = tmp_path / "stacks" / "rank_00000.txt", []

    def more() -> str:
        calls.append(True)
        return f"call {len(calls)}\n"

    def wait_for(number: int) -> None:
        deadline = time.monotonic() + 300
        while f"call {number}" not in path.read_text() and time.monotonic() < deadline:
            time.sleep(0.01)

    with stacks_when_stuck(path, seconds=0.2, more=more):
        wait_for(1)
        time.sleep(0.5)  # it stays stuck: the stacks come again, and nothing more
        progress()
        wait_for(2)
    assert path.read_text().index("test_more_is_told") < path.read_text().index("call 1")
    assert len(calls) == 2


def test_more_that_fails_ends_nothing(tmp_path):
    path = tmp_path / "stacks" / "rank_00000.txt"

    def more() -> str:
        raise KeyError("process_group")

    with stacks_when_stuck(path, seconds=0.1, more=more):
        deadline = time.monotonic() + 300
        while "KeyError" not in path.read_text() and time.monotonic() < deadline:
            time.sleep(0.01)
    assert "nothing more could be told: KeyError('process_group')" in path.read_text()


def test_what_an_earlier_run_wrote_stays(tmp_path):
    path = tmp_path / "stacks" / "rank_00000.txt"
    path.parent.mkdir()
    path.write_text("where the run hung that is resumed now\n")
    with stacks_when_stuck(path, seconds=600):
        progress()
    assert path.read_text() == "where the run hung that is resumed now\n"
