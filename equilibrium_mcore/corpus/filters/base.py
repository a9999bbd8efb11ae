"""What a filter is: one that sees a document alone, and one that sees all of them.

Both are built in every worker by `build.build_filters`; neither keeps state between documents.
What a filter across documents remembers lives in the index that `CorpusFilter.start` makes.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Dropped:
    """A document that goes. `reason` is one of few texts, so that it can be counted."""

    reason: str


class FilterError(RuntimeError):
    """A filter failed on a document: a fault of the filter, not a reason to drop."""


class DocumentFilter(ABC):
    """Looks at one document at a time; may change its text."""

    name: str  # the `type` of its settings

    @abstractmethod
    def apply(self, text: str, fields: Mapping[str, Any]) -> str | Dropped:
        """The text to continue with, or why the document goes. `fields` is the whole record."""

    def notes(self) -> list[str]:
        """What the user should know of the filter's own files, once, before any document."""
        return []


class SeenIndex(ABC):
    """What a filter across documents remembers while documents pass in reading order."""

    @abstractmethod
    def decide(self, signature: np.ndarray) -> str | None:
        """None to keep the document with this signature, else the reason why it goes."""


class CorpusFilter(ABC):
    """Looks across documents, in two steps: signatures in any worker, decisions in one place."""

    name: str
    signature_size: int  # unsigned 64-bit numbers per document

    @abstractmethod
    def signature(self, text: str) -> np.ndarray:
        """What is compared of a document: uint64 [signature_size]. Computed in any worker."""

    @abstractmethod
    def start(self) -> SeenIndex:
        """An empty index, for one pass over a corpus."""

    def keep(self, signatures: Iterable[np.ndarray]) -> Iterator[str | None]:
        """For each signature in reading order: None to keep, else the reason."""
        index = self.start()
        for signature in signatures:
            yield index.decide(signature)


@dataclass(frozen=True)
class FilterOutcome:
    """What became of a document.

    `text` is as far as it came. `dropped` and `stage`, an index into the chain's filters, say where
    it went and why; both are None while it stays. `signatures` has one entry for each filter across
    documents that it reached.
    """

    text: str
    dropped: Dropped | None = None
    stage: int | None = None
    signatures: tuple[np.ndarray, ...] = field(default=(), repr=False)


def apply_or_sign(
    part: DocumentFilter | CorpusFilter, text: str, fields: Mapping[str, Any]
) -> str | Dropped | np.ndarray:
    """What a filter makes of a document, or its signature.

    Raises FilterError, which shows the beginning of the document, when the filter fails on it.
    """
    try:
        return part.signature(text) if isinstance(part, CorpusFilter) else part.apply(text, fields)
    except Exception as error:
        raise FilterError(
            f"filter {part.name} failed on a document of {len(text):,} characters that begins "
            f"{text[:80]!r}: {type(error).__name__}: {error}"
        ) from error


class FilterChain:
    """Filters in their order.

    `process` runs in any worker and on documents in any order. `resolve` then takes the outcomes in
    reading order, in one place, and decides what the filters across documents drop:

        outcomes = (chain.process(record["text"], record) for record in records)
        texts = [outcome.text for outcome in chain.resolve(outcomes) if outcome.dropped is None]
    """

    def __init__(self, filters: Sequence[DocumentFilter | CorpusFilter]) -> None:
        self.filters = tuple(filters)
        self._corpus_stages = [
            stage for stage, part in enumerate(self.filters) if isinstance(part, CorpusFilter)
        ]

    def notes(self) -> list[str]:
        """What its filters say of themselves, each with its name."""
        return [
            f"{part.name}: {note}"
            for part in self.filters
            if isinstance(part, DocumentFilter)
            for note in part.notes()
        ]

    @property
    def has_corpus_filters(self) -> bool:
        """Whether `resolve` has anything to decide."""
        return bool(self._corpus_stages)

    def process(self, text: str, fields: Mapping[str, Any]) -> FilterOutcome:
        """Apply the document filters in order, and note signatures where others stand between.

        Raises FilterError when a filter fails on this document.
        """
        signatures: list[np.ndarray] = []
        for stage, part in enumerate(self.filters):
            result = apply_or_sign(part, text, fields)
            if isinstance(result, np.ndarray):
                signatures.append(result)
                continue
            if isinstance(result, Dropped):
                return FilterOutcome(text, result, stage, tuple(signatures))
            text = result
        return FilterOutcome(text, signatures=tuple(signatures))

    def resolve(self, outcomes: Iterable[FilterOutcome]) -> Iterator[FilterOutcome]:
        """The final outcomes, in the same order; signatures are taken off.

        A document counts for a filter across documents only if it reached it: one that an earlier
        filter dropped is no duplicate's original, one that a later filter drops is.
        """
        indexes = [self.filters[stage].start() for stage in self._corpus_stages]
        for outcome in outcomes:
            final = replace(outcome, signatures=())
            reached = zip(self._corpus_stages, indexes, outcome.signatures, strict=False)
            for stage, index, signature in reached:
                reason = index.decide(signature)
                if reason is not None:
                    final = FilterOutcome(outcome.text, Dropped(reason), stage)
                    break
            yield final
