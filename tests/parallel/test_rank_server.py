"""Ranks that a helper forks: results, failures, hangs, threads, and whoever is killed."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.parallel.rank_job import RankError, RankInfo, TimeLimit
from equilibrium_mcore.parallel.rank_server import RankServer
from equilibrium_mcore.processes.threads import threads_per_rank
from tests.support.processes import await_text, still_there

ROOT = Path(__file__).parents[2]


def _meet(rank_info: RankInfo) -> None:
    torch.distributed.init_process_group(
        "gloo",
        init_method=rank_info.init_method,
        rank=rank_info.rank,
        world_size=rank_info.world_size,
    )
    torch.distributed.barrier()


def _numbers(rank_info: RankInfo, factor: torch.Tensor) -> tuple[torch.Tensor, int]:
    _meet(rank_info)
    return rank_info.rank * factor, torch.get_num_threads()


def test_results_come_back_by_rank(ranks):
    results = ranks.run(3, _numbers, torch.arange(3))
    assert [value.tolist() for value, _ in results] == [[0, 0, 0], [0, 1, 2], [0, 2, 4]]
    assert {threads for _, threads in results} == {threads_per_rank(3)}


def _one_fails(rank_info: RankInfo, how: str) -> None:
    _meet(rank_info)
    if rank_info.rank == 1:
        if how == "SIGKILL":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "disk":
            raise OSError(errno.ENOSPC, "No space left on device", "/planted/file")
        raise ConfigError("planted=1 cannot be") if how == "config" else ValueError("planted")
    torch.distributed.barrier()  # waits for a rank that never comes


@pytest.mark.parametrize(
    ("how", "told"),
    [
        ("error", "rank 1 failed first:\nTraceback (most recent call last)"),
        ("SIGKILL", "rank 1 failed first:\nit ended by signal SIGKILL without a traceback"),
    ],
)
def test_a_rank_that_fails_is_told_first_and_ends_the_others(ranks, how, told):
    with pytest.raises(RankError) as caught:
        ranks.run(3, _one_fails, how)
    assert told in str(caught.value)
    assert "the other ranks were stopped" in str(caught.value)


def test_a_setting_that_a_rank_refuses_is_told_alone(ranks):
    """As a process without ranks would, with the status of a wrong setting."""
    with pytest.raises(RankError) as caught:
        ranks.run(3, _one_fails, "config")
    assert caught.value.refused and str(caught.value) == "1 problem:\n  1. planted=1 cannot be"


def test_what_the_operating_system_refuses_a_rank_is_told_alone(ranks):
    with pytest.raises(RankError) as caught:
        ranks.run(2, _one_fails, "disk")
    assert caught.value.told and not caught.value.refused
    assert str(caught.value).startswith("/planted/file: no room is left on its file system")
    assert "Traceback" not in str(caught.value)


def test_a_kill_before_the_helper_starts_leaves_no_folder(tmp_path):
    """As by a stop signal at a run's start: nobody would be there to remove it."""
    code = (
        "import multiprocessing.process as p, os, signal\n"
        "from equilibrium_mcore.parallel.rank_server import RankServer\n"
        "p.BaseProcess.start = lambda self: os.kill(os.getpid(), signal.SIGKILL)\n"
        "RankServer()\n"
    )
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment)
    assert done.returncode == -signal.SIGKILL and not list(tmp_path.iterdir())


def test_a_temporary_folder_that_cannot_be_made_is_named(tmp_path):
    file = tmp_path / "file"
    file.touch()
    server = RankServer(prefix=f"{file}/ranks_")
    with pytest.raises(OSError) as caught:
        server.run(1, _numbers, torch.arange(1))
    assert str(file) in str(caught.value.filename) and not server.running


def test_work_without_a_name_is_refused(ranks):
    with pytest.raises(TypeError, match="pass a function of a module"):
        ranks.run(1, lambda place: None)


# ------------------------------------------------------------------------------------------ hangs


def _hang(rank_info: RankInfo) -> None:
    _hang_within_c() if rank_info.rank == 0 else _hang_in_the_rendezvous(rank_info)


