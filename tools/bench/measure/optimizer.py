"""What the optimizer costs: its share of a step, how evenly ranks share it, beside a plain loop.

`tools/bench/optimizer.py` prints this. Times are measured on this host in one process; the share of
a large layout, and how evenly it is spread, follow from counting operations.
"""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from megatron.core.optimizer.emerging_optimizers import TensorParallelMuon

from equilibrium_mcore.config.layout import (
    global_batch_tokens,
    pipeline_segments,
    resolve_world_size,
)
from equilibrium_mcore.config.pattern import CUT, cut_into
from equilibrium_mcore.config.schema import ParallelismConfig, RunConfig
from equilibrium_mcore.data.blend import Datasets
from equilibrium_mcore.files.tables import markdown_table
from equilibrium_mcore.files.temporary import temporary_folder
from equilibrium_mcore.models.flops import training_flops_per_token
from equilibrium_mcore.optim import muon as muon_module
from equilibrium_mcore.optim.ownership import newton_schulz_operations, spread
from equilibrium_mcore.optim.param_groups import ParameterRow, parameter_rows
from equilibrium_mcore.optim.parts import part_shapes
from equilibrium_mcore.training.setup import Run, run_alone
from equilibrium_mcore.training.step import train_step
from tools.bench.measure.gpu import UniformTokens


@dataclass(frozen=True)
class Share:
    """Newton-Schulz's part of a training step, by counted operations, and how ranks share it."""

    world_size: int
    operations_per_step: float  # of Newton-Schulz, on all ranks that do not repeat each other
    of_a_step: float  # seconds it would take relative to the step, on the rank with most to do
    of_a_step_undistributed: float  # the same if every data rank did everything
    max_over_mean: float  # of the ranks' operations


@dataclass(frozen=True)
class Times:
    """Measured medians in seconds, on one rank."""

    step: float
    optimizer: float
    newton_schulz: float


@dataclass(frozen=True)
class UpdateComparison:
    """One Muon update of the same matrices, in seconds."""

    matrices: int
    batched: float  # this package, matrices of one shape together, each parameter as one matrix
    batched_parts: float  # this package as it trains: every map by itself
    loop: float  # megatron-core's TensorParallelMuon, one matrix after another


def count_share(config: RunConfig, world_size: int | None = None) -> Share:
    """The share of Newton-Schulz if all operations ran equally fast.

    Tensor-parallel ranks repeat each other's iterations, on whole matrices. Raises ValueError where
    the run has no matrices for Muon.
    """
    world_size = resolve_world_size(config.parallelism, world_size)
    rows = [
        row for row in parameter_rows(config) if row.treatment and row.treatment.optimizer == "muon"
    ]
    if not rows:
        raise ValueError(
            f"optimizer.matrices={config.optimizer.matrices!r}: Muon updates nothing in this run"
        )
    loads = [load for stage in _stages(config, rows) for load in _loads(config, stage, world_size)]
    total = sum(_operations(config, row) for row in rows)
    training = training_flops_per_token(config.model, config.training.sequence_length)
    per_rank = training * global_batch_tokens(config) / world_size
    layout = config.parallelism
    everything = total / layout.pipeline
    return Share(
        world_size=world_size,
        operations_per_step=total,
        of_a_step=max(loads) / (max(loads) + per_rank),
        of_a_step_undistributed=everything / (everything + per_rank),
        max_over_mean=max(loads) * len(loads) / sum(loads),
    )


def _operations(config: RunConfig, row: ParameterRow) -> float:
    shapes = part_shapes(row.shape, row.treatment.parts)
    return newton_schulz_operations(shapes, config.optimizer.muon.newton_schulz_steps)


