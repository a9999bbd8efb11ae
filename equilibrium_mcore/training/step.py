"""One training step: megatron-core's schedule over micro-batches, then the update."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker
from torch import Tensor

from equilibrium_mcore.config.pattern import count_kinds
from equilibrium_mcore.data.stream import Batch
from equilibrium_mcore.models.modes import evaluating
from equilibrium_mcore.optim.optimizer import StepResult
from equilibrium_mcore.parallel import accelerator
from equilibrium_mcore.processes.hangs import progress
from equilibrium_mcore.training.anomalies import Anomaly
from equilibrium_mcore.training.objective import Logits
from equilibrium_mcore.training.schedule import rank_batch, run_schedule
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
    stop_requested: bool  # some rank was asked to stop
    anomaly: Anomaly | None = None  # what is wrong with it; nothing was updated then

    @property
    def loss(self) -> float:
        """Mean cross-entropy per counted token of the global batch, in nats."""
        return self.figures["loss"]


def train_step(run: Run, *, stop_requested: bool = False) -> StepOutcome:
    """One optimizer step over a global batch. Collective; advances the run's progress.

    `stop_requested` is this rank's wish to stop; every rank learns whether any rank has it.
    """
    progress()
    biases = _expert_biases(run)
    batches = run.stream.next_batches(run.micro_batches)
    outputs = gradients_of(run, batches)
    run.positions += sum(b["labels"].numel() for b in batches) * run.data_parallel_size
    rates = run.optimizer.learning_rates()
    figures, counts, extra = sum_over_ranks(
        run, outputs, extra=[_aux_loss_here(run), float(stop_requested)]
    )
    aux, stops = extra
    result, anomaly = _update(run, figures["loss"])
    if anomaly is None or run.watch.settings.policy == "skip":
        _advance(run, tokens=round(counts[run.objective.tokens_of]))
    if anomaly is not None:
        for bias, before in biases:
            bias.copy_(before)
    moe_layers = count_kinds(run.config.model.layer_pattern).get("moe", 0)
    aux_scale = moe_layers * run.micro_batches * run.data_parallel_size
    return StepOutcome(
        figures={**figures, **run.stage_figures()},
        tokens=round(counts[run.objective.tokens_of]),
        aux_loss=aux / aux_scale if moe_layers and balances(run) else None,
        gradient_norm=result.gradient_norm,
        learning_rates=rates,
        skipped=result.skipped,
        stop_requested=stops > 0,
        anomaly=anomaly,
    )


def _advance(run: Run, *, tokens: int) -> None:
    samples = run.config.training.global_batch_size
    run.stream.commit(samples)
    run.progress.step += 1
    run.progress.samples += samples
    run.progress.tokens += tokens


def _update(run: Run, loss: float) -> tuple[StepResult, Anomaly | None]:
    """The optimizer's step, unless the run holds or its watch refuses it. Collective."""
    if run.holds(run):
        return StepResult(run.optimizer.gradient_norm(), skipped=True), None
    if run.watch is None:
        return run.optimizer.step(), None
    found: list[str] = []

    def refuses(gradient_norm: float) -> bool:
        what = run.watch.judge(loss, gradient_norm)
        found.extend([what] if what else [])
        return bool(found)

    result = run.optimizer.step(refuses=refuses)
    if not found:
        return result, None
    step, ranges = run.progress.step + 1, run.ranges_of_next_step()
    return result, Anomaly(step, found[0], loss, result.gradient_norm, ranges)


def _expert_biases(run: Run) -> list[tuple[Tensor, Tensor]]:
    """Biases of the routers with copies: megatron-core moves them before the verdict is there."""
    if run.watch is None:
        return []
    return [
        (buffer, buffer.clone())
        for chunk in run.chunks
        for name, buffer in chunk.named_buffers()
        if name.endswith("expert_bias")
    ]


def gradients_of(run: Run, batches: list[Batch]) -> list[Tensor]:
    """Fill the gradients with those of a global batch. Collective.

    Gives the figures of `objective_of` for every micro-batch, on ranks of the last stage.
    """
    run.prepare(run, batches)
    for chunk in run.chunks:
        chunk.train()
        chunk.zero_grad_buffer()
    return run_schedule(
        run, batches, forward_step=_objective_step(run, batches), forward_only=False
    )


def validation_loss(run: Run) -> float:
    """Mean cross-entropy per token in nats over the run's validation batches. Collective."""
    return validation_figures(run)["loss"]


@torch.no_grad()
def validation_figures(run: Run) -> dict[str, float]:
    """The objective's figures over the run's validation batches. Collective.

    The same batches every time, so that points of a curve can be compared.
    """
    count = run.micro_batches * run.config.training.validation_batches
    stream = run.stream_of(run.datasets.validation, consumed_samples=0)
    batches = stream.next_batches(count)
    stream.close()
    with run.weights("evaluation") as chunks, evaluating(chunks):
        run.prepare(run, batches)
        outputs = run_schedule(
            run, batches, forward_step=_objective_step(run, batches), forward_only=True
        )
    figures, _, _ = sum_over_ranks(run, outputs)
    return figures


def _objective_step(run: Run, batches: list[Batch]) -> partial:
    """The forward step of these micro-batches. Collective."""
    return partial(forward_step, run=run, scale=_scale(run, batches))


def forward_step(
    iterator: Iterator[Batch], chunk: torch.nn.Module, *, run: Run, scale: float
) -> tuple[Tensor, partial]:
    """megatron-core's forward step: the objective's losses or logits, or hidden states before."""
    objective, whole = run.objective, next(iterator)
    batch, packed = rank_batch(whole, run, also=("loss_mask", *objective.inputs))
    batch |= {name: whole[name] for name in objective.carried}
    output = chunk(
        input_ids=batch["tokens"],
        position_ids=batch["position_ids"],
        attention_mask=None,
        labels=None if objective.reads == "logits" else batch["labels"],
        packed_seq_params=packed,
    )
    return output, partial(objective_of, batch=batch, run=run, scale=scale)


def objective_of(
    output: Tensor, *, batch: Batch, run: Run, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """The objective's scaled sum, this rank's positions, and the figures (sum, count) as a row."""
    values: Tensor | Logits = output
    if run.objective.reads == "logits":
        values = Logits(output, run.config.model.vocab_size, run.groups.tp)
    elif output.dim() == 3 and run.objective.reads != "both":  # of a model with two heads
        values = output[int(run.objective.reads == "values")]
    outcome = run.objective(values, batch, cp_group=run.groups.cp)
    positions = torch.tensor(batch["labels"].numel(), dtype=torch.int, device=output.device)
    figures = [value for name in run.objective.figures for value in outcome.figures[name]]
    return outcome.total * scale, positions, torch.stack(figures).detach()


def _scale(run: Run, batches: list[Batch]) -> float:
    """Positions over the objective's divisor, both of the global batch. Collective."""
    mine = [sum(batch["labels"].numel() for batch in batches)]
    mine.append(sum(run.objective.weigh(batch) for batch in batches))
    both = torch.tensor(mine, dtype=torch.float64, device=accelerator.device())
    torch.distributed.all_reduce(both, group=run.groups.dp)
    positions, divisor = both.tolist()
    return positions / divisor if divisor else 0.0


def sum_over_ranks(
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
