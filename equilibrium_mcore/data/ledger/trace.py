"""When a run read a given document: the way back from a text to its steps."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.data.ledger.record import Mark, StepInterval, ledger_behind
from equilibrium_mcore.data.ledger.source import START, SourceDocuments


def readings(segments: list[StepInterval], name: str, document: int) -> dict[str, Any]:
    """Where document number `document` of source `name` was read, up to the last saved state.

    `read` has per piece the epoch, step, sample within the step's batch, offset and tokens. Only
    steps between two saved states are replayed in which the document was begun or under way.
    Raises ConfigError for a source or a document that the run never had for training.
    """
    found: list[dict[str, Any]] = []
    tokens = None
    for segment, last in _with_ends(segments):
        names = [source["name"] for source in segment.settings["sources"]]
        if name not in names:
            continue
        ledger = ledger_behind(segment, segment.first.step)
        source = ledger.cursor.sources[names.index(name)]
        if not source.begin <= document < source.end:
            raise ConfigError(
                f"--document {name}:{document}: training has the documents {source.begin} to "
                f"{source.end - 1} of {name} (split {segment.settings['split']})"
            )
        tokens = source.length(document)
        for before, after in pairwise((*segment.marks, *last)):
            if _passes(source, document, before, after):
                found += _replay(segment, names.index(name), document, before, after)
    if tokens is None:
        known = sorted({s["name"] for segment in segments for s in segment.settings["sources"]})
        raise ConfigError(f"--document {name}:{document}: the sources are {', '.join(known)}")
    return {"source": name, "document": document, "tokens": tokens, "read": found}


def _with_ends(segments: list[StepInterval]) -> list[tuple[StepInterval, tuple[Mark, ...]]]:
    """Each segment with the state that the next one starts from; the last ends at its last mark."""
    ends = [(following.first,) for following in segments[1:]]
    return list(zip(segments, [*ends, ()], strict=True))


def _passes(source: SourceDocuments, document: int, before: Mark, after: Mark) -> bool:
    """Whether the document may have been read between two states."""
    start, end = (mark.state["cursors"].get(source.name) for mark in (before, after))
    if end is None:
        return False
    if start is not None and any(held[2] == document for held in start["held"]):
        return True
    begins, ends = (
        (cursor["epoch"], cursor["position"]) if cursor else START for cursor in (start, end)
    )
    return any(
        begins <= (epoch, source.position_of(document, epoch)) < ends
        for epoch in range(begins[0], ends[0] + 1)
    )


def _replay(
    segment: StepInterval, place: int, document: int, before: Mark, after: Mark
) -> list[dict[str, Any]]:
    ledger = ledger_behind(segment, before.step)
    found = []
    for step in range(before.step + 1, after.step + 1):
        for sample in range(segment.settings["global_batch_size"]):
            plan = ledger.take()
            if plan.source == place:
                found += [
                    {
                        "epoch": span.epoch,
                        "step": step,
                        "sample": sample,
                        "offset": span.offset,
                        "tokens": span.tokens,
                    }
                    for span in plan.spans
                    if span.document == document
                ]
    return found
