"""Which source gives the next sample, and where every source stands.

A sample is `sequence_length` tokens of one lane of one source (fewer where documents are padded),
and one more token, looked at and not consumed, for the last label. The source is the one that has
the largest deficit of tokens against its weight, counted since the weights last changed; the first
of several. So the order follows from weights and cursors alone: not from the layout, the batch, or
how long the run is.

    deficit(s) = weight(s) * (given to all + sequence_length) - given(s)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.data.ledger.lanes import Lanes
from equilibrium_mcore.data.ledger.source import DocumentSlice, SourceDocuments

STATE_VERSION = 2


class SamplePlan(NamedTuple):
    """One sample, before its tokens are read."""

    source: int
    """Place of the source in the blend."""
    spans: tuple[DocumentSlice, ...]
    """`sequence_length` tokens, padding counted; each span is a document begun or continued."""
    label: DocumentSlice
    """The next token, for the last label."""


class Ledger:
    """Cursors of all sources; gives out samples in order.

    Its state is plain values (`state`), the same on every rank and in every layout.
    """

    def __init__(
        self,
        sources: Sequence[SourceDocuments],
        weights: Sequence[float],
        *,
        sequence_length: int,
        document_multiple: int = 1,
        state: dict[str, Any] | None = None,
    ) -> None:
        """Start at the beginning, or resume at `state`, which may have other sources and weights.

        With `document_multiple` each document is padded to a multiple of it, so that a sample holds
        fewer tokens of the text.

        Raises ConfigError where a source of the state has other data now.
        """
        self.sources, self.sequence_length = list(sources), sequence_length
        self.document_multiple = document_multiple
        total = sum(weights)
        self.weights = np.array([weight / total for weight in weights])
        if state is not None:
            check_state(self.sources, state)
        saved = state or {"sources": {}, "cursors": {}, "weights": {}, "given": {}}
        self._absent = {
            key: {name: value for name, value in saved[key].items() if name not in self._names}
            for key in ("sources", "cursors")
        }
        cursors = [saved["cursors"].get(name) for name in self._names]
        self.lanes = [Lanes(*pair) for pair in zip(self.sources, cursors, strict=True)]
        """Where each source stands."""
        self.taken = [cursor["tokens"] if cursor else 0 for cursor in cursors]
        """Tokens of each source that the run has consumed since its first step."""
        # Deficits of other weights say nothing about these.
        same = saved["weights"] == dict(zip(self._names, self.weights.tolist(), strict=True))
        given = [saved["given"].get(name, 0) if same else 0 for name in self._names]
        self._given = np.array(given, np.float64)
        self._given_in_all = sum(given)
        self._wanted = np.empty_like(self.weights)

    @property
    def _names(self) -> list[str]:
        return [source.name for source in self.sources]

    def copy(self) -> Ledger:
        """A second ledger at the same place; they share what is looked up of the documents."""
        other = object.__new__(Ledger)
        other.__dict__.update(self.__dict__)
        other.lanes, other.taken = [lanes.copy() for lanes in self.lanes], list(self.taken)
        other._given, other._wanted = self._given.copy(), self._wanted.copy()
        return other

    def take(self) -> SamplePlan:
        """Plan the next sample, and move on after it."""
        spans: list[DocumentSlice] = []
        chosen = self._next(spans)
        return SamplePlan(chosen, tuple(spans), self.lanes[chosen].label())

    def skip(self, samples: int) -> None:
        """Move on by so many samples."""
        for _ in range(samples):
            self._next(None)

    def _next(self, spans: list[DocumentSlice] | None) -> int:
        length = self.sequence_length
        # Counts of tokens are whole numbers far below 2^53: exact, so a resumed ledger that adds
        # them up in another order decides alike.
        np.multiply(self.weights, self._given_in_all + length, out=self._wanted)
        self._wanted -= self._given
        chosen = int(self._wanted.argmax())
        taken = self.lanes[chosen].take(length, spans, multiple=self.document_multiple)
        self._given[chosen] += taken
        self._given_in_all += taken
        self.taken[chosen] += taken
        return chosen

    def state(self) -> dict[str, Any]:
        """All that `state=` needs to resume here: plain values that JSON keeps exactly.

        `sources` says which data each name stood for; `cursors` has per source the state of its
        lanes, and `tokens`, consumed since the run began; sources that left the blend stay in both.
        `weights` and `given` are the blend's since its weights last changed.
        """
        facts = {source.name: describe(source) for source in self.sources}
        cursors = {
            name: {**lanes.state(), "tokens": taken}
            for name, lanes, taken in zip(self._names, self.lanes, self.taken, strict=True)
        }
        return {
            "version": STATE_VERSION,
            "sources": {**facts, **self._absent["sources"]},
            "cursors": {**cursors, **self._absent["cursors"]},
            "weights": dict(zip(self._names, self.weights.tolist(), strict=True)),
            "given": dict(zip(self._names, map(int, self._given), strict=True)),
        }


def describe(source: SourceDocuments) -> dict[str, Any]:
    """What tells the source's data from other data, and how large an epoch is."""
    return {
        "fingerprint": source.fingerprint,
        "content": source.content,
        "documents": source.documents,
        "tokens": source.tokens,
    }


def check_version(state: dict[str, Any]) -> None:
    """Raise ConfigError where a state's values mean something else than here."""
    if state.get("version") != STATE_VERSION:
        raise ConfigError(
            f"the ledger's state has version {state.get('version')!r}, and this program reads "
            f"version {STATE_VERSION}: resume with the program that wrote it"
        )


def check_state(sources: Sequence[SourceDocuments], state: dict[str, Any]) -> None:
    """Raise ConfigError where a name of `state` stands for other data now, or data was renamed."""
    check_version(state)
    problems = []
    here = {source.name for source in sources}
    gone = {
        facts["fingerprint"]: name for name, facts in state["sources"].items() if name not in here
    }
    for source in sources:
        known, now = state["sources"].get(source.name), describe(source)
        if known is None and now["fingerprint"] in gone:
            old = gone[now["fingerprint"]]
            problems.append(
                f"data source {source.name!r}: {source.prefix} holds the documents of {old!r}, "
                f"which the run has read up to epoch {state['cursors'][old]['epoch']}, "
                f"position {state['cursors'][old]['position']:,}; under a new name it would "
                f"begin again: call it {old!r} as before"
            )
        elif known is not None and _is_other_data(known, now):
            problems.append(
                f"data source {source.name!r}: {source.prefix} is not the dataset that the run has "
                f"read so far ({_words(known)}; now {_words(now)}): put that dataset back, or give "
                "the new one a new name, under which it starts at its first document"
            )
    if problems:
        raise ConfigError(problems, source="going on in the data")


def _is_other_data(known: dict[str, Any], now: dict[str, Any]) -> bool:
    """By the hashes of all content where both have them, and by the fingerprint of a sample."""
    contents = {facts.get("content") for facts in (known, now)} - {None}
    return known["fingerprint"] != now["fingerprint"] or len(contents) > 1


def _words(facts: dict[str, Any]) -> str:
    content = facts.get("content")
    return (
        f"{facts['documents']:,} documents for training, {facts['tokens']:,} tokens, fingerprint "
        f"{facts['fingerprint']}{f', content {content[:16]}' if content else ''}"
    )
