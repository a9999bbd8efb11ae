"""How the next token is chosen; plain values, which nothing heavy is needed for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen; temperature 0 takes the likeliest."""

    temperature: float = 0.7
    top_p: float = 0.9
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        """Raises ValueError for what no token could be chosen with."""
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature:g}: it is 0 (the likeliest) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p:g}: it is more than 0, and 1 at most")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}: it is 1 or more")

    def settings(self) -> dict[str, Any]:
        """As `generate` of transformers takes them."""
        chosen: dict[str, Any] = {"do_sample": False}
        if self.temperature:
            chosen = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}
        return {**chosen, "max_new_tokens": self.max_new_tokens}
