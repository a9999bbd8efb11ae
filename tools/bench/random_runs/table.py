"""The results of a campaign as Markdown."""

from __future__ import annotations

import json
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable

from equilibrium_mcore.files.tables import markdown_table
from tools.bench.random_runs.cases import CRASH, HANG, OUTCOMES, TOOL, Result

BAD = (OUTCOMES[1], CRASH, HANG)
MANY = 12  # values of a setting beyond which only their number is shown


def as_markdown(results: Iterable[Result], *, seed: int) -> str:
    """Outcomes, refusals, worst differences by optimizer, failures, coverage."""
    results = sorted(results, key=lambda result: result.number)
    parts = [
        _outcomes(results),
        _differences(results),
        _failures(results, seed),
        _refusals(results),
        _coverage(results),
    ]
    return "\n\n".join(part for part in parts if part)


def _outcomes(results: list[Result]) -> str:
    counts = Counter(result.outcome for result in results)
    order = [OUTCOMES[0], *BAD, OUTCOMES[2]]
    rows = [(outcome, counts[outcome]) for outcome in order]
    layouts = len({result.layout for result in results})
    heading = f"{len(results)} random twins in {layouts} layouts"
    return f"{heading}\n\n" + markdown_table(("outcome", "cases"), rows)


def _differences(results: list[Result]) -> str:
    """The worst of every quantity that rounding may touch, by the matrices' optimizer."""
    worst: dict[str, dict[str, float]] = defaultdict(dict)
    allowed: dict[str, float] = {}
    for result in results:
        for what, (difference, tolerance) in result.differences.items():
            if tolerance:
                seen = worst[what].get(result.optimizer, 0.0)
                worst[what][result.optimizer] = max(seen, _number(difference))
                allowed[what] = max(allowed.get(what, 0.0), tolerance)
    optimizers = sorted({result.optimizer for result in results if result.differences})
    rows = [
        (what, *(f"{found[o]:.1e}" if o in found else "" for o in optimizers), f"{allowed[what]:g}")
        for what, found in worst.items()
    ]
    head = ("worst relative difference", *optimizers, "widest tolerance")
    return rows and markdown_table(head, rows)


def _number(value: float) -> float:
    return math.inf if math.isnan(value) else value


def _failures(results: list[Result], seed: int) -> str:
    rows = [
        (
            r.number,
            r.outcome,
            r.layout,
            r.optimizer,
            r.threads,
            r.detail,
            f"`python {TOOL} --seed {seed} --case {r.number}`",
        )
        for r in results
        if r.outcome != OUTCOMES[0]
    ]
    heads = ("case", "outcome", "layout", "optimizer", "threads", "what", "again")
    return rows and markdown_table(heads, rows)


def _refusals(results: list[Result]) -> str:
    reasons = Counter(_rule(text) for result in results for text in result.refused)
    proposals = len(results) + reasons.total()
    heading = f"Of {proposals} proposals {reasons.total()} were refused by rules, and drawn again"
    return f"{heading}\n\n" + markdown_table(("refused", "times"), reasons.most_common())


def _rule(text: str) -> str:
    """A refusal without its values: the keys that it speaks of first."""
    keys = re.findall(r"\b(?:model|data|parallelism|optimizer|training)\.[a-z_.]*[a-z]", text)
    return ", ".join(list(dict.fromkeys(keys))[:2]) or text[:60]


def _coverage(results: list[Result]) -> str:
    """Which values of every setting ran, and how often."""
    seen: dict[str, Counter] = defaultdict(Counter)
    for result in results:
        for key, value in result.drawn.items():
            seen[key][json.dumps(value)] += 1
    rows = [(f"`{key}`" if "." in key else key, _values(counts)) for key, counts in seen.items()]
    return markdown_table(("setting", "values, and how many cases had them"), rows)


def _values(counts: Counter) -> str:
    if len(counts) > MANY:
        return f"{len(counts)} different ones"
    text = ", ".join(f"{value} ({times})" for value, times in counts.most_common())
    return text
