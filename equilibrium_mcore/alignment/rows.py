"""A prompt with the answers of both models: what a line of `answers.jsonl` holds."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class Row:
    """A prompt with both answers, and what was found of them.

    `kl` is the mean over the answer's tokens of KL(AFTER || BEFORE) in nats, of the whole
    distribution before each token of AFTER's own answer; None where it was not measured.
    """

    prompt: str
    kind: str
    before: str
    after: str
    before_manner: str
    after_manner: str
    before_finished: bool
    after_finished: bool
    tokens: int  # of AFTER's answer
    kl: float | None = None
    before_score: float | None = None
    after_score: float | None = None
    preference: str | None = None  # before, after, tie, error; None where no judge was asked
    swayed: bool = False

    def as_dict(self) -> dict[str, Any]:
        """As a line of `answers.jsonl` has it."""
        return asdict(self)
