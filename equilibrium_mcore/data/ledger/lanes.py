"""Where one source stands: a pointer into its order, and documents under way in lanes.

Were a source's documents read one after the other, one that is longer than a sequence would fill
consecutive samples, and a batch could be a single book. So a source has lanes: its k-th sample is
filled by lane k mod the number of lanes. A lane continues with its own document; where that ends,
within a sample too, it begins the document that the source's one pointer gives next, whichever lane
asks. So each document is begun once per epoch, is read by one lane to its end, and pieces of it lie
as many samples of the source apart as there are lanes.
"""

from __future__ import annotations

from typing import Any

from equilibrium_mcore.data.ledger.source import (
    START,
    DocumentSlice,
    Pointer,
    SourceDocuments,
    Unfinished,
)

# Another number asks for another ledger.STATE_VERSION: lanes that are no more hold documents.
LANES = 64


def padded(tokens: int, multiple: int) -> int:
    """The next multiple from `tokens` on."""
    return -(-tokens // multiple) * multiple


class Lanes:
    """Gives out one source's tokens, a sample at a time."""

    def __init__(self, source: SourceDocuments, state: dict[str, Any] | None = None) -> None:
        """Start at the source's first document, or resume at what `state` returned."""
        self.source = source
        # With more lanes than documents, several would read one document side by side.
        self.count = min(LANES, source.documents)
        self.pointer, self.lane = START, 0
        self.held: dict[int, Unfinished] = {}
        if state is not None:
            self.pointer, self.lane = Pointer(state["epoch"], state["position"]), state["lane"]
            self.held = {lane: Unfinished(*values) for lane, *values in state["held"]}

    def copy(self) -> Lanes:
        """Lanes at the same place that go their own way."""
        other = object.__new__(Lanes)
        other.__dict__.update(self.__dict__)
        other.held = dict(self.held)
        return other

    def take(self, room: int, spans: list[DocumentSlice] | None, *, multiple: int = 1) -> int:
        """Fill a sample of `room` tokens from the next lane; its spans are added to `spans`.

        Each document is padded to a multiple of `multiple`. Returns the tokens taken.
        """
        taken = 0
        if multiple == 1:
            self._give(room, spans)
            taken = room
        else:
            while room > 0:
                tokens = min(self._rest(), room)
                self._give(tokens, spans)
                taken += tokens
                room -= padded(tokens, multiple)
        self.lane = (self.lane + 1) % self.count
        return taken

    def label(self) -> DocumentSlice:
        """The token after the last sample's, in its lane: looked at, not given out."""
        return self._next_token((self.lane - 1) % self.count)

    def _give(self, tokens: int, spans: list[DocumentSlice] | None) -> None:
        held = self.held.get(self.lane)
        if held is not None:
            epoch, document, offset, length = held
            if not length:
                length = self.source.length(document)
            given = min(length - offset, tokens)
            if spans is not None:
                spans.append(DocumentSlice(document, offset, given, epoch))
            if offset + given < length:
                self.held[self.lane] = Unfinished(epoch, document, offset + given, length)
                return
            del self.held[self.lane]
            tokens -= given
            if not tokens:
                return
        self.pointer, held = self.source.advance(self.pointer, tokens, spans)
        if held is not None:
            self.held[self.lane] = held

    def _next_token(self, lane: int) -> DocumentSlice:
        held = self.held.get(lane)
        if held is not None:
            return DocumentSlice(held.document, held.offset, 1, held.epoch)
        spans: list[DocumentSlice] = []
        self.source.advance(self.pointer, 1, spans)
        return spans[0]

    def _rest(self) -> int:
        """Tokens left of the document at which the lane stands."""
        held = self.held.get(self.lane)
        if held is not None and held.length:
            return held.length - held.offset
        here = self._next_token(self.lane)
        return self.source.length(here.document) - here.offset

    def state(self) -> dict[str, Any]:
        """`epoch` and `position` of the document to begin next, the `lane` whose turn it is.

        `held` has per document under way its lane, epoch, number, and how many of its tokens were
        given out. Plain values that JSON keeps exactly.
        """
        held = [[lane, *self.held[lane][:3]] for lane in sorted(self.held)]
        return {**self.pointer._asdict(), "lane": self.lane, "held": held}