def _hang_within_c() -> None:
    while True:
        ctypes.PyDLL(None).sleep(3600)  # keeps the interpreter's lock: no Python can run


def _hang_in_the_rendezvous(rank_info: RankInfo) -> None:
    torch.distributed.init_process_group(
        "gloo",
        init_method=rank_info.init_method,
        rank=rank_info.rank,
        world_size=rank_info.world_size,
    )


def test_a_hang_ends_with_the_stack_of_every_rank(ranks):
    ranks.run(1, _numbers, torch.ones(1))  # the helper is there
    for minutes in (0.05, 0.5, 5):  # a busy machine is longer on the way to the place of the hang
        limit = TimeLimit(minutes=minutes, phase="a planted hang of 2 ranks", raised_by="--more")
        with pytest.raises(RankError) as caught:
            ranks.server.run(2, _hang, limit=limit)
        said = str(caught.value)
        if "_hang_within_c" in said and "_hang_in_the_rendezvous" in said:
            break
    assert f"a planted hang of 2 ranks: they did not end within {minutes:g} minutes" in said
    assert "--more allows more" in said
    first, second = said.split("rank 1 (pid ")
    assert "rank 0 (pid " in first and "in _hang_within_c" in first
    assert "in _hang_in_the_rendezvous" in second


# ---------------------------------------------------------------------------------------- threads

THREADS = """
import torch
from equilibrium_mcore.parallel.rank_job import TimeLimit
from equilibrium_mcore.parallel.rank_server import RankServer

def parallel_region(place):
    torch.set_num_threads(2)
    return torch.ones(1_000_000).exp().sum().item()

if __name__ == "__main__":
    limit = TimeLimit(minutes=5, phase="parallel regions of 2 ranks", raised_by="the test")
    early = RankServer()
    torch.set_num_threads(4)
    torch.ones(4_000_000).exp().sum()  # from here on this process cannot be forked
    late = RankServer()
    for server in (early, late, early):
        sums = server.run(2, parallel_region, limit=limit)
        assert sums[0] == sums[1] > 0
    print("done")
"""


def test_ranks_have_their_threads_though_the_tool_has_run_parallel_regions(tmp_path):
    script = tmp_path / "tool.py"
    script.write_text(THREADS)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script)]
    job = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
    assert job.returncode == 0 and job.stdout == "done\n", job.stderr


# ------------------------------------------------------------------------------ who ends with whom


def _note_and_sleep(rank_info: RankInfo, folder: Path, kill_the_helper: bool) -> None:
    (folder / str(rank_info.rank)).write_text(f"{os.getpid()} ")
    if kill_the_helper and rank_info.rank == 0:
        await_text(folder / "1", lambda text: text.endswith(" "))
        os.kill(os.getppid(), signal.SIGKILL)
    time.sleep(3600)


def test_ranks_end_with_the_helper_and_the_next_job_has_another(ranks, tmp_path):
    server = ranks.server
    with pytest.raises(RankError, match="was ended from outside"):
        server.run(2, _note_and_sleep, tmp_path, True)
    assert not still_there(int((tmp_path / str(rank)).read_text()) for rank in range(2))
    assert not server.folder.exists()
    assert ranks.run(1, _numbers, torch.ones(1))[0][0] == 0


def test_ctrl_c_ends_ranks_helper_and_folder(tmp_path):
    def press(*_: object) -> None:
        notes = [tmp_path / str(rank) for rank in range(2)]
        if all(note.exists() and note.read_text() for note in notes):
            signal.setitimer(signal.ITIMER_REAL, 0)
            raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, press)
    signal.setitimer(signal.ITIMER_REAL, 0.1, 0.1)
    server = RankServer()
    try:
        with pytest.raises(KeyboardInterrupt):
            server.run(2, _note_and_sleep, tmp_path, False)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    pids = [int((tmp_path / str(rank)).read_text()) for rank in range(2)]
    assert not still_there(pids)
    assert not server.folder.exists() and not server.running
