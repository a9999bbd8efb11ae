"""megatron-core's schedule over micro-batches, in any layout: training, validation and scoring."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.utils import get_batch_on_this_cp_rank

from equilibrium_mcore.data.stream import Batch
from equilibrium_mcore.models.packing import (
    document_lengths,
    packed_documents,
    rank_tokens,
    send,
)
from equilibrium_mcore.parallel import accelerator
from equilibrium_mcore.parallel.micro_batches import ForwardStep, through_stages
from equilibrium_mcore.training.setup import Run


def run_schedule(
    run: Run,
    batches: Sequence[Batch],
    *,
    forward_step: ForwardStep,
    forward_only: bool,
    chunks: list[torch.nn.Module] | None = None,
    collect: bool = False,
) -> list[Any]:
    """`forward_step` on every micro-batch, with gradients unless `forward_only`. Collective.

    Args:
        batches: whole micro-batches of one shape [B, S], as many on every rank.
        forward_step: megatron-core's: from an iterator of batches and a chunk to the chunk's output
            and a function of the last stage's.
        chunks: this rank's part of the model; the run's own if not given.
        collect: that function returns values to keep, and takes `non_loss_data`; else it returns
            the scaled loss, the number of positions, and figures to keep.

    Returns, on ranks of the last pipeline stage, what was kept of each batch, in their order; an
    empty list on others. Raises ValueError for batches of several shapes.
    """
    layout = run.config.parallelism
    chunks = run.chunks if chunks is None else chunks
    batch_size, length = _shape_of(batches)
    if run.config.data.packing == "documents":  # all sequences of a micro-batch are one
        length, batch_size = length * batch_size, 1
    return through_stages(
        batches,
        forward_step=forward_step,
        chunks=chunks,
        groups=run.groups,
        layout=layout,
        shape=(batch_size, length),
        forward_only=forward_only,
        collect=collect,
    )


def _shape_of(batches: Sequence[Batch]) -> tuple[int, int]:
    """(B, S), which pipeline stages must know of each other's micro-batches."""
    shapes = {tuple(batch["tokens"].shape) for batch in batches}
    if len(shapes) != 1:
        raise ValueError(
            f"micro-batches of the shapes {sorted(shapes)}: all of one call must have one shape "
            "(batch, sequence)"
        )
    return shapes.pop()


def rank_batch(
    batch: Batch, run: Run, *, also: Sequence[str] = ()
) -> tuple[Batch, PackedSeqParams | None]:
    """The batch on this rank's device, cut to its part of the sequence under CP.

    Taken are `tokens`, `labels`, `position_ids`, and those of the names `also`, all [B, S]. With
    `data.packing: documents` its sequences become one, (1, batch * sequence), described by the
    second value.
    """
    device = accelerator.device()
    names = ("tokens", "labels", "position_ids", *also)
    cp = run.groups.cp
    if run.config.data.packing == "documents":  # sizes follow from values: before they are sent
        lengths = document_lengths(batch["position_ids"])
        batch = {name: batch[name].reshape(1, -1) for name in names}
        if cp.size() > 1:
            mine = rank_tokens(lengths, cp_size=cp.size(), cp_rank=cp.rank())
            batch = {name: value[:, mine] for name, value in batch.items()}
        packed = packed_documents(lengths, cp_size=cp.size(), device=device)
        return {name: send(value, device) for name, value in batch.items()}, packed
    batch = {name: batch[name].to(device, non_blocking=True) for name in names}
    # Without a group megatron-core would split over all ranks, so it is always given.
    return get_batch_on_this_cp_rank(
        {**batch, "cu_seqlens": None}, is_hybrid_cp=False, cp_group=cp
    ), None
