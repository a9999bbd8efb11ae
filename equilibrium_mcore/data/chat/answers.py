"""Packed answers: which label belongs to which answer of a sequence, and what is said of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from equilibrium_mcore.data.chat.dataset import ConversationDataset
from equilibrium_mcore.data.chat.examples import Examples
from equilibrium_mcore.data.chat.fill import fill_sequence, padded
from equilibrium_mcore.data.chat.order import SequencePlan

NO_PLACE = -1


def fill_answers(
    examples: Examples, numbers: Sequence[int], *, length: int, multiple: int, pad_id: int
) -> dict[str, np.ndarray]:
    """`fill_sequence`, and of every position, [length]:

    answer (int64): 0 where nothing counts, else 1 + the place in `numbers` of the example of which
        its label is a token that the model is to produce.
    label_place (int64): where its label stands in `examples.ids`; NO_PLACE where it is none of an
        example.
    and each of `examples.judged` by its name (float32), at all positions of its example.
    """
    arrays = fill_sequence(examples, numbers, length=length, multiple=multiple, pad_id=pad_id)
    answer, place = np.zeros(length, np.int64), np.full(length, NO_PLACE, np.int64)
    judged = {name: np.zeros(length, np.float32) for name in examples.judged}
    start = 0
    for index, number in enumerate(numbers, start=1):
        tokens = int(examples.lengths[number])
        end = start + int(padded(tokens, multiple))
        answer[start:end] = index
        first = int(examples.starts[number]) + 1
        place[start : start + tokens - 1] = np.arange(first, first + tokens - 1)
        for name, values in judged.items():
            values[start:end] = examples.judged[name][number]
        start = end
    return {**arrays, "answer": answer * (arrays["loss_mask"] > 0), "label_place": place, **judged}


class AnswerDataset(ConversationDataset):
    """Sequences of answers that are compared or judged."""

    first_place = 0
    """What is added to `label_place`, where another dataset's come before."""

    def answers(self, numbers: Sequence[int]) -> dict[str, Tensor]:
        """`fill_answers` of the dataset's examples of these numbers."""
        arrays = fill_answers(
            self.examples,
            numbers,
            length=self.packing.sequence_length,
            multiple=self.packing.document_multiple,
            pad_id=self.pad_id,
        )
        place = arrays["label_place"]
        arrays["label_place"] = np.where(place < 0, place, place + self.first_place)
        return {name: torch.from_numpy(array) for name, array in arrays.items()}

    def plans_in_order(self) -> Iterator[SequencePlan]:
        """Every example once, in the order of the data, in as few sequences as that allows."""
        multiple, room, taken = self.packing.document_multiple, 0, []
        for number, size in enumerate(padded(self.units(self.examples), multiple).tolist()):
            if taken and size > room:
                yield SequencePlan(0, tuple(taken))
                taken = []
            if not taken:
                room = self.packing.sequence_length
            taken.append(number)
            room -= size
        yield SequencePlan(0, tuple(taken))