def _stages(config: RunConfig, rows: list[ParameterRow]) -> list[list[ParameterRow]]:
    """Matrices of each pipeline rank."""
    layout = config.parallelism
    cut = cut_into(config.model.layer_pattern, pipeline_segments(layout))
    stage_of_layer: list[int] = []
    for number, segment in enumerate(cut.split(CUT)):
        stage_of_layer += [number % layout.pipeline] * len(segment)
    stages: list[list[ParameterRow]] = [[] for _ in range(layout.pipeline)]
    for row in rows:
        stages[stage_of_layer[int(row.name.split(".layers.")[1].split(".")[0])]].append(row)
    return stages


def _loads(config: RunConfig, rows: list[ParameterRow], world_size: int) -> list[float]:
    """Newton-Schulz operations of every rank of a pipeline stage, as `assign_owners` spreads them.

    Ranks are numbered as megatron-core does: tensor ranks are neighbours, then context and data;
    for experts, expert-tensor ranks, then expert ranks, then the copies.
    """
    layout = config.parallelism
    ranks = world_size // layout.pipeline
    if not layout.distributed_optimizer:
        return [sum(_operations(config, row) for row in rows)] * ranks
    dense = sorted(_operations(config, r) for r in rows if ".experts." not in r.name)[::-1]
    by_data_rank = [0.0] * (ranks // layout.tensor)
    spread(dense, by_data_rank)
    loads = [by_data_rank[rank // layout.tensor] for rank in range(ranks)]
    width = layout.expert * layout.expert_tensor
    experts = sorted(_operations(config, r) for r in rows if ".experts." in r.name)[::-1]
    mine = experts[:: layout.expert]  # all experts have the same shapes
    for group in range(layout.expert):
        members = [
            [copy * width + group * layout.expert_tensor + t for t in range(layout.expert_tensor)]
            for copy in range(ranks // width)
        ]
        before = [max(loads[rank] for rank in same) for same in members]
        after = list(before)
        spread(mine, after)
        for same, old, new in zip(members, before, after, strict=True):
            for rank in same:
                loads[rank] += new - old
    return loads


# ------------------------------------------------------------------------------------ measured


def measure(config: RunConfig, *, steps: int) -> tuple[Times, UpdateComparison]:
    """Train the run's model on made-up tokens in this process, then race the two Muons."""
    training = config.training.model_copy(
        update={"steps": steps + 1, "epochs": None, "stop_after_steps": None}
    )
    schedule = config.optimizer.schedule.model_copy(
        update={"kind": "constant", "warmup_steps": 0, "decay_steps": 0}
    )
    tokens = UniformTokens(
        samples=training.steps * training.global_batch_size,
        sequence_length=training.sequence_length,
        vocab_size=config.model.vocab_size,
    )
    with temporary_folder("equilibrium_bench_") as folder:
        alone = config.model_copy(
            update={
                "output_directory": folder,
                "parallelism": ParallelismConfig(),
                "training": training,
                "optimizer": config.optimizer.model_copy(update={"schedule": schedule}),
            }
        )
        with run_alone(alone, datasets=Datasets(tokens, None, None)) as run:
            return measure_steps(run, steps=steps), compare_with_loop(run)


def report(config: RunConfig, times: Times, race: UpdateComparison) -> str:
    """Markdown: what was measured on this host, in one process."""
    tokens = global_batch_tokens(config)
    measured = {what: getattr(times, what) for what in ("step", "optimizer", "newton_schulz")}
    rows = [(what, f"{s * 1e3:.1f}", f"{s / times.step:.1%}") for what, s in measured.items()]
    lines = [
        f"## Measured: {config.model.name}, one rank, {tokens:,} tokens a step",
        "",
        markdown_table(("what", "ms", "of the step"), rows, align="lr"),
        "",
        f"One Muon update of its {race.matrices} matrices, relative to megatron-core's loop "
        f"({race.loop * 1e3:.1f} ms): batched {race.batched / race.loop:.2f}, batched and split "
        f"into maps {race.batched_parts / race.loop:.2f}.",
    ]
    return "\n".join(lines)


def report_share(config: RunConfig, share: Share) -> str:
    """Markdown: what follows from counting operations."""
    return "\n".join(
        [
            f"## Counted: {config.name}, {share.world_size} ranks, "
            f"{global_batch_tokens(config):,} tokens a step",
            "",
            f"Newton-Schulz: {share.operations_per_step / 1e12:.1f} TFLOP a step; "
            f"{share.of_a_step:.2%} of the step's operations on the busiest rank, "
            f"{share.of_a_step_undistributed:.2%} if every data rank did all of it. "
            f"Busiest over mean: {share.max_over_mean:.2f}.",
        ]
    )


def measure_steps(run: Run, *, steps: int) -> Times:
    """Medians over `steps` training steps, after one that is not counted. Collective."""
    seconds: dict[str, list[float]] = {"step": [], "optimizer": [], "newton_schulz": []}
    clock = dict.fromkeys(seconds, 0.0)
    with (
        _timed(run.optimizer, "step", clock, "optimizer"),
        _timed(muon_module, "orthogonalise", clock, "newton_schulz"),
    ):
        for number in range(steps + 1):
            clock.update(dict.fromkeys(seconds, 0.0))
            clock["step"] = _seconds(lambda: train_step(run))
            for name, values in seconds.items():
                values += [clock[name]] * (number > 0)
    return Times(**{name: statistics.median(values) for name, values in seconds.items()})


def compare_with_loop(run: Run, *, repeats: int = 5) -> UpdateComparison:
    """One Muon update of this rank's matrices: batched here, and by megatron-core's Muon.

    Both in float32 with the same coefficients and products of the same precision, in turns.
    """
    settings = run.config.optimizer.muon
    matrices = [p for p in run.optimizer.parameters if p.treatment.optimizer == "muon"]
    weights = [torch.nn.Parameter(torch.randn(p.whole_shape)) for p in matrices]
    loop = TensorParallelMuon(
        weights,
        momentum=settings.momentum,
        nesterov=settings.nesterov,
        fp32_matmul_prec=settings.matmul_precision,
        coefficient_type=settings.coefficients,
        num_ns_steps=settings.newton_schulz_steps,
        scale_mode=settings.scale,
        extra_scale_factor=settings.extra_scale,
        pg_collection=run.groups,
        tp_mode="duplicated",
    )
    gradients = [torch.randn_like(weight) for weight in weights]
    whole = _muon_like_ours(run, matrices, weights, split=False)
    parts = _muon_like_ours(run, matrices, weights, split=True)
    times: dict[str, list[float]] = {"loop": [], "batched": [], "batched_parts": []}
    for number in range(repeats + 1):
        for name, optimizer in (("loop", loop), ("batched", whole), ("batched_parts", parts)):
            for weight, gradient in zip(weights, gradients, strict=True):
                weight.grad = gradient
            times[name] += [_seconds(optimizer.step)] * (number > 0)
    medians = {name: statistics.median(values) for name, values in times.items()}
    return UpdateComparison(matrices=len(matrices), **medians)


def _muon_like_ours(run: Run, matrices, weights, *, split: bool) -> muon_module.Muon:
    """Muon of this package on stand-ins for the run's matrices, whole on this rank."""
    stand_ins = []
    for parameter, weight in zip(matrices, weights, strict=True):
        treatment = parameter.treatment if split else replace(parameter.treatment, parts=None)
        stand_ins.append(
            replace(parameter, model=weight, main=weight, partition_dim=None, treatment=treatment)
        )
    return muon_module.Muon(stand_ins, run.config.optimizer.muon)


@contextlib.contextmanager
def _timed(owner: object, name: str, clock: dict[str, float], key: str) -> Iterator[None]:
    """Add the time inside `owner.name` to `clock[key]`."""
    plain = getattr(owner, name)

    def timed(*arguments, **settings):
        result = None

        def call() -> None:
            nonlocal result
            result = plain(*arguments, **settings)

        clock[key] += _seconds(call)
        return result

    setattr(owner, name, timed)
    try:
        yield
    finally:
        setattr(owner, name, plain)


def _seconds(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start
