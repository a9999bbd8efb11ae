"""Log-probabilities of given tokens, by a reference, an old policy or a teacher; values of tokens.

Forward only, in the run's layout, through the schedule that trains. Nothing of the run changes:
weights, gradients, random states and the experts' bias are those from before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch
from megatron.core.utils import get_model_config
from torch import Tensor

from equilibrium_mcore.config.layout import micro_batch_unit
from equilibrium_mcore.data.stream import Batch
from equilibrium_mcore.models.heads import ScalarHeadModel, values_of
from equilibrium_mcore.models.logprobs import label_log_probabilities
from equilibrium_mcore.models.modes import evaluating
from equilibrium_mcore.models.support import SUPPORT
from equilibrium_mcore.parallel import accelerator
from equilibrium_mcore.training.schedule import rank_batch, run_schedule
from equilibrium_mcore.training.setup import Run, Weights


@torch.no_grad()
def log_probabilities(
    run: Run,
    batches: Sequence[Batch],
    *,
    temperature: float = 1.0,
    which: Weights = "current",
    chunks: list[torch.nn.Module] | None = None,
    padded_vocabulary: bool = False,
) -> list[Tensor]:
    """log p of every label of `batches` in nats, one tensor [B, S] per batch. Collective.

    The values of a whole sequence, in the order of the text, float32 (or the model's dtype, if
    wider) on this rank's device, and the same bits on every rank that was given the same batches:
    those of all tensor, context and pipeline ranks of a data rank. Labels that do not count in a
    loss are scored too.

    Unlike training's loss, they leave out the rows that only pad the vocabulary (`vocab_size` up
    to `padded_vocab_size`), which can never be sampled. Where a batch has a `support`
    (`models/support.py`), so are the ids outside of it: also of another model than drew them.

    Args:
        batches: this data rank's, with `tokens`, `labels` and `position_ids`, each [B, S], all of
            one shape; as many on every data rank, since experts are shared.
        temperature: divides the logits.
        which: the run's weights to score with; see `Run.weights`.
        chunks: a frozen model (`training/frozen.py`) to score with instead.
        padded_vocabulary: count those rows, as the loss does, for a ratio with it.

    Raises ValueError for labels that are no token, and for a temperature that is not positive.
    """
    if not batches:
        return []
    _check(run, batches, temperature, which, chunks)
    model = run.config.model
    vocab_size = model.padded_vocab_size if padded_vocabulary else model.vocab_size

    def of_output(output: Tensor, batch: Batch) -> Tensor:
        outside, tp = None, run.groups.tp
        if batch[SUPPORT] is not None:
            width = output.shape[-1]
            outside = batch[SUPPORT].outside(batch["place"], first=tp.rank() * width, width=width)
        return label_log_probabilities(
            output,
            batch["labels"],
            vocab_size=vocab_size,
            tp_group=tp,
            temperature=temperature,
            outside_BSV=outside,
        )

    return _scored(run, batches, of_output, which, chunks)


@torch.no_grad()
def scalar_values(
    run: Run,
    batches: Sequence[Batch],
    *,
    which: Weights = "current",
    chunks: list[torch.nn.Module] | None = None,
) -> list[Tensor]:
    """What a model's scalar head gives for every token, one tensor [B, S] per batch. Collective.

    As `log_probabilities` in shapes, dtype, arguments and in which ranks have which values.

    Raises ValueError for a model without such a head.
    """
    if not batches:
        return []
    _check_weights(which, chunks)
    last = (run.chunks if chunks is None else chunks)[-1]
    if not isinstance(getattr(last, "module", last), ScalarHeadModel):
        raise ValueError("a model without a scalar head: model.head is scalar or both for one")
    return _scored(run, batches, lambda output, _: values_of(output), which, chunks, labels=True)


def _scored(
    run: Run,
    batches: Sequence[Batch],
    of_output: Callable[[Tensor, Batch], Tensor],
    which: Weights,
    chunks: list[torch.nn.Module] | None,
    *,
    labels: bool = False,
) -> list[Tensor]:
    """`of_output` of the last stage's output and its batch, [B, S / CP], whole, on all ranks."""
    micro_batches = [_with_places(batch) for batch in _filled_up(run, batches)]
    with run.weights(which) as own:
        chunks = own if chunks is None else chunks
        with evaluating(chunks):
            outputs = run_schedule(
                run,
                micro_batches,
                forward_step=partial(
                    _forward_step, run=run, of_output=of_output, with_labels=labels
                ),
                forward_only=True,
                chunks=chunks,
                collect=True,
            )
    dtype = torch.promote_types(get_model_config(chunks[0]).params_dtype, torch.float32)
    shape = batches[0]["labels"].shape
    values = torch.zeros(
        len(micro_batches), shape.numel(), dtype=dtype, device=accelerator.device()
    )
    if outputs:
        values.copy_(torch.stack(outputs))
    _to_all(run, values)
    return list(values.unflatten(1, shape).unbind())[: len(batches)]


