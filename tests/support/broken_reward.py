"""A reward that always fails; its worker imports nothing else."""

from __future__ import annotations

from typing import Any


def breaks(*, prompt: str, text: str, truth: Any) -> float:
    """A verifier that cannot judge."""
    raise ZeroDivisionError("the verifier is broken")
