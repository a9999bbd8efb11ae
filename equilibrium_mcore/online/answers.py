"""Answers as updates take them, packed into sequences, and as plain values for a checkpoint."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from equilibrium_mcore.data.chat.examples import Example, Examples
from equilibrium_mcore.data.chat.fill import fill_sequence, first_fit_decreasing, padded
from equilibrium_mcore.models.support import SUPPORT, Support


@dataclass(frozen=True)
class Answer:
    """A prompt with one answer to it: `ids` int32 [p + m], the very ones that were sampled.

    `values` by name are float32 [m], one of each produced token. `counts` is whether the loss has
    it. `group` is the place of its prompt in the rollout. `support`: see `Rollout`.
    """

    ids: np.ndarray
    prompt_length: int
    group: int
    counts: bool = True
    values: Mapping[str, np.ndarray] = field(default_factory=dict)
    support: tuple[np.ndarray, ...] | None = None

    @property
    def length(self) -> int:
        """Produced tokens."""
        return len(self.ids) - self.prompt_length

    def with_values(self, **values: np.ndarray) -> Answer:
        """With further values, or others."""
        return replace(self, values={**self.values, **values})

    def as_plain(self) -> dict[str, Any]:
        """Values that JSON keeps to the bit."""
        support = None
        if self.support is not None:
            support = {
                "ids": _text_of(np.concatenate(self.support), "<i4"),
                "counts": _text_of(np.array([len(ids) for ids in self.support]), "<i4"),
            }
        return {
            "ids": _text_of(self.ids, "<i4"),
            "prompt_length": self.prompt_length,
            "group": self.group,
            "counts": self.counts,
            "values": {name: _text_of(array, "<f4") for name, array in self.values.items()},
            "support": support,
        }

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Answer:
        """What `as_plain` was made of."""
        values = {name: _array_of(text, "<f4") for name, text in plain["values"].items()}
        support = plain.get("support")  # checkpoints of before have none
        if support is not None:
            ids, counts = (_array_of(support[name], "<i4") for name in ("ids", "counts"))
            support = tuple(np.split(ids, counts.cumsum()[:-1]))
        ids = _array_of(plain["ids"], "<i4")
        return cls(**{**plain, "ids": ids, "values": values, "support": support})


def _text_of(array: np.ndarray, kind: str) -> str:
    return base64.b64encode(np.ascontiguousarray(array, kind).tobytes()).decode("ascii")


def _array_of(text: str, kind: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), kind)


class Place(NamedTuple):
    """Where an answer's tokens are predicted: sequence, first position, and how many."""

    sequence: int
    start: int
    length: int


class Packed(NamedTuple):
    """Sequences of answers: tensors [length] by name, where answers were drawn from a part of the
    vocabulary also a `Support` of length tokens; and each answer's place in them."""

    sequences: list[dict[str, Tensor | Support]]
    places: list[Place]


def pack(
    answers: Sequence[Answer],
    *,
    length: int,
    multiple: int,
    pad_id: int,
    at_once: int,
    together: int = 1,
) -> Packed:
    """Answers in sequences of `length` tokens, each padded to a multiple of `multiple`.

    Sequences hold `tokens`, `labels`, `position_ids`, `loss_mask` as `fill_sequence` makes them,
    and every value of the answers at the positions whose label it is of, and so the support. Their
    number is filled up to a multiple of `at_once` by sequences in which nothing counts. Of the
    answers each `together` after each other lie side by side in one sequence.
    """
    examples = Examples.of([_example(answer) for answer in answers])
    lengths = padded(examples.lengths.astype(np.int64), multiple).reshape(-1, together).sum(axis=1)
    bins = [
        [unit * together + side for unit in units for side in range(together)]
        for units in first_fit_decreasing(lengths, length)
    ]
    sequences: list[dict[str, Tensor | Support]] = []
    places: dict[int, Place] = {}
    for numbers in [*bins, *[[]] * (-len(bins) % at_once)]:
        arrays = fill_sequence(examples, numbers, length=length, multiple=multiple, pad_id=pad_id)
        arrays |= {name: np.zeros(length, np.float32) for name in answers[0].values}
        start = 0
        kept: dict[int, np.ndarray] = {}
        for number in numbers:
            answer = answers[number]
            first = start + answer.prompt_length - 1
            here = slice(first, first + answer.length)
            for name, values in answer.values.items():
                arrays[name][here] = values
            kept |= dict(enumerate(answer.support or (), start=first))
            places[number] = Place(len(sequences), first, answer.length)
            start += int(padded(len(answer.ids), multiple))
        sequences.append({name: torch.from_numpy(array) for name, array in arrays.items()})
        if any(answer.support is not None for answer in answers):
            sequences[-1][SUPPORT] = _support_of(kept, length)
    return Packed(sequences, [places[number] for number in range(len(answers))])


def _support_of(kept: Mapping[int, np.ndarray], length: int) -> Support:
    """Of `length` tokens, those of `kept` by position, in ascending order."""
    counts = torch.zeros(length, dtype=torch.int64)
    for position, ids in kept.items():
        counts[position] = len(ids)
    ids = np.concatenate([np.zeros(0, np.int32), *(kept[p] for p in sorted(kept))])
    return Support(torch.from_numpy(ids), counts)


def _example(answer: Answer) -> Example:
    produced = np.arange(len(answer.ids)) >= answer.prompt_length
    return Example(answer.ids, produced & answer.counts, "", 0)


def batches_of_rank(
    sequences: Sequence[Mapping[str, Tensor | Support]], *, size: int, rank: int, ranks: int
) -> list[dict[str, Any]]:
    """A data rank's micro-batches of `size` sequences, in the order of `data/samples.py`."""
    starts = range(rank * size, len(sequences), ranks * size)
    return [_stacked(sequences[start : start + size]) for start in starts]


def _stacked(sequences: Sequence[Mapping[str, Tensor | Support]]) -> dict[str, Any]:
    return {
        name: (Support.joined if name == SUPPORT else torch.stack)([one[name] for one in sequences])
        for name in sequences[0]
    }