def _check(
    run: Run,
    batches: Sequence[Batch],
    temperature: float,
    which: Weights,
    chunks: list[torch.nn.Module] | None,
) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature={temperature}: logits are divided by it, so above 0")
    _check_weights(which, chunks)
    size = run.config.model.vocab_size
    for number, batch in enumerate(batches):
        low, high = (int(value) for value in batch["labels"].aminmax())
        if low < 0 or high >= size:
            raise ValueError(
                f"batch {number}: labels from {low} to {high}, but tokens are 0 to {size - 1}: "
                "positions without a label need some token too, their values are not to be used"
            )


def _check_weights(which: Weights, chunks: list[torch.nn.Module] | None) -> None:
    if chunks is not None and which != "current":
        raise ValueError(f"which={which!r} with chunks: a frozen model has one set of weights")


def _filled_up(run: Run, batches: Sequence[Batch]) -> list[Batch]:
    """The interleaved schedule takes micro-batches in groups of the pipeline's size."""
    missing = -len(batches) % micro_batch_unit(run.config.parallelism)
    return [*batches, *[batches[-1]] * missing]


def _with_places(batch: Batch) -> Batch:
    """The batch with each token's place in it, which context parallelism cuts with the others."""
    labels = batch["labels"]
    places = torch.arange(labels.numel(), device=labels.device)
    return {**batch, "place": places.view_as(labels)}


def _forward_step(
    iterator: Iterator[Batch],
    chunk: torch.nn.Module,
    *,
    run: Run,
    of_output: Callable[[Tensor, Batch], Tensor],
    with_labels: bool,
) -> tuple[Tensor, partial]:
    """megatron-core's forward step: the last stage's output, hidden states before."""
    whole = next(iterator)
    batch, packed = rank_batch(whole, run, also=("place",))
    batch[SUPPORT] = whole.get(SUPPORT)
    output = chunk(
        input_ids=batch["tokens"],
        position_ids=batch["position_ids"],
        attention_mask=None,
        labels=batch["labels"] if with_labels else None,
        packed_seq_params=packed,
    )
    return output, partial(_values_of, batch=batch, run=run, of_output=of_output)


def _values_of(
    output: Tensor,
    *,
    batch: Batch,
    run: Run,
    of_output: Callable[[Tensor, Batch], Tensor],
    non_loss_data: bool,
) -> Tensor:
    """(B * S,), the values of this rank's tokens at their places, and zeros elsewhere."""
    values = of_output(output, batch)
    whole = values.new_zeros(values.numel() * run.groups.cp.size())
    whole[batch["place"].flatten()] = values.flatten()
    return whole


def _to_all(run: Run, values: Tensor) -> None:
    """Join the parts of context ranks, and bring those of the last stage to all stages."""
    cp, pp = run.groups.cp, run.groups.pp
    if cp.size() > 1:
        torch.distributed.all_reduce(values, group=cp)
    if pp.size() > 1:
        torch.distributed.broadcast(values, group=pp, group_src=pp.size() - 1)
