"""When a run read a given document: the way back from a text to its steps."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.data.ledger.record import Mark, Segment, ledger_behind
from equilibrium_mcore.data.ledger.source import SourceDocuments


def readings(segments: list[Segment], name: str, document: int) -> dict[str, Any]:
    """Where document number `document` of source `name` was read, up to the last saved state.

    `read` has per piece the epoch, step, sample within the step's batch, offset and tokens. Only
    steps between two saved states are replayed in which the source's cursor passed the document.
    Raises ConfigError for a source or a document that the run never had for training.
    """
    found: list[dict[str, Any]] = []
    tokens = None
    for segment, last in _with_ends(segments):
        names = [source["name"] for source in segment.settings["sources"]]
        if name not in names:
            continue
        ledger = ledger_behind(segment, segment.first.step)
        source = ledger.sources[names.index(name)]
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


def _with_ends(segments: list[Segment]) -> list[tuple[Segment, tuple[Mark, ...]]]:
    """Each segment with the state that the next one starts from; the last ends at its last mark."""
    ends = [(following.first,) for following in segments[1:]]
    return list(zip(segments, [*ends, ()], strict=True))


def _passes(source: SourceDocuments, document: int, before: Mark, after: Mark) -> bool:
    """Whether the source's cursor touches the document between two states."""
    start, end = (
        tuple(mark.state["cursors"].get(source.name, (0, 0, 0))[:3]) for mark in (before, after)
    )
    for epoch in range(start[0], end[0] + 1):
        place = (epoch, source.position_of(document, epoch))
        if start[:2] <= place <= end[:2]:
            return True
    return False


def _replay(
    segment: Segment, place: int, document: int, before: Mark, after: Mark
) -> list[dict[str, Any]]:
    ledger = ledger_behind(segment, before.step)
    source, found = ledger.sources[place], []
    for step in range(before.step + 1, after.step + 1):
        for sample in range(segment.settings["global_batch_size"]):
            cursor = ledger.cursors[place]
            plan = ledger.take()
            if plan.source != place or all(span.document != document for span in plan.spans):
                continue
            for span in plan.spans:
                if span.document == document:
                    found.append(
                        {
                            "epoch": cursor.epoch,
                            "step": step,
                            "sample": sample,
                            "offset": span.offset,
                            "tokens": span.tokens,
                        }
                    )
                cursor = source.advance(cursor, span.tokens)
    return found
