"""One training step: megatron-core's schedule over micro-batches, then the update."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel.p2p_communication import P2PCommunicator
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from equilibrium_mcore.config.pattern import count_kinds
from equilibrium_mcore.models.packing import document_lengths, packed_documents, rank_tokens
from equilibrium_mcore.parallel import accelerator
from equilibrium_mcore.training.setup import Run


@dataclass(frozen=True)
class StepOutcome:
    """What one step did; the same on every rank."""

    loss: float  # mean cross-entropy per token of the global batch, in nats
    aux_loss: float | None  # mean balancing loss per MoE layer; None where nothing is balanced
    gradient_norm: float
    learning_rates: dict[str, float]
    skipped: bool
    stop_requested: bool  # some rank was told to stop


def train_step(run: Run, *, stop_requested: bool = False) -> StepOutcome:
    """One optimizer step over a global batch. Collective; advances the run's progress.

    `stop_requested` is this rank's wish to stop; every rank learns whether any rank has it.
    """
    for chunk in run.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    outputs = _run_schedule(run, run.train_batches, run.micro_batches, forward_only=False)
    rates = run.optimizer.learning_rates()
    result = run.optimizer.step()
    totals = _sum_over_ranks(run, outputs, extra=[_aux_loss_here(run), float(stop_requested)])
    loss_sum, tokens, aux, stops = totals
    training = run.config.training
    run.progress.step += 1
    run.progress.samples += training.global_batch_size
    run.progress.tokens += training.global_batch_size * training.sequence_length
    moe_layers = count_kinds(run.config.model.layer_pattern).get("moe", 0)
    aux_scale = moe_layers * run.micro_batches * run.data_parallel_size
    return StepOutcome(
        loss=loss_sum / max(tokens, 1),
        aux_loss=aux / aux_scale if moe_layers and _balances(run) else None,
        gradient_norm=result.gradient_norm,
        learning_rates=rates,
        skipped=result.skipped,
        stop_requested=stops > 0,
    )


@torch.no_grad()
def validation_loss(run: Run) -> float:
    """Mean cross-entropy per token in nats over the run's validation batches. Collective.

    The same batches every time, so that points of a curve can be compared.
    """
    for chunk in run.chunks:
        chunk.eval()
    iterators = run.batches_of(run.datasets.validation, consumed_samples=0)
    count = run.micro_batches * run.config.training.validation_batches
    with run.optimizer.evaluation_weights():
        outputs = _run_schedule(run, iterators, count, forward_only=True)
    loss_sum, tokens = _sum_over_ranks(run, outputs)
    return loss_sum / max(tokens, 1)


def forward_step(
    iterator: Iterator[dict[str, Tensor]], chunk: torch.nn.Module, *, run: Run
) -> tuple[Tensor, partial]:
    """megatron-core's forward step: losses per token on the last stage, hidden states before."""
    batch, packed = rank_batch(next(iterator), run)
    output = chunk(
        input_ids=batch["tokens"],
        position_ids=batch["position_ids"],
        attention_mask=None,
        labels=batch["labels"],
        packed_seq_params=packed,
    )
    return output, partial(sum_of_losses, loss_mask=batch["loss_mask"])


def sum_of_losses(losses: Tensor, *, loss_mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Sum over counted tokens, their number, and both for the log. losses: (batch, sequence)."""
    wide = torch.promote_types(losses.dtype, torch.float32)
    mask = loss_mask.reshape(-1).to(wide)
    total = (losses.reshape(-1).to(wide) * mask).sum()
    tokens = mask.sum()
    return total, tokens.to(torch.int), torch.stack([total.detach(), tokens])


def rank_batch(
    batch: dict[str, Tensor], run: Run
) -> tuple[dict[str, Tensor], PackedSeqParams | None]:
    """The batch on this rank's device, cut to its part of the sequence under CP.

    With `data.packing: documents` its sequences become one, (1, batch * sequence), described by the
    second value.
    """
    device = accelerator.device()
    names = ("tokens", "labels", "loss_mask", "position_ids")
    batch = {name: batch[name].to(device, non_blocking=True) for name in names}
    cp = run.groups.cp
    if run.config.data.packing == "documents":
        lengths = document_lengths(batch["position_ids"])
        mine = rank_tokens(lengths, cp_size=cp.size(), cp_rank=cp.rank())
        batch = {name: value.reshape(1, -1)[:, mine] for name, value in batch.items()}
        return batch, packed_documents(lengths)
    # Without a group megatron-core would split over all ranks, so it is always given.
    return get_batch_on_this_cp_rank(
        {**batch, "cu_seqlens": None}, is_hybrid_cp=False, cp_group=cp
    ), None


def _run_schedule(
    run: Run, iterators: list[Iterator], micro_batches: int, *, forward_only: bool
) -> list[Tensor]:
    """What `sum_of_losses` returned for every micro-batch, on ranks of the last stage."""
    layout, training = run.config.parallelism, run.config.training
    length, batch_size = training.sequence_length, training.micro_batch_size
    if run.config.data.packing == "documents":  # all sequences of a micro-batch are one
        length, batch_size = length * batch_size, 1
    schedule = get_forward_backward_func(
        pp_size=layout.pipeline,
        vp_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
    )
    return schedule(
        forward_step_func=partial(forward_step, run=run),
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=run.chunks if len(run.chunks) > 1 else run.chunks[0],
        num_microbatches=micro_batches,
        seq_length=length,
        micro_batch_size=batch_size,
        forward_only=forward_only,
        p2p_communicator=P2PCommunicator(pp_group=run.groups.pp, config=run.transformer),
        pg_collection=run.groups,
    )


def _sum_over_ranks(run: Run, outputs: list[Tensor], extra: list[float] = ()) -> list[float]:
    """(sum of losses, tokens, *extra) over all ranks; each token is counted on one TP rank."""
    mine = torch.zeros(2 + len(extra), dtype=torch.float64)
    if outputs and run.groups.tp.rank() == 0:
        mine[:2] = torch.stack(outputs).double().sum(dim=0).cpu()
    for index, value in enumerate(extra):
        mine[2 + index] = value
    mine = mine.to(accelerator.device())
    torch.distributed.all_reduce(mine)
    return mine.tolist()


def _balances(run: Run) -> bool:
    """Whether a loss balances the experts; megatron-core computes none with a coefficient of 0."""
    moe = run.config.model.moe
    return moe is not None and moe.load_balancing != "none" and moe.aux_loss_coefficient > 0


def _aux_loss_here(run: Run) -> float:
    """This rank's share of the balancing losses since the last call."""
    tracker = get_moe_metrics_tracker()
    total = sum(
        entry.values.sum().item()
        for name, entry in tracker.metrics.items()
        if name.endswith("load_balancing_loss")
    )
    tracker.clear()
    return total
