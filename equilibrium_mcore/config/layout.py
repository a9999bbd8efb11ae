"""Figures that follow from a layout: sizes of groups, micro-batches, and the world."""

from __future__ import annotations

import math
from collections.abc import Mapping

from equilibrium_mcore.config.schema import ParallelismConfig, RunConfig


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
    return parallelism.tensor * parallelism.pipeline * parallelism.context


def expert_parallel_size(parallelism: ParallelismConfig) -> int:
    """Ranks that hold one copy of the routed experts: expert * expert_tensor * pipeline."""
    return parallelism.expert * parallelism.expert_tensor * parallelism.pipeline


def smallest_world_size(parallelism: ParallelismConfig) -> int:
    """Fewest ranks that hold the layout; every legal world size is a multiple of it."""
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
    """All divisors, ascending."""
    small = [d for d in range(1, math.isqrt(number) + 1) if number % d == 0]
    return sorted({*small, *(number // d for d in small)})
