"""Examples packed into sequences of a fixed number of tokens.

First-fit decreasing: the longest first, each into the first sequence that has room for it. Every
example is a document of its own: positions begin at 0, and no label belongs to the next one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from equilibrium_mcore.data.chat.examples import Examples


def padded[Count: (int, np.ndarray)](lengths: Count, multiple: int) -> Count:
    """The next multiples from `lengths` on."""
    return -(-lengths // multiple) * multiple


def first_fit_decreasing(lengths: np.ndarray, capacity: int) -> list[list[int]]:
    """Places of `lengths`, in bins that hold at most `capacity` each.

    Of equal lengths the earlier place is packed first. Raises ValueError for a length beyond
    `capacity`.
    """
    bins: list[list[int]] = []
    room = np.full(len(lengths), capacity)
    for place in np.argsort(-lengths, kind="stable").tolist():
        length = lengths[place]
        if length > capacity:
            raise ValueError(f"an example of {length} tokens does not fit into {capacity}")
        chosen = int((room >= length).argmax())  # the bins not yet begun have room for all
        if chosen == len(bins):
            bins.append([])
        bins[chosen].append(place)
        room[chosen] -= length
    return bins


def fill_sequence(
    examples: Examples, numbers: Sequence[int], *, length: int, multiple: int, pad_id: int
) -> dict[str, np.ndarray]:
    """One sequence of examples, and padding.

    Returns int64 `tokens`, `labels`, `position_ids` and float32 `loss_mask`, each [length].
    `loss_mask[t]` is the example's weight where the model is to produce `tokens[t + 1]` of the same
    example, else 0. Each example is padded to a multiple of `multiple` by its last token; what is
    left of the sequence is a document of `pad_id`.
    """
    tokens = np.full(length + 1, pad_id, np.int64)
    mask, positions = np.zeros(length, np.float32), np.zeros(length, np.int64)
    start = 0
    for number in numbers:
        example = examples[number]
        count = len(example.ids)
        end = start + padded(count, multiple)
        tokens[start : start + count] = example.ids
        tokens[start + count : end] = example.ids[-1]
        mask[start : start + count - 1] = example.produced[1:] * np.float32(example.weight)
        positions[start:end] = np.arange(end - start)
        start = end
    positions[start:] = np.arange(length - start)
    return {
        "tokens": tokens[:-1].copy(),
        "labels": tokens[1:].copy(),
        "position_ids": positions,
        "loss_mask": mask,
    }
