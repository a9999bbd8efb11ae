"""What epochs of examples come to: sequences, tokens, and how well these fill those."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from equilibrium_mcore.data.chat.examples import Examples
from equilibrium_mcore.data.chat.order import ExampleOrder, Packing


@dataclass(frozen=True)
class PackedEpoch:
    """One epoch, packed.

    Attributes:
        examples, sequences: how many.
        tokens: of the examples; `produced` of them are the assistant's.
        positions: of the sequences, padding counted.
    """

    examples: int
    sequences: int
    tokens: int
    produced: int
    positions: int

    @property
    def efficiency(self) -> float:
        """The share of positions that hold a token of an example."""
        return self.tokens / self.positions

    def __str__(self) -> str:
        return (
            f"an epoch: {self.examples:,} examples in {self.sequences:,} sequences "
            f"({self.examples / self.sequences:.1f} each), {self.tokens:,} tokens in "
            f"{self.positions:,} positions ({self.efficiency:.1%}), {self.produced:,} of them the "
            "assistant's"
        )


def packed_epoch(
    examples: Examples,
    units: np.ndarray,
    *,
    every: int = 1,
    seed: int,
    window: int,
    packing: Packing,
) -> PackedEpoch:
    """The first epoch. Others differ by a few sequences.

    `units` are the positions of what is packed as one: of examples, or of pairs. Of so many
    examples in a row as `every` says, the first alone is trained on.
    """
    sequences = count_sequences(units, epochs=1, seed=seed, window=window, packing=packing)
    return PackedEpoch(
        examples=len(examples) // every,
        sequences=sequences,
        tokens=int(examples.lengths[::every].sum()),
        produced=int(
            np.add.reduceat(examples.produced, examples.starts[:-1], dtype=int)[::every].sum()
        ),
        positions=sequences * packing.sequence_length,
    )


def count_sequences(
    units: np.ndarray, *, epochs: float, seed: int, window: int, packing: Packing
) -> int:
    """Sequences that the first `epochs` epochs make; a part of an epoch is rounded up."""
    order = ExampleOrder(units, "", seed=seed, window=window, packing=packing)
    total = 0
    for number in range(math.ceil(epochs)):
        sequences = _next_epoch(order)
        total += math.ceil(sequences * min(1.0, epochs - number))
    return total


def _next_epoch(order: ExampleOrder) -> int:
    sequences = 0
    while sequences == 0 or not order.between_epochs:
        order.skip(1)
        sequences += 1
    return sequences
