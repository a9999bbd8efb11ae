"""How long work takes, and how much of a time a device was busy."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable

import torch

from equilibrium_mcore.parallel import accelerator


def median_seconds(work: Callable[[], object], *, warmup: int = 5, repeats: int = 20) -> float:
    """Median time of one call: by CUDA events on a GPU, by the clock on a CPU."""
    for _ in range(warmup):
        work()
    if not accelerator.has_cuda():
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            work()
            times.append(time.perf_counter() - start)
        return statistics.median(times)
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(repeats)]
    for start, end in events:
        start.record()
        work()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


def busy(spans: Iterable[tuple[float, float]]) -> float:
    """How long at least one of (start, end) lasted; they may overlap."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total
