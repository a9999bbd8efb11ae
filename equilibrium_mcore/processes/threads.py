"""Cores, threads, and whether a process may still be forked."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path


def available_cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_per_rank(ranks: int, environment: Mapping[str, str] = os.environ) -> int:
    """Threads of each of `ranks` local ranks: what OMP_NUM_THREADS says, else an equal share."""
    asked = environment.get("OMP_NUM_THREADS", "").partition(",")[0].strip()
    if asked.isdigit() and int(asked) > 0:
        return int(asked)
    return max(1, available_cores() // ranks)


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Tensor operations of this process on one thread: small ones would only wait for each other.

    On a busy host each such wait takes a turn of the scheduler, and a minute becomes ten.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fork_is_safe() -> bool:
    """Whether a fork of this process loses no thread that libraries would wait for.

    OpenMP keeps the threads of a parallel region for the next one. In a fork they are gone, and the
    next region waits for them for ever. OpenBLAS, whose threads start when numpy is imported, ends
    its own before a fork; so any thread that is left after one would be lost. False where threads
    cannot be counted.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python's, of forks beside threads
        child = os.fork()
    if not child:
        os._exit(0)
    os.waitpid(child, 0)
    tasks = Path("/proc/self/task")
    return tasks.is_dir() and len(list(tasks.iterdir())) == 1
