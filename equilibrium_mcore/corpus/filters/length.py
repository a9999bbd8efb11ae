"""Length in characters, words or tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from equilibrium_mcore.config.filters import LengthConfig
from equilibrium_mcore.corpus.filters.base import DocumentFilter, Dropped
from equilibrium_mcore.data.tokenizer import Tokenizer


class LengthFilter(DocumentFilter):
    """Drops documents outside of [min_length, max_length]; both bounds are kept."""

    name = "length"

    def __init__(self, config: LengthConfig, *, tokenizer: Tokenizer | None = None) -> None:
        """Raises ValueError when tokens are to be counted and there is no tokenizer."""
        if config.unit == "tokens" and tokenizer is None:
            raise ValueError(
                "filter length: unit='tokens' needs a tokenizer; name one, or count characters"
            )
        count: dict[str, Callable[[str], int]] = {
            "characters": len,
            "words": lambda text: len(text.split()),
            "tokens": lambda text: len(tokenizer.encode(text)),
        }
        self._count = count[config.unit]
        self._least = config.min_length or 0
        self._most = float("inf") if config.max_length is None else config.max_length
        self._too_short = Dropped(f"fewer than {config.min_length} {config.unit}")
        self._too_long = Dropped(f"more than {config.max_length} {config.unit}")

    def apply(self, text: str, fields: Mapping[str, Any]) -> str | Dropped:
        """See DocumentFilter."""
        length = self._count(text)
        if length < self._least:
            return self._too_short
        return self._too_long if length > self._most else text
