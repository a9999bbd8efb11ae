"""Where a step's time goes on a device, and what single kernels take: `gpu.py --part details`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from equilibrium_mcore.config.load import load_model
from equilibrium_mcore.config.pattern import CUT
from equilibrium_mcore.config.schema import ModelConfig, ParallelismConfig, TrainingConfig
from equilibrium_mcore.data.blend import Datasets
from equilibrium_mcore.files.tables import markdown_table
from equilibrium_mcore.files.temporary import temporary_folder
from equilibrium_mcore.models.provider import build_model
from equilibrium_mcore.optim.newton_schulz import orthogonalise
from equilibrium_mcore.parallel import accelerator
from equilibrium_mcore.parallel.process_groups import one_rank
from equilibrium_mcore.training.setup import run_alone
from equilibrium_mcore.training.step import train_step
from tools.bench.measure.gpu import (
    BenchmarkSettings,
    UniformTokens,
    median_seconds,
    release,
    run_config,
)
from tools.bench.measure.gpu_cases import FUSED, Case, last_blocks

Values = dict[str, Any]
PROFILED = Case("profile", thirds=1, micro_batch=1, training={"fused": FUSED})
LARGEST = 10  # kernels that are named
MATRICES = 16  # in a stack of Newton-Schulz


def measure_details(
    plan: BenchmarkSettings, *, done: Callable[[dict[str, Values]], None]
) -> dict[str, Values]:
    """Values by what was measured, with `not run` and the reason where it failed.

    `done` is called with what is known after each.
    """
    model = load_model(plan.model)
    measurements: dict[str, Callable[[], Values]] = {
        "profile": lambda: _profile(model, plan),
        "SSD, chunk 128": lambda: _mamba_layer(model, plan, chunk_size=128),
        "SSD, chunk 256": lambda: _mamba_layer(model, plan, chunk_size=256),
        "Newton-Schulz": lambda: _newton_schulz(model),
    }
    found: dict[str, Values] = {}
    for name, measurement in measurements.items():
        try:
            found[name] = measurement()
        except Exception as error:  # one failure must not cost the others' figures
            found[name] = {"not run": f"{type(error).__name__}: {error}"}
        release()
        done(found)
    return found


def details_table(found: dict[str, Values]) -> str:
    """The values, one line each."""
    rows = [
        [what, name, str(value)] for what, values in found.items() for name, value in values.items()
    ]
    return markdown_table(("what", "figure", "value"), rows, align="llr")


# -------------------------------------------------------------------------- a step, by its kernels


def _profile(model: ModelConfig, plan: BenchmarkSettings) -> Values:
    """One step of the last third: how long the device was busy, with how many kernels."""
    blocks = model.layer_pattern.count(CUT) + 1
    kept, micro_batch = PROFILED.sizes(blocks, plan.sequences_per_step)[0]
    cut = last_blocks(model, kept)
    config = run_config(cut, plan, PROFILED, micro_batch_size=micro_batch)
    tokens = UniformTokens(
        samples=config.training.steps * config.training.global_batch_size,
        sequence_length=config.training.sequence_length,
        vocab_size=cut.vocab_size,
    )
    on_gpu = accelerator.has_cuda()
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with temporary_folder("equilibrium_bench_") as folder:
        config = config.model_copy(update={"output_directory": folder})
        with run_alone(config, datasets=Datasets(tokens, None, None)) as run:
            for _ in range(plan.warmup_steps):
                train_step(run)
            torch.cuda.synchronize()
            with profile(activities=[activity]) as profiler:
                start = time.perf_counter()
                train_step(run)
                torch.cuda.synchronize()
                seconds = time.perf_counter() - start
    wanted = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    events = [event for event in profiler.events() if event.device_type == wanted]
    spans = [(event.time_range.start, event.time_range.end) for event in events]
    return {
        "blocks": f"{kept} of {blocks}",
        "seconds of the step": round(seconds, 4),
        "share of it in which the device was busy": round(busy(spans) / 1e6 / seconds, 3),
        "kernels" if on_gpu else "operators": len(events),
        **_largest(events),
    }


def busy(spans: Iterable[tuple[float, float]]) -> float:
    """How long at least one of (start, end) lasted; they may overlap."""
    total, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def _largest(events: list[Any]) -> Values:
    """The names that took most time, with their share of all."""
    by_name: Counter[str] = Counter()
    for event in events:
        by_name[event.name] += event.time_range.elapsed_us()
    whole = max(sum(by_name.values()), 1)
    return {name[:80]: f"{spent / whole:.1%}" for name, spent in by_name.most_common(LARGEST)}


# -------------------------------------------------------------------------------- single kernels


def _mamba_layer(model: ModelConfig, plan: BenchmarkSettings, *, chunk_size: int) -> Values:
    """Forward and backward of a model of one Mamba layer, on one sequence in bf16."""
    mamba = model.mamba.model_copy(update={"chunk_size": chunk_size})
    one = model.model_copy(update={"layer_pattern": "M", "mamba": mamba, "vocab_size": 512})
    training = TrainingConfig(
        sequence_length=plan.sequence_length, global_batch_size=1, steps=1, precision="bf16"
    )
    with one_rank(seed=0) as groups:
        module = build_model(
            one, ParallelismConfig(), training, groups, on_gpu=accelerator.has_cuda()
        )
        module = module.to(accelerator.device()).train()
        tokens = torch.zeros(
            1, plan.sequence_length, dtype=torch.int64, device=accelerator.device()
        )

        def work() -> None:
            module(tokens, tokens, None).sum().backward()

        return {"milliseconds": round(1e3 * median_seconds(work, repeats=10), 3)}


def _newton_schulz(model: ModelConfig) -> Values:
    """A stack of expert matrices at once, and one after the other."""
    width = model.moe.expert_ffn_hidden_size if model.moe else model.hidden_size
    stack = torch.randn(MATRICES, width, model.hidden_size, device=accelerator.device())
    settings = {"steps": 5, "coefficients": "quintic", "precision": "medium"}
    one_by_one = [matrix.unsqueeze(0) for matrix in stack]

    def times() -> Iterator[tuple[str, float]]:
        yield "stack", median_seconds(lambda: orthogonalise(stack, **settings), repeats=10)
        loop = median_seconds(
            lambda: [orthogonalise(matrix, **settings) for matrix in one_by_one], repeats=10
        )
        yield "one by one", loop

    shape = "x".join(map(str, stack.shape))
    return {f"{shape}, {name}: ms": round(1e3 * seconds, 3) for name, seconds in times()}
