"""What is asked of an engine, and what it answers.

Ids are made once: a rollout's are the very array that training learns from; no text between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from typing import Literal, Protocol

import numpy as np

Finish = Literal["end", "length"]


@dataclass(frozen=True)
class Prompt:
    """`ids` int32 [n], n >= 1; `key`, 64 bits, is what its sampling noise is drawn from."""

    ids: np.ndarray
    key: int

    @classmethod
    def of(cls, ids: Sequence[int] | np.ndarray) -> Prompt:
        """A prompt whose key is the hash of its ids: alike wherever it stands in the data."""
        array = np.ascontiguousarray(ids, dtype="<i4")
        return cls(
            array, int.from_bytes(blake2b(array.tobytes(), digest_size=8).digest(), "little")
        )


@dataclass(frozen=True)
class Request:
    """An answer that is wanted: `sample` numbers the answers to one prompt, from 0."""

    prompt: Prompt
    sample: int = 0


@dataclass(frozen=True)
class Sampling:
    """How a token is chosen.

    Of logits / `temperature`, among the `top_k` likeliest (0: all) and then the fewest whose
    probabilities sum to `top_p`. A temperature of 0 takes the likeliest. Rows that only pad the
    vocabulary are never chosen. An answer ends with one of `stop_ids`, which it keeps, or at
    `max_new_tokens`.
    """

    seed: int
    max_new_tokens: int
    stop_ids: tuple[int, ...]
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0


@dataclass(frozen=True)
class Rollout:
    """An answer: `ids` int32 [m], what was produced, the stop id with it.

    `logprobs` float32 [m]: of each, in the distribution that it was drawn from (after temperature
    and support; at temperature 0, of the plain logits). `support`, with top-k or top-p: of each
    position the ids that could be drawn, int32, ascending; else None. `version` is the policy's, as
    the caller counts it.
    """

    request: Request
    ids: np.ndarray
    logprobs: np.ndarray
    finish: Finish
    version: int
    support: tuple[np.ndarray, ...] | None = None


class Engine(Protocol):
    """Answers requests. Collective: every rank asks the same, and every rank gets all answers."""

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, *, version: int = 0
    ) -> list[Rollout]:
        """One rollout for each request, in their order, whatever the layout."""
