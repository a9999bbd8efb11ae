"""Where a step's time goes on a device, and what single kernels take: `gpu.py --part details`."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from equilibrium_mcore.config.load import load_model
from equilibrium_mcore.config.pattern import CUT
from equilibrium_mcore.config.schema import ModelConfig
from equilibrium_mcore.data.blend import Datasets
from equilibrium_mcore.files.tables import markdown_table
from equilibrium_mcore.files.temporary import temporary_folder
from equilibrium_mcore.optim.newton_schulz import orthogonalise
from equilibrium_mcore.parallel import accelerator
from equilibrium_mcore.training.setup import run_alone
from equilibrium_mcore.training.step import train_step
from tools.bench.measure.gpu import (
    BenchmarkSettings,
    UniformTokens,
    release,
    run_config,
)
from tools.bench.measure.gpu_cases import FUSED, Case, last_blocks
from tools.bench.measure.gpu_layers import launch_microseconds, measure_layer
from tools.bench.measure.timing import busy, median_seconds

Values = dict[str, Any]
PROFILED = Case("profile", thirds=1, micro_batch=1, training={"fused": FUSED})
PROFILED_RANK = Case("one expert rank", one_expert_rank=True)
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
        "launch": lambda: {"microseconds": round(launch_microseconds(), 2)},
        **{name: partial(_layer, plan, *row) for name, row in _layers(model).items()},
        "Newton-Schulz": lambda: _newton_schulz(model),
        "profile": lambda: _profile(model, plan),
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


def _layers(model: ModelConfig) -> dict[str, tuple[ModelConfig, str, Values]]:
    """Models, letters and settings of training by name: experts as on one rank of EP 8."""
    rank = PROFILED_RANK.model(model)
    wide = model.model_copy(
        update={"mamba": model.mamba.model_copy(update={"chunk_size": 2 * model.mamba.chunk_size})}
    )
    return {
        f"mamba, chunk {model.mamba.chunk_size}": (model, "M", {}),
        f"mamba, chunk {wide.mamba.chunk_size}": (wide, "M", {}),
        "mla": (model, "+", {}),
        f"moe, {rank.moe.num_experts} experts": (rank, "E", {}),
        f"moe, {rank.moe.num_experts} experts, fused": (rank, "E", PROFILED.run_training()),
        f"moe, {model.moe.num_experts} experts": (model, "E", {}),
    }


def _layer(plan: BenchmarkSettings, model: ModelConfig, letter: str, training: Values) -> Values:
    kept = {name: value for name, value in training.items() if name != "precision"}
    return measure_layer(model, letter, sequence_length=plan.sequence_length, training=kept)


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


def _largest(events: list[Any]) -> Values:
    """The names that took most time, with their share of all."""
    by_name: Counter[str] = Counter()
    for event in events:
        by_name[event.name] += event.time_range.elapsed_us()
    whole = max(sum(by_name.values()), 1)
    return {name[:80]: f"{spent / whole:.1%}" for name, spent in by_name.most_common(LARGEST)}


# -------------------------------------------------------------------------------- single kernels


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
