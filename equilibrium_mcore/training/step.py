"""One training step: megatron-core's schedule over micro-batches, then the update."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
from equilibrium_mcore.data.stream import Batch
from equilibrium_mcore.models.packing import document_lengths, packed_documents, rank_tokens
from equilibrium_mcore.parallel import accelerator
from equilibrium_mcore.training.setup import Run


@dataclass(frozen=True)
class StepOutcome:
    """What one step did; the same on every rank."""

    figures: dict[str, float]  # the objective's, by name: means over the global batch
    tokens: int  # positions whose label counted, in the global batch
    aux_loss: float | None  # mean balancing loss per MoE layer; None where nothing is balanced
    gradient_norm: float
    learning_rates: dict[str, float]
    skipped: bool
    stop_requested: bool  # some rank was told to stop

    @property
    def loss(self) -> float:
        """Mean cross-entropy per counted token of the global batch, in nats."""
        return self.figures["loss"]


def train_step(run: Run, *, stop_requested: bool = False) -> StepOutcome:
    """One optimizer step over a global batch. Collective; advances the run's progress.

    `stop_requested` is this rank's wish to stop; every rank learns whether any rank has it.
    """
    outputs = gradients_of(run, run.stream.next_batches(run.micro_batches))
    rates = run.optimizer.learning_rates()
    result = run.optimizer.step()
    figures, counts, extra = _sum_over_ranks(
        run, outputs, extra=[_aux_loss_here(run), float(stop_requested)]
    )
    aux, stops = extra
    samples = run.config.training.global_batch_size
    run.stream.commit(samples)
    run.progress.step += 1
    run.progress.samples += samples
    run.progress.tokens += round(counts["loss"])
    moe_layers = count_kinds(run.config.model.layer_pattern).get("moe", 0)
    aux_scale = moe_layers * run.micro_batches * run.data_parallel_size
    return StepOutcome(
        figures=figures,
        tokens=round(counts["loss"]),
        aux_loss=aux / aux_scale if moe_layers and balances(run) else None,
        gradient_norm=result.gradient_norm,
        learning_rates=rates,
        skipped=result.skipped,
        stop_requested=stops > 0,
    )


def gradients_of(run: Run, batches: list[Batch]) -> list[Tensor]:
    """Fill the gradients with those of a global batch. Collective.

    Gives the figures of `objective_of` for every micro-batch, on ranks of the last stage.
    """
    for chunk in run.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    return _run_schedule(run, batches, forward_only=False)


def validation_loss(run: Run) -> float:
    """Mean cross-entropy per token in nats over the run's validation batches. Collective."""
    return validation_figures(run)["loss"]


@torch.no_grad()
def validation_figures(run: Run) -> dict[str, float]:
    """The objective's figures over the run's validation batches. Collective.

    The same batches every time, so that points of a curve can be compared.
    """
    for chunk in run.chunks:
        chunk.eval()
    count = run.micro_batches * run.config.training.validation_batches
    stream = run.stream_of(run.datasets.validation, consumed_samples=0)
    batches = stream.next_batches(count)
    stream.close()
    with run.optimizer.evaluation_weights():
        outputs = _run_schedule(run, batches, forward_only=True)
    figures, _, _ = _sum_over_ranks(run, outputs)
    return figures


def forward_step(
    iterator: Iterator[Batch], chunk: torch.nn.Module, *, run: Run, scale: float
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
    return output, partial(objective_of, batch=batch, run=run, scale=scale)


def objective_of(
    losses: Tensor, *, batch: Batch, run: Run, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The objective's scaled sum, this rank's positions, and the figures (sum, count) as a row."""
    outcome = run.objective(losses, batch, cp_group=run.groups.cp)
    positions = torch.tensor(batch["labels"].numel(), dtype=torch.int, device=losses.device)
    figures = [value for name in run.objective.figures for value in outcome.figures[name]]
    return outcome.total * scale, positions, torch.stack(figures).detach()


def rank_batch(batch: Batch, run: Run) -> tuple[Batch, PackedSeqParams | None]:
    """The batch on this rank's device, cut to its part of the sequence under CP.

    With `data.packing: documents` its sequences become one, (1, batch * sequence), described by the
    second value.
    """
    device = accelerator.device()
    names = ("tokens", "labels", "loss_mask", "position_ids", *run.objective.inputs)
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


def _run_schedule(run: Run, batches: list[Batch], *, forward_only: bool) -> list[Tensor]:
    """The figures of `objective_of` for every micro-batch, on ranks of the last stage."""
    layout, training = run.config.parallelism, run.config.training
    length, batch_size = training.sequence_length, training.micro_batch_size
    if run.config.data.packing == "documents":  # all sequences of a micro-batch are one
        length, batch_size = length * batch_size, 1
    schedule = get_forward_backward_func(
        pp_size=layout.pipeline,
        vp_size=layout.virtual_pipeline if layout.virtual_pipeline > 1 else None,
    )
    iterators = [iter(batches) for _ in run.chunks]
    return schedule(
        forward_step_func=partial(forward_step, run=run, scale=_scale(run, batches)),
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=run.chunks if len(run.chunks) > 1 else run.chunks[0],
        num_microbatches=len(batches),
        seq_length=length,
        micro_batch_size=batch_size,
        forward_only=forward_only,
        p2p_communicator=P2PCommunicator(pp_group=run.groups.pp, config=run.transformer),
        pg_collection=run.groups,
    )


def _scale(run: Run, batches: list[Batch]) -> float:
    """Positions over the objective's divisor, both of the global batch. Collective."""
    mine = [sum(batch["labels"].numel() for batch in batches)]
    mine.append(sum(run.objective.weigh(batch) for batch in batches))
    both = torch.tensor(mine, dtype=torch.float64, device=accelerator.device())
    torch.distributed.all_reduce(both, group=run.groups.dp)
    positions, divisor = both.tolist()
    return positions / divisor if divisor else 0.0


def _sum_over_ranks(
    run: Run, outputs: list[Tensor], extra: Sequence[float] = ()
) -> tuple[dict[str, float], dict[str, float], list[float]]:
    """Figures, their counts and sums of `extra` over all ranks; each token is on one TP rank."""
    names = run.objective.figures
    mine = torch.zeros(2 * len(names) + len(extra), dtype=torch.float64)
    if outputs and run.groups.tp.rank() == 0:
        mine[: 2 * len(names)] = torch.stack(outputs).double().sum(dim=0).cpu()
    for index, value in enumerate(extra):
        mine[2 * len(names) + index] = value
    mine = mine.to(accelerator.device())
    torch.distributed.all_reduce(mine)
    sums = mine.tolist()
    counts = {name: sums[2 * i + 1] for i, name in enumerate(names)}
    figures = {name: sums[2 * i] / max(counts[name], 1) for i, name in enumerate(names)}
    return figures, counts, sums[2 * len(names) :]


def balances(run: Run) -> bool:
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
