"""When too much went wrong while judging: the share of the last judgements that failed."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any


class TooManyErrorsError(RuntimeError):
    """Judging failed too often. `scored` is what the last batch got all the same."""

    is_told = True  # it says by itself what to do

    def __init__(self, message: str, scored: Sequence[Any] = ()) -> None:
        super().__init__(message)
        self.scored = list(scored)


class ErrorShare:
    """Counts failures among the last `window` judgements, or a batch's if it has more."""

    def __init__(self, most: float, window: int, *, unit: str = "texts") -> None:
        self._most, self._window, self._unit = most, window, unit
        self._failed: deque[bool] = deque()

    def problem(self, failed: Sequence[bool]) -> str | None:
        """Count these; in words, that there are too many, if there are."""
        window = max(self._window, len(failed))
        self._failed.extend(failed)
        while len(self._failed) > window:
            self._failed.popleft()
        count = sum(self._failed)
        if count <= self._most * window:
            return None
        return (
            f"{count} of the last {len(self._failed)} {self._unit} had the verdict error, more "
            f"than max_error_share={self._most:g} of {window}"
        )
