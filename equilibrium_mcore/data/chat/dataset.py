"""Packed conversations as a dataset for torch's loader, with the ledger's contract."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.data.chat.examples import Examples
from equilibrium_mcore.data.chat.fill import fill_sequence, padded
from equilibrium_mcore.data.chat.order import ExampleOrder, Packing, SequencePlan
from equilibrium_mcore.data.samples import PlannedSamples


class ConversationDataset(PlannedSamples):
    """Sequences of packed examples, by number, or by the plan that an order made."""

    cursor_name = "conversations"

    def __init__(
        self,
        examples: Examples,
        *,
        sequence_length: int,
        samples: int,
        seed: int,
        vocab_size: int,
        pad_id: int,
        window: int = 1024,
        document_multiple: int = 1,
        state: dict[str, Any] | None = None,
        first_sample: int = 0,
    ) -> None:
        """`state` is an order's at sample `first_sample`; `samples` is how many the run takes.

        Raises ConfigError for examples that do not fit into a sequence or into the vocabulary, and
        for a state of other examples.
        """
        self.examples, self.pad_id = examples, pad_id
        self.packing = Packing(sequence_length, document_multiple)
        units = self.units(examples)
        _check(units, int(examples.ids.max()), self.packing, vocab_size)
        order = ExampleOrder(
            units,
            examples.fingerprint,
            seed=seed,
            window=window,
            packing=self.packing,
            state=state,
        )
        super().__init__(order, samples=samples, first_sample=first_sample)

    def units(self, examples: Examples) -> np.ndarray:
        """Positions of what is packed as one; int[units]."""
        return examples.lengths

    def __getitem__(self, item: int | SequencePlan) -> dict[str, Tensor]:
        """int64 `tokens`, `labels`, `position_ids` and float32 `loss_mask`, each [sequence]."""
        plan = self.plan_of(item)
        arrays = fill_sequence(
            self.examples,
            plan.examples,
            length=self.packing.sequence_length,
            multiple=self.packing.document_multiple,
            pad_id=self.pad_id,
        )
        return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _check(units: np.ndarray, largest: int, packing: Packing, vocab_size: int) -> None:
    problems = []
    longest = int(units.max())
    if padded(longest, packing.document_multiple) > packing.sequence_length:
        padding = f", padded to {packing.document_multiple}" * (packing.document_multiple > 1)
        problems.append(
            f"an example has {longest:,} tokens{padding}, and training.sequence_length is "
            f"{packing.sequence_length:,}: set max_tokens to at most that"
        )
    if packing.sequence_length % packing.document_multiple:
        problems.append(
            f"training.sequence_length={packing.sequence_length:,} is no multiple of "
            f"document_multiple={packing.document_multiple}: what is left of a sequence is padded "
            "to one, too; make it a multiple"
        )
    if largest >= vocab_size:
        problems.append(
            f"the examples hold the token id {largest:,}, but the model's vocabulary has "
            f"{vocab_size:,} tokens: set model.vocab_size to at least the tokenizer's"
        )
    if problems:
        raise ConfigError(problems, source="conversations")
