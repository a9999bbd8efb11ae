"""An analysis as Markdown, CSV and JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

from equilibrium_mcore.corpus.mixtures.analyze import MixtureAnalysis, SourceAnalysis
from equilibrium_mcore.files.tables import csv_table, markdown_table

Columns = list[tuple[str, Callable[[SourceAnalysis], Any], str]]
"""Heading, value, and its format."""

SHARES: Columns = [
    ("dataset", lambda s: s.name, "s"),
    ("expected share", lambda s: s.expected_share, ".4f"),
    ("training share", lambda s: s.training_share, ".4f"),
    ("share on disk", lambda s: s.prepared_share, ".4f"),
    ("expected", lambda s: s.expected_tokens, ",.0f"),
    ("on disk, training", lambda s: s.train_tokens, ",d"),
    ("held out", lambda s: s.validation_tokens, ",d"),
    ("epochs", lambda s: s.epochs, ".2f"),
    ("most epochs", lambda s: s.max_epochs, "g"),
]
KEPT: Columns = [
    ("dataset", lambda s: s.name, "s"),
    ("rows read", lambda s: s.rows, ",d"),
    ("dropped", lambda s: sum(s.dropped.values()), ",d"),
    ("not needed", lambda s: s.not_needed, ",d"),
    ("documents", lambda s: s.documents, ",d"),
    ("repeats left, own", lambda s: s.duplicates.get("within"), ",d"),
    ("repeats left, others", lambda s: s.duplicates.get("across"), ",d"),
]
LENGTHS: Columns = [
    ("dataset", lambda s: s.name, "s"),
    ("mean", lambda s: s.lengths.mean, ",.1f"),
    ("least", lambda s: s.lengths.smallest, ",d"),
    ("5 %", lambda s: s.lengths.quantiles.get("0.05"), ",d"),
    ("median", lambda s: s.lengths.quantiles.get("0.5"), ",d"),
    ("95 %", lambda s: s.lengths.quantiles.get("0.95"), ",d"),
    ("most", lambda s: s.lengths.largest, ",d"),
    ("longer than a sequence", lambda s: s.lengths.longer_than_sequence, ",d"),
]
TOKENS: Columns = [
    ("dataset", lambda s: s.name, "s"),
    ("tokens counted", lambda s: s.tokens.counted, ",d"),
    ("distinct", lambda s: s.tokens.distinct, ",d"),
    ("of the vocabulary", lambda s: s.tokens.distinct / s.tokens.vocabulary, ".1%"),
    ("entropy, bits", lambda s: s.tokens.entropy_bits, ".2f"),
    ("most frequent", lambda s: " ".join(text for text, _ in s.top_tokens[:5]), "s"),
]


def markdown(analysis: MixtureAnalysis, *, cost: Sequence[str] = (), pictures=()) -> str:
    """The whole report."""
    total = "all there is" if analysis.total is None else f"{analysis.total:,} {analysis.unit}"
    parts = [f"# {analysis.name}", f"Phase {analysis.phase}; trains on {total}."]
    parts += [f"- {note}" for note in analysis.notes]
    parts += ["## Shares", table(analysis.sources, SHARES)]
    if analysis.prepared:
        parts += ["## Kept and dropped", table(analysis.sources, KEPT)]
        reasons = _reasons(analysis)
        if reasons:
            parts.append(reasons)
        unit = "tokens" if analysis.unit == "tokens" else "characters of a line"
        parts += [f"## Lengths of documents, in {unit}", table(analysis.sources, LENGTHS)]
        if analysis.unit == "tokens":
            parts += ["## Tokens", table(analysis.sources, TOKENS)]
    if cost:
        parts += ["## Time and cost", "\n".join(f"- {line}" for line in cost)]
    parts += [f"![{name}]({name})" for name in pictures]
    return "\n\n".join(parts) + "\n"


def table(sources: Sequence[SourceAnalysis], columns: Columns) -> str:
    """A Markdown table; columns that nothing fills are left out."""
    filled = [c for c in columns if any(c[1](source) is not None for source in sources)]
    rows = [[_cell(value(source), form) for _, value, form in filled] for source in sources]
    sides = "".join("l" if form == "s" else "r" for _, _, form in filled)
    return markdown_table([heading for heading, _, _ in filled], rows, align=sides)


def csv_text(analysis: MixtureAnalysis) -> str:
    """One line per dataset, with plain numbers."""
    columns = [*SHARES]
    if analysis.prepared:
        columns += [*KEPT[1:], *LENGTHS[1:]]
        columns += TOKENS[1:-1] if analysis.unit == "tokens" else []
    head = [heading.replace(" ", "_").replace(",", "") for heading, _, _ in columns]
    rows = ([value(source) for _, value, _ in columns] for source in analysis.sources)
    return csv_table(head, rows)


def json_text(analysis: MixtureAnalysis, *, cost: dict[str, Any] | None = None) -> str:
    """Everything, the cost included."""
    values = {**analysis.values(), "training_cost": cost}
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


def _reasons(analysis: MixtureAnalysis) -> str:
    rows = [
        (source.name, reason, f"{count:,}", f"{count / max(source.rows, 1):.1%}")
        for source in analysis.sources
        for reason, count in sorted(source.dropped.items(), key=lambda item: (-item[1], item[0]))
    ]
    head = ("dataset", "reason", "documents", "of rows")
    return markdown_table(head, rows, align="llr") if rows else ""


def _cell(value: Any, form: str) -> str:
    if value is None:
        return "-"
    return format(value, form) if form != "s" else str(value)
