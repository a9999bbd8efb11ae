"""Processes: they end with their parent, share cores, and are forked only where that is safe."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from equilibrium_mcore.processes.threads import available_cores, threads_per_rank
from tests.support.processes import still_there

ROOT = Path(__file__).parents[2]


def run(script: str, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


PARENT_IS_KILLED = """
import os, signal, sys, time
sys.platform = sys.argv[1]  # the kernel's way, or the one of other systems
from equilibrium_mcore.processes.parents import end_with_parent
ready, done = os.pipe()
parent = os.getpid()
child = os.fork()
if not child:
    end_with_parent(parent)
    os.close(1), os.close(2)
    os.write(done, b".")
    time.sleep(3600)
os.read(ready, 1)
print(child, flush=True)
os.kill(parent, signal.SIGKILL)
"""


@pytest.mark.parametrize("platform", ["linux", "darwin"])
def test_a_child_ends_with_a_killed_parent(platform):
    done = run(PARENT_IS_KILLED, platform)
    assert done.returncode == -9, done.stderr
    assert not still_there([int(done.stdout)])


LATE = """
import os, sys, time
from equilibrium_mcore.processes.parents import end_with_parent
child = os.fork()
if not child:
    end_with_parent(os.getppid() + 1)  # as if the parent had ended, and another had taken its place
    os._exit(7)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_a_child_whose_parent_is_gone_already_ends_at_once():
    assert run(LATE).returncode == 1


FORKS = """
import numpy, torch
from equilibrium_mcore.processes.threads import fork_is_safe
before = fork_is_safe()
torch.set_num_threads(2)
torch.ones(1_000_000).exp().sum()
print(before, fork_is_safe())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are counted on Linux alone")
def test_a_fork_is_safe_until_openmp_keeps_threads():
    done = run(FORKS)
    assert done.stdout.split() == ["True", "False"], done.stderr


def test_ranks_share_the_cores_unless_the_user_says_otherwise():
    cores = available_cores()
    assert threads_per_rank(1, {}) == cores
    assert threads_per_rank(4 * cores, {}) == 1
    assert threads_per_rank(4 * cores, {"OMP_NUM_THREADS": "3"}) == 3
    assert threads_per_rank(1, {"OMP_NUM_THREADS": "5,2"}) == 5
    assert threads_per_rank(1, {"OMP_NUM_THREADS": "many"}) == cores
