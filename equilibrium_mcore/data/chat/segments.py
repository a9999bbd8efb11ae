"""A conversation as segments: who said it, its ids, and whether the model is to produce them.

Ids are made here, once: what packs, trains and scores takes them as they are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

ROLES = ("system", "user", "assistant", "tool")
ROLE_NAMES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    "tool": "tool",
    "function": "tool",
    "ipython": "tool",
}
"""What data sets call the roles, and the role that each name means."""


class Turn(NamedTuple):
    """One turn of a conversation; `trained` is whether an assistant's turn counts in the loss."""

    role: str
    content: str
    trained: bool = True


@dataclass(frozen=True)
class Segment:
    """Ids that belong together.

    Attributes:
        role: whose turn it is, or None for what stands before all turns.
        ids: token ids.
        produced: whether the model is to produce them.
    """

    role: str | None
    ids: tuple[int, ...]
    produced: bool = False


def joined(segments: Sequence[Segment]) -> tuple[np.ndarray, np.ndarray]:
    """`ids` int32[n] and `produced` bool[n] of the segments, in order."""
    ids = np.fromiter((i for segment in segments for i in segment.ids), np.int32)
    produced = np.repeat(
        np.array([segment.produced for segment in segments], bool),
        [len(segment.ids) for segment in segments],
    )
    return ids, produced
