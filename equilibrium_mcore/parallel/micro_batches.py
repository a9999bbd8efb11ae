"""Micro-batches through megatron-core's schedule, in any layout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.utils import get_model_config
from torch import Tensor

from equilibrium_mcore.config.layout import virtual_stages
from equilibrium_mcore.config.schema import ParallelismConfig

ForwardStep = Callable[..., tuple[Tensor, Callable[..., Any]]]
"""From an iterator of micro-batches and a chunk: its output, and a function of the last stage's."""


def through_stages(
    micro_batches: Sequence[Any],
    *,
    forward_step: ForwardStep,
    chunks: Sequence[torch.nn.Module],
    groups: ProcessGroupCollection,
    layout: ParallelismConfig,
    shape: tuple[int, int],
    forward_only: bool,
    collect: bool,
) -> list[Any]:
    """`forward_step` on every micro-batch, with gradients unless `forward_only`. Collective.

    `shape` is (B, S) of a micro-batch before CP cuts it, which stages must know of each other.
    Returns what the function of the last stage kept of each, in their order: with `collect`
    whatever it returns; an empty list on other stages.
    """
    schedule = get_forward_backward_func(pp_size=layout.pipeline, vp_size=virtual_stages(layout))
    iterators = [iter(micro_batches) for _ in chunks]
    batch_size, length = shape
    return schedule(
        forward_step_func=forward_step,
        data_iterator=iterators if len(chunks) > 1 else iterators[0],
        model=list(chunks) if len(chunks) > 1 else chunks[0],
        num_microbatches=len(micro_batches),
        seq_length=length,
        micro_batch_size=batch_size,
        forward_only=forward_only,
        collect_non_loss_data=collect,
        p2p_communicator=P2PCommunicator(pp_group=groups.pp, config=get_model_config(chunks[0])),
        pg_collection=groups,
    )
