"""The pool: results in order, a bounded number ahead, deaths as errors, no worker left over."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from equilibrium_mcore.processes.ordered_pool import OrderedPool
from tests.support.pool_work import fail_or_die, later_for_earlier, note_process, wait_for
from tests.support.processes import still_there
from tests.support.tool_faults import wait_for as wait_until

ROOT = Path(__file__).parents[2]


def pool_of_two(folder: Path, ahead: int = 2) -> OrderedPool:
    return OrderedPool(2, ahead_per_worker=ahead, start=note_process, arguments=(folder,))


def test_results_come_in_the_order_of_the_tasks(tmp_path):
    with pool_of_two(tmp_path) as pool:
        found = [
            (task, job.result())
            for task, job in pool.in_order(later_for_earlier, range(9), tmp_path)
        ]
    assert found == [(task, task * task) for task in range(9)]


def test_no_more_tasks_are_taken_than_there_is_room_for(tmp_path):
    taken = []

    def tasks():
        for task in range(20):
            taken.append(task)
            yield task

    with pool_of_two(tmp_path, ahead=3) as pool:
        jobs = pool.in_order(wait_for, tasks(), tmp_path)
        _, first = next(jobs)
        assert taken == list(range(6)) and not first.is_done()
        (tmp_path / "go").touch()
        assert first.result() == 0
        next(jobs)
        assert taken == list(range(7))
        assert [job.result() for _, job in jobs] == list(range(2, 20))


def test_closing_begins_nothing_new_and_waits_for_what_has_begun(tmp_path):
    with pool_of_two(tmp_path, ahead=5) as pool:
        jobs = pool.in_order(wait_for, range(10), tmp_path)
        _, first = next(jobs)
        wait_until((tmp_path / "0.begun").exists)
        (tmp_path / "go").touch()
        jobs.close()
        assert first.result() == 0
    # An executor hands a task or so to its processes ahead of time.
    assert not (tmp_path / "9.begun").exists()


def test_what_the_work_raises_is_raised_for_its_task(tmp_path):
    with pool_of_two(tmp_path) as pool:
        jobs = pool.in_order(fail_or_die, range(4), "raises")
        found = []
        with pytest.raises(ValueError, match="task 2 is bad"):
            for _, job in jobs:
                found.append(job.result())
        assert found == [0, 1]


def test_a_death_is_an_error_that_says_what_to_do(tmp_path):
    with pool_of_two(tmp_path) as pool, pytest.raises(ChildProcessError, match="fewer --workers"):
        for _, job in pool.in_order(fail_or_die, range(4), "dies"):
            job.result()


KILLED = """
import os, signal, sys, time
from pathlib import Path
from equilibrium_mcore.processes.ordered_pool import OrderedPool
from tests.support.pool_work import note_process, wait_for
if __name__ == "__main__":
    folder = Path(sys.argv[1])
    pool = OrderedPool(2, ahead_per_worker=1, start=note_process, arguments=(folder,))
    jobs = pool.in_order(wait_for, range(2), folder)  # kept: closing it waits for what has begun
    next(jobs)
    while len(workers := [p.name for p in folder.iterdir() if p.name.isdecimal()]) < 2:
        time.sleep(0.01)
    print(*workers, flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_end_with_a_killed_parent(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == -9, done.stderr
    workers = [int(word) for word in done.stdout.split()]
    assert len(workers) == 2 and not still_there(workers)
