"""What bounds a layer on a device: its kernels or the host that starts them.

A model of one layer in bf16, forward and backward. `operators` are by the host's own time, without
that of operators which they call.
"""

from __future__ import annotations

import cProfile
import io
import pstats
import time
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from equilibrium_mcore.config.pattern import LAYER_KINDS
from equilibrium_mcore.config.schema import ModelConfig, ParallelismConfig, TrainingConfig
from equilibrium_mcore.models.provider import build_model
from equilibrium_mcore.parallel import accelerator
from equilibrium_mcore.parallel.process_groups import one_rank
from tools.bench.measure.timing import busy, median_seconds

Values = dict[str, Any]
NAMED = 14  # operators, kernels and Python functions that are named
LAUNCHES = 2000


def launch_microseconds() -> float:
    """What the host takes to start one small kernel through PyTorch."""
    values = torch.zeros(16, device=accelerator.device())
    for _ in range(100):
        values.add_(1)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(LAUNCHES):
        values.add_(1)
    seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    return 1e6 * seconds / LAUNCHES


def measure_layer(
    model: ModelConfig, letter: str, *, sequence_length: int, training: Values, repeats: int = 10
) -> Values:
    """Milliseconds of forward with backward, kernels, share of busy time, and what takes most."""
    one = model.model_copy(update={"layer_pattern": letter, "vocab_size": 512})
    settings = TrainingConfig(
        sequence_length=sequence_length, global_batch_size=1, steps=1, precision="bf16", **training
    )
    on_gpu = accelerator.has_cuda()
    with one_rank(seed=0) as groups:
        module = build_model(one, ParallelismConfig(), settings, groups, on_gpu=on_gpu)
        module = module.to(accelerator.device()).train()
        tokens = torch.zeros(1, sequence_length, dtype=torch.int64, device=accelerator.device())

        def work() -> None:
            module(tokens, tokens, None).sum().backward()

        seconds = median_seconds(work, repeats=repeats)
        torch.cuda.synchronize()
        start = time.perf_counter()
        work()
        host = time.perf_counter() - start
        torch.cuda.synchronize()
        found = _profiled(work, seconds, on_gpu)
        python = _python(work)
    return {
        "layer": LAYER_KINDS[letter],
        "milliseconds": round(1e3 * seconds, 3),
        "host, milliseconds": round(1e3 * host, 3),
        **found,
        "Python": python,
    }


def _profiled(work: Any, seconds: float, on_gpu: bool) -> Values:
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * on_gpu
    with profile(activities=activities) as profiler:
        work()
        torch.cuda.synchronize()
    events = list(profiler.events())
    cuda = [event for event in events if event.device_type == torch.autograd.DeviceType.CUDA]
    spans = [(event.time_range.start, event.time_range.end) for event in cuda]
    averages = profiler.key_averages()
    by_host = sorted(averages, key=lambda event: -event.self_cpu_time_total)[:NAMED]
    by_device = sorted(averages, key=lambda event: -event.self_device_time_total)[:NAMED]
    return {
        "kernels": len(cuda),
        "busy milliseconds": round(busy(spans) / 1e3, 3),
        "busy share": round(busy(spans) / 1e6 / seconds, 3),
        "operators": {
            event.key[:60]: f"{event.count} x, {event.self_cpu_time_total / 1e3:.2f} ms"
            for event in by_host
        },
        "by device": {
            event.key[:60]: f"{event.count} x, {event.self_device_time_total / 1e3:.2f} ms"
            for event in by_device
            if event.self_device_time_total
        },
    }


def _python(work: Any) -> list[str]:
    """The functions of the main thread that take most time of their own."""
    profiler = cProfile.Profile()
    profiler.runcall(work)
    torch.cuda.synchronize()
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).sort_stats("tottime").print_stats(NAMED)
    lines = [line.strip() for line in text.getvalue().splitlines()]
    return [line[-110:] for line in lines if line[:1].isdigit()]
