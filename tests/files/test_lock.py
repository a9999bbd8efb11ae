"""A lock file has one owner: who may take it over, when, and what the one who lost it learns."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from equilibrium_mcore.files.lock import FileLock
from equilibrium_mcore.files.lock_file import (
    SILENT_SECONDS,
    LockHeldError,
    LockLostError,
    look,
    refuse_if_held,
)
from equilibrium_mcore.files.owner import Owner, is_alive, process_start

ENVIRONMENT = {"SLURM_JOB_ID": "77"}


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "run.lock"


@pytest.fixture(autouse=True)
def no_job(monkeypatch):
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)


def elsewhere(environment: dict[str, str] | None = None) -> Owner:
    """A process of another host, which cannot be asked."""
    return replace(Owner.of_this_process("other", environment or {}), host="far", machine="away")


def left_by(path: Path, owner: Owner, *, silent_seconds: float = 0.0) -> Path:
    """A lock file as `owner` left it, with its last heartbeat so long ago."""
    path.write_text(owner.to_text())
    then = time.time() - silent_seconds
    os.utime(path, (then, then))
    return path


def test_it_is_held_renewed_and_released(path):
    lock = FileLock(path, "mine", heartbeat_seconds=0.02)
    assert lock.acquire() is None
    said = json.loads(path.read_text())
    assert (said["pid"], said["name"]) == (os.getpid(), "mine")
    os.utime(path, (0, 0))
    deadline = time.monotonic() + 20
    while path.stat().st_mtime < 1e9:
        assert time.monotonic() < deadline, "no heartbeat"
        time.sleep(0.01)
    with pytest.raises(LockHeldError) as caught:
        FileLock(path, "second").acquire()
    assert caught.value.owner == Owner.from_text(path.read_text()) and caught.value.age_seconds < 20
    lock.release()
    assert os.listdir(path.parent) in ([], [".run.lock.guard"])
    third = FileLock(path, "third")
    assert third.acquire() is None
    third.release()


def test_the_way_of_a_dead_process_is_free_at_once(path):
    done = subprocess.run(
        [sys.executable, "-c", "from equilibrium_mcore.files.lock import FileLock; import os, sys;"
         "from pathlib import Path; FileLock(Path(sys.argv[1]), 'first').acquire();"
         "os.kill(os.getpid(), 9)", str(path)],
        timeout=120,
    )  # fmt: skip
    assert done.returncode == -9 and path.is_file()
    lock = FileLock(path, "second")
    assert lock.acquire().name == "first"
    lock.confirm()
    lock.release()


def test_a_killed_process_that_nobody_has_waited_for_is_dead(path):
    """Such a zombie still has its pid."""
    child = subprocess.Popen([sys.executable, "-c", ""])
    start = process_start(child.pid)
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    assert not is_alive(child.pid, start)
    child.wait()


def test_a_pid_that_was_given_again_is_another_process(path):
    me = Owner.of_this_process("first")
    left_by(path, me)
    with pytest.raises(LockHeldError):  # this very process is there
        FileLock(path, "second").acquire()
    left_by(path, replace(me, process_start=me.process_start - 1))
    lock = FileLock(path, "second")
    assert lock.acquire().name == "first"
    lock.release()


def test_a_pid_of_another_machine_or_container_says_nothing(path):
    nobody = replace(Owner.of_this_process("first"), pid=2**22 + 1)
    assert nobody.is_dead()
    for change in ({"machine": "another boot"}, {"host": "far"}):
        left_by(path, replace(nobody, **change))
        with pytest.raises(LockHeldError):
            FileLock(path, "second").acquire()


@pytest.mark.parametrize("silent", [SILENT_SECONDS - 30, SILENT_SECONDS + 30])
def test_a_foreign_host_counts_as_gone_after_five_silent_minutes(path, silent):
    left_by(path, elsewhere(), silent_seconds=silent)
    lock = FileLock(path, "second")
    if silent < SILENT_SECONDS:
        with pytest.raises(LockHeldError) as caught:
            lock.acquire()
        assert caught.value.age_seconds == pytest.approx(silent, abs=20)
    else:
        assert lock.acquire().host == "far"
        lock.release()


def test_age_is_by_the_clock_of_the_files_not_by_ours(path, monkeypatch):
    """This host's clock is a day ahead, the file server's is not."""
    left_by(path, elsewhere(), silent_seconds=60)
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 86400)
    assert look(path).age_seconds == pytest.approx(60, abs=20)


def test_a_live_process_of_this_host_keeps_it_however_silent(path):
    left_by(path, Owner.of_this_process("stopped"), silent_seconds=10 * SILENT_SECONDS)
    with pytest.raises(LockHeldError):
        FileLock(path, "second").acquire()


def test_a_requeued_slurm_job_takes_its_lock_at_once(path, monkeypatch):
    left_by(path, elsewhere(ENVIRONMENT))
    with pytest.raises(LockHeldError):
        FileLock(path, "no job").acquire()
    monkeypatch.setenv("SLURM_JOB_ID", "78")
    with pytest.raises(LockHeldError):
        FileLock(path, "another job").acquire()
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    lock = FileLock(path, "again")
    assert lock.acquire().slurm_job == "77"
    lock.release()


def test_two_steps_of_one_start_of_a_job_are_two_runs():
    first = elsewhere({**ENVIRONMENT, "SLURM_STEP_ID": "0"})
    second = elsewhere({**ENVIRONMENT, "SLURM_STEP_ID": "1"})
    again = elsewhere({**ENVIRONMENT, "SLURM_STEP_ID": "0", "SLURM_RESTART_COUNT": "1"})
    assert not first.was_requeued_as(second)
    assert first.was_requeued_as(again) and second.was_requeued_as(again)
    assert not elsewhere().was_requeued_as(elsewhere())


def test_a_file_that_is_cut_short_is_judged_by_its_age(path):
    path.write_text('{"host": "fa')
    with pytest.raises(LockHeldError) as caught:
        FileLock(path, "second").acquire()
    assert caught.value.owner is None
    os.utime(path, (1e9, 1e9))
    lock = FileLock(path, "second")
    lock.acquire()
    lock.release()


def test_the_one_who_lost_it_stops_and_leaves_the_new_owners_alone(path):
    lock = FileLock(path, "first")
    lock.acquire()
    lock.confirm()
    left_by(path, elsewhere())
    with pytest.raises(LockLostError) as caught:
        lock.confirm()
    assert caught.value.owner.host == "far"
    lock.release()
    assert Owner.from_text(path.read_text()).host == "far"


def test_a_heartbeat_notices_it_too(path):
    lock = FileLock(path, "first", heartbeat_seconds=0.02)
    lock.acquire()
    left_by(path, elsewhere())
    deadline = time.monotonic() + 20
    while lock.lost is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    lock.release()


def test_a_lock_that_somebody_removed_is_made_again(tmp_path):
    path = tmp_path / "folder" / "run.lock"
    path.parent.mkdir()
    lock = FileLock(path, "first")
    lock.acquire()
    path.unlink()
    lock.confirm()
    path.unlink()
    path.parent.rmdir()
    lock.confirm()
    assert Owner.from_text(path.read_text()).name == "first"
    lock.release()
    assert not path.exists()


def test_an_owner_that_woke_up_is_put_back(path):
    """It gave its heartbeat between being judged and being removed."""
    left_by(path, elsewhere(), silent_seconds=SILENT_SECONDS + 30)
    found = look(path)
    os.utime(path)
    assert not FileLock(path, "second")._remove(found)
    assert Owner.from_text(path.read_text()).host == "far"
    with pytest.raises(LockHeldError):
        refuse_if_held(path, look(path), Owner.of_this_process("second"))


ROUNDS, TAKERS = 5, 4


def race(path: Path, barrier, results, number: int) -> None:
    """Try for the lock in every round; the winner holds it until all have tried."""
    for _ in range(ROUNDS):
        lock = FileLock(path, f"taker {number}")
        barrier.wait(timeout=60)
        try:
            lock.acquire()
            time.sleep(0.02)  # those who judged the old lock come now
            lock.confirm()
            results.put(number)
        except (LockHeldError, LockLostError):
            results.put(None)
        barrier.wait(timeout=60)
        lock.release()
        barrier.wait(timeout=60)


def test_of_takers_at_the_same_time_exactly_one_wins(path):
    context = multiprocessing.get_context("spawn")
    barrier, results = context.Barrier(TAKERS + 1), context.Queue()
    takers = [
        context.Process(target=race, args=(path, barrier, results, n), daemon=True)
        for n in range(TAKERS)
    ]
    for taker in takers:
        taker.start()
    for _ in range(ROUNDS):
        left_by(path, elsewhere(), silent_seconds=SILENT_SECONDS + 30)
        barrier.wait(timeout=60)
        outcomes = [results.get(timeout=60) for _ in takers]
        winners = [number for number in outcomes if number is not None]
        assert len(winners) == 1
        assert Owner.from_text(path.read_text()).name == f"taker {winners[0]}"
        assert sorted(os.listdir(path.parent)) == [".run.lock.guard", "run.lock"]
        barrier.wait(timeout=60)
        barrier.wait(timeout=60)
    for taker in takers:
        taker.join(timeout=60)
