"""Figures that follow from a layout: sizes of groups, micro-batches, and the world.

A parallelism is a row of `DIMENSIONS`, the only place that knows megatron-core's name for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

from equilibrium_mcore.config.schema import ParallelismConfig, RunConfig


class Dimension(NamedTuple):
    """A way to lay a run over ranks, by its setting in `parallelism`.

    Attributes:
        short: its name in a layout such as `tp=2,cp=2`.
        megatron: its name as an argument of megatron-core's.
        splits_model: its ranks hold one copy of the dense weights, or of a sequence, together.
        splits_experts: its ranks hold one copy of the routed experts together.
    """

    short: str
    megatron: str
    splits_model: bool
    splits_experts: bool


DIMENSIONS: dict[str, Dimension] = {
    "tensor": Dimension("tp", "tensor_model_parallel_size", True, False),
    "context": Dimension("cp", "context_parallel_size", True, False),
    "pipeline": Dimension("pp", "pipeline_model_parallel_size", True, True),
    "virtual_pipeline": Dimension("vpp", "virtual_pipeline_model_parallel_size", False, False),
    "expert": Dimension("ep", "expert_model_parallel_size", False, True),
    "expert_tensor": Dimension("etp", "expert_tensor_parallel_size", False, True),
}


def megatron_sizes(parallelism: ParallelismConfig) -> dict[str, int | None]:
    """The sizes by megatron-core's names, as its groups and its TransformerConfig both take them.

    Without virtual stages their number is None: megatron-core takes 1 for an interleaved schedule.
    """
    sizes = {row.megatron: getattr(parallelism, name) for name, row in DIMENSIONS.items()}
    sizes[DIMENSIONS["virtual_pipeline"].megatron] = virtual_stages(parallelism)
    return sizes


def is_interleaved(parallelism: ParallelismConfig) -> bool:
    """Whether each pipeline rank has several model chunks, which take turns."""
    return parallelism.virtual_pipeline > 1


def virtual_stages(parallelism: ParallelismConfig) -> int | None:
    """Model chunks of a pipeline rank; None where it has one, as megatron-core wants it."""
    return parallelism.virtual_pipeline if is_interleaved(parallelism) else None


def micro_batch_unit(parallelism: ParallelismConfig) -> int:
    """Micro-batches of a step are a multiple of this: the interleaved schedule takes groups."""
    return parallelism.pipeline if is_interleaved(parallelism) else 1


def launched_world_size(environment: Mapping[str, str]) -> int | None:
    """Ranks that torchrun (WORLD_SIZE) or srun (SLURM_STEP_NUM_TASKS) started; None for neither.

    The variable of the job step is used, not SLURM_NTASKS: a batch script has the latter too,
    though it is a single process.
    """
    for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        text = environment.get(name, "")
        if text.isdecimal() and int(text) > 0:
            return int(text)
    return None


def model_parallel_size(parallelism: ParallelismConfig) -> int:
    """Ranks that hold one copy of the dense weights: tensor * pipeline * context."""
    names = [name for name, row in DIMENSIONS.items() if row.splits_model]
    return math.prod(getattr(parallelism, name) for name in names)


def expert_parallel_size(parallelism: ParallelismConfig) -> int:
    """Ranks that hold one copy of the routed experts: expert * expert_tensor * pipeline."""
    names = [name for name, row in DIMENSIONS.items() if row.splits_experts]
    return math.prod(getattr(parallelism, name) for name in names)


def smallest_world_size(parallelism: ParallelismConfig) -> int:
    """Fewest ranks that hold the layout; every allowed world size is a multiple of it."""
    return math.lcm(model_parallel_size(parallelism), expert_parallel_size(parallelism))


def resolve_world_size(parallelism: ParallelismConfig, launched: int | None = None) -> int:
    """Ranks in all: what was launched, else what the config says, else the fewest that fit."""
    return launched or parallelism.world_size or smallest_world_size(parallelism)


def data_parallel_size(config: RunConfig, world_size: int | None = None) -> int:
    """Ranks that each see another part of the batch: world size / (tensor * pipeline * context)."""
    world_size = resolve_world_size(config.parallelism, world_size)
    return world_size // model_parallel_size(config.parallelism)


def expert_data_parallel_size(config: RunConfig, world_size: int | None = None) -> int:
    """Copies of each routed expert: world size / (expert * expert_tensor * pipeline)."""
    world_size = resolve_world_size(config.parallelism, world_size)
    return world_size // expert_parallel_size(config.parallelism)


def micro_batches_per_step(config: RunConfig, world_size: int | None = None) -> int:
    """Forward passes of one optimizer step on each data-parallel rank."""
    training = config.training
    at_once = training.micro_batch_size * data_parallel_size(config, world_size)
    return training.global_batch_size // at_once


def pipeline_segments(parallelism: ParallelismConfig) -> int:
    """Pieces that the layer pattern is cut into: pipeline * virtual_pipeline."""
    return parallelism.pipeline * parallelism.virtual_pipeline


def global_batch_tokens(config: RunConfig) -> int:
    """Tokens of one optimizer step."""
    return config.training.global_batch_size * config.training.sequence_length


def train_samples(config: RunConfig) -> int:
    """Sequences that the order of the training data is made for."""
    training = config.training
    asked = getattr(config.data, "train_samples", None)
    return asked or training.steps * training.global_batch_size


def divisors(number: int) -> list[int]:
    """All divisors, ascending; of a number beyond 10^12 the small ones and their counterparts."""
    most = min(math.isqrt(number), 10**6)
    small = [d for d in range(1, most + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})
