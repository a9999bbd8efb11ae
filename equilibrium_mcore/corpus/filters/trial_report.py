"""A trial of filters as a table for the terminal, as Markdown, or as JSON."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence

from equilibrium_mcore.corpus.filters.trial import FilterStage, Trial
from equilibrium_mcore.files.tables import markdown_table, markdown_text, terminal_table

COLUMNS = ("filter", "reached", "kept", "dropped", "share", "changed", "characters", "ms/document")
REASON_COLUMNS = ("filter", "reason", "documents", "beginning of the first")
SAMPLE_NOTE = (
    "Deduplication saw a sample only: in the whole file a document meets more others, so more "
    "are dropped. Use --sample 0."
)


def as_table(trial: Trial) -> str:
    """Columns aligned with spaces; reasons with examples below."""
    table = terminal_table(COLUMNS, map(_cells, trial.stages), align="lr")
    lines = [_headline(trial), "", table]
    for stage in trial.stages:
        for reason, entry in _by_size(stage):
            lines += ["", f"{stage.type}: {reason}: {entry.documents:,}"]
            lines += [f"    {example}" for example in entry.examples]
    return "\n".join([*lines, *_notes(trial)]) + "\n"


def as_markdown(trial: Trial) -> str:
    """The same as Markdown."""
    rows = [[markdown_text(cell) for cell in _cells(stage)] for stage in trial.stages]
    lines = [_headline(trial), "", markdown_table(COLUMNS, rows, align="lr")]
    reasons = [
        (
            stage.type,
            markdown_text(reason),
            f"{entry.documents:,}",
            markdown_text(next(iter(entry.examples), "")),
        )
        for stage in trial.stages
        for reason, entry in _by_size(stage)
    ]
    if reasons:
        lines += ["", markdown_table(REASON_COLUMNS, reasons, align="llrl")]
    return "\n".join([*lines, *_notes(trial)]) + "\n"


def as_json(trial: Trial) -> str:
    """The same for programs, with every example."""
    stages = [
        {
            "type": stage.type,
            "settings": stage.settings,
            "reached": stage.reached,
            "kept": stage.kept,
            "dropped": stage.dropped,
            "reasons": {
                reason: {"documents": entry.documents, "examples": entry.examples}
                for reason, entry in _by_size(stage)
            },
            "changed": stage.changed,
            "characters_removed": stage.characters_removed,
            "milliseconds_per_document": round(stage.milliseconds_per_document, 4),
        }
        for stage in trial.stages
    ]
    values = {
        "path": str(trial.path),
        "documents_in_file": trial.documents_in_file,
        "sampled": trial.sampled,
        "characters": trial.characters,
        "kept": trial.kept,
        "characters_kept": trial.characters_kept,
        "filters": stages,
        "notes": trial.notes,
    }
    return json.dumps(values, indent=2, ensure_ascii=False) + "\n"


FORMATS: dict[str, Callable[[Trial], str]] = {
    "table": as_table,
    "markdown": as_markdown,
    "json": as_json,
}


def _cells(stage: FilterStage) -> Sequence[str]:
    settings = ", ".join(f"{key}={_short(value)}" for key, value in stage.settings.items())
    return (
        f"{stage.type} {settings}".strip(),
        f"{stage.reached:,}",
        f"{stage.kept:,}",
        f"{stage.dropped:,}",
        f"{stage.dropped / max(stage.reached, 1):.1%}",
        f"{stage.changed:,}",
        f"{-stage.characters_removed:+,}" if stage.characters_removed else "0",
        f"{stage.milliseconds_per_document:.3f}",
    )


def _headline(trial: Trial) -> str:
    share = trial.kept / trial.sampled
    characters = trial.characters_kept / max(trial.characters, 1)
    return (
        f"{trial.path}: {trial.sampled:,} of {trial.documents_in_file:,} documents tried; "
        f"{trial.kept:,} kept ({share:.1%}), with {characters:.1%} of the characters"
    )


def _notes(trial: Trial) -> list[str]:
    notes = [*trial.notes, *([SAMPLE_NOTE] if trial.looks_across_a_sample else [])]
    return [line for note in notes for line in ("", note)]


def _by_size(stage: FilterStage) -> list:
    return sorted(stage.reasons.items(), key=lambda item: -item[1].documents)


def _short(value: object) -> str:
    text = json.dumps(value, ensure_ascii=False) if not isinstance(value, str) else value
    return text if len(text) <= 40 else f"{text[:37]}..."
