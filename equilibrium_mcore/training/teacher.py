"""A teacher beside the run: another model, frozen, in the run's layout.

Before a step its layers see the whole global batch, and the last stage keeps their outputs, hidden
states; logits, which are far larger, are made of them a chunk at a time inside the loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor
from torch.nn.functional import linear

from equilibrium_mcore.data.stream import Batch
from equilibrium_mcore.models.modes import evaluating, without_logits
from equilibrium_mcore.training.distillation import TEACHER, OfTokens, Slice
from equilibrium_mcore.training.frozen import load_frozen
from equilibrium_mcore.training.schedule import rank_batch, run_schedule
from equilibrium_mcore.training.setup import Run

KEY = "objective.teacher"


@dataclass(frozen=True)
class HiddenStates:
    """What a teacher says of a micro-batch: hidden states, from which the output layer makes logits

    hidden: [S / CP, B, H], of which a tensor rank holds its part of S under sequence parallelism.
    weight: this rank's rows of the output layer, [V / TP, H].
    """

    hidden: Tensor
    weight: Tensor
    tp_group: Any
    sequence_parallel: bool

    @torch.no_grad()
    def of(self, batch: Batch, rows: Slice) -> OfTokens:
        """See Said."""
        hidden_SBH = self.hidden
        if self.sequence_parallel:
            hidden_SBH = gather_from_sequence_parallel_region(hidden_SBH, group=self.tp_group)
        hidden_NH = hidden_SBH.transpose(0, 1).flatten(0, 1)
        return lambda tokens: linear(hidden_NH[tokens], self.weight)


class Teacher:
    """A `Run.prepare`: what a frozen model says of each batch. Made together by all ranks."""

    def __init__(self, run: Run, weights: Path) -> None:
        self.chunks = load_frozen(weights, config=run.config, groups=run.groups, key=KEY)

    def __call__(self, run: Run, batches: list[Batch]) -> None:
        """Let every batch carry it on the ranks of the last stage; None on others. Collective."""
        for batch, said in zip(batches, self.hidden_states(run, batches), strict=True):
            batch[TEACHER] = said

    @torch.no_grad()
    def hidden_states(self, run: Run, batches: Sequence[Batch]) -> list[HiddenStates | None]:
        """Of each batch, on the ranks of the last stage; None on others. Collective."""
        with evaluating(self.chunks), without_logits(self.chunks):
            outputs = run_schedule(
                run,
                batches,
                forward_step=partial(_forward_step, run=run),
                forward_only=True,
                chunks=self.chunks,
                collect=True,
            )
        if not outputs:
            return [None] * len(batches)
        last = self.chunks[-1]
        weight = last.output_layer.weight
        if last.share_embeddings_and_output_weights:
            weight = last.shared_embedding_or_output_weight()
        sequence = run.config.parallelism.sequence
        return [HiddenStates(hidden, weight, run.groups.tp, sequence) for hidden in outputs]


def _forward_step(
    iterator: Iterator[Batch], chunk: torch.nn.Module, *, run: Run
) -> tuple[Tensor, Any]:
    """megatron-core's forward step: hidden states, which the last stage keeps."""
    batch, packed = rank_batch(next(iterator), run)
    output = chunk(
        input_ids=batch["tokens"],
        position_ids=batch["position_ids"],
        attention_mask=None,
        packed_seq_params=packed,
    )
    return output, lambda hidden, non_loss_data: hidden
