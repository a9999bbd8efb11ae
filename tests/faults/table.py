"""Counts of a campaign by kind, as Markdown."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

OUTCOMES = ("held", "broken", "skipped")


def newest(results: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """Of every case the last line: one that broke may have been done again after a mend."""
    return list({(r["seed"], r["kind"], r["number"]): r for r in results}.values())


def table(results: Iterable[Mapping[str, Any]]) -> str:
    """A row per kind: accidents whose promises held or broke, and those that were skipped."""
    counts: dict[str, Counter] = {}
    for result in newest(results):
        counts.setdefault(result["kind"], Counter())[result["outcome"]] += result["count"]
    rows = [
        f"| {kind} | " + " | ".join(str(of[o]) for o in OUTCOMES) + " |"
        for kind, of in counts.items()
    ]
    return "\n".join(["| accidents | held | broken | skipped |", "|---|---:|---:|---:|", *rows])
