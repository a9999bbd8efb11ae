"""One source's documents in their order: a seeded permutation per epoch, and a place in it.

Documents are the sequences of a Megatron index, numbered as in the file. Only the lengths of the
documents near the place in question are looked up, in blocks of BLOCK, so that memory and start do
not depend on how many documents there are.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from equilibrium_mcore.config.schema import SourceConfig
from equilibrium_mcore.data.indexed_files import (
    HEADER_BYTES,
    IndexHeader,
    dataset_paths,
    fingerprint,
    tokens_before,
)
from equilibrium_mcore.data.ledger.maps import OpenMaps
from equilibrium_mcore.data.ledger.permutation import Permutation
from equilibrium_mcore.data.sources import SPLITS, split_documents

BLOCK = 1024  # documents whose lengths are looked up together
BLOCKS_KEPT = 3  # those being planned, those being trained on, and the next


class Cursor(NamedTuple):
    """Where a source goes on: the next token is token `offset` of the document at `position`."""

    epoch: int
    position: int
    """Place in the epoch's order, not a document's number."""
    offset: int
    """Tokens of that document that were already given out."""


START = Cursor(0, 0, 0)


class Span(NamedTuple):
    """Consecutive tokens of one document."""

    document: int
    """The sequence's number in the index."""
    offset: int
    tokens: int


class _Block(NamedTuple):
    """Consecutive positions of one epoch's order."""

    first: int
    documents: memoryview
    starts: memoryview
    """Tokens in front of each document within the block, and behind the last: one more entry."""


class SourceDocuments:
    """The documents of one split of one source, in the order in which epochs go through them."""

    def __init__(
        self,
        source: SourceConfig,
        header: IndexHeader,
        *,
        split: str,
        part: str,
        seed: int,
        maps: OpenMaps | None = None,
    ) -> None:
        """`split` is the run's shares, `part` one of SPLITS; sources of a blend share `maps`.

        Raises ValueError where the split holds no token, or the index does not fit its data.
        """
        self.name, self.prefix, self.header = source.name, Path(source.prefix), header
        self.begin, self.end = split_documents(split, header.sequences)[SPLITS.index(part)]
        self.documents = self.end - self.begin
        """How many documents an epoch has."""
        first, last = tokens_before(self.prefix, header, [self.begin, self.end])
        self.tokens = last - first
        """How many tokens an epoch has."""
        if not self.tokens:
            raise ValueError(f"{self.prefix}: the split {split!r} leaves no token for {part}")
        self._maps = maps or OpenMaps()
        # The name stands for the source, so a moved or renumbered one keeps its order.
        self._key = f"{seed}|{source.name}|{part}"
        self._blocks: dict[tuple[int, int], _Block] = {}
        self._orders: dict[int, Permutation] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_blocks": {}, "_orders": {}}

    @cached_property
    def fingerprint(self) -> str:
        """Tells the dataset from others; see `indexed_files.fingerprint`."""
        return fingerprint(self.prefix, self.header)

    # ------------------------------------------------------------------------------ the order

    def order(self, epoch: int, begin: int, end: int) -> np.ndarray:
        """Numbers of the documents at positions begin .. end-1 of an epoch, int64."""
        return self.begin + self._permutation(epoch)(begin, end)

    def position_of(self, document: int, epoch: int) -> int:
        """The position of a document in an epoch's order."""
        return self._permutation(epoch).place_of(document - self.begin)

    def _permutation(self, epoch: int) -> Permutation:
        if epoch not in self._orders:
            while len(self._orders) > 1:
                self._orders.pop(next(iter(self._orders)))
            self._orders[epoch] = Permutation(self.documents, f"{self._key}|{epoch}")
        return self._orders[epoch]

    def advance(self, cursor: Cursor, tokens: int, spans: list[Span] | None = None) -> Cursor:
        """Where the source stands `tokens` further on; what lies between is added to `spans`."""
        epoch, position, offset = cursor
        while True:
            block = self._block(epoch, position // BLOCK)
            place = position - block.first
            here = block.starts[place] + offset
            target, whole = here + tokens, block.starts[-1]
            if spans is not None and tokens:
                _add_spans(spans, block, place, here, min(target, whole))
            if target < whole:
                place = bisect_right(block.starts, target) - 1
                return Cursor(epoch, block.first + place, target - block.starts[place])
            tokens = target - whole
            position, offset = block.first + len(block.documents), 0
            if position == self.documents:
                epoch, position = epoch + 1, 0

    def next_token(self, cursor: Cursor) -> Span:
        """The token at the cursor, as a span of one."""
        spans: list[Span] = []
        self.advance(cursor, 1, spans)
        return spans[0]

    def _block(self, epoch: int, number: int) -> _Block:
        key = (epoch, number)
        block = self._blocks.get(key)
        if block is None:
            while len(self._blocks) >= BLOCKS_KEPT:
                self._blocks.pop(next(iter(self._blocks)))
            block = self._blocks[key] = self._read_block(epoch, number)
        return block

    def _read_block(self, epoch: int, number: int) -> _Block:
        first = number * BLOCK
        documents = self.order(epoch, first, min(first + BLOCK, self.documents))
        lengths = self._lengths()[documents].astype(np.int64)
        if lengths.min() < 0:
            raise ValueError(
                f"{dataset_paths(self.prefix)[1]} is damaged: document "
                f"{documents[lengths.argmin()]} has {lengths.min()} tokens. Make the dataset anew"
            )
        starts = np.zeros(lengths.size + 1, np.int64)
        np.cumsum(lengths, out=starts[1:])
        return _Block(first, memoryview(documents), memoryview(starts))

    # ------------------------------------------------------------------------------ the tokens

    def _lengths(self) -> np.ndarray:
        return self._index(np.int32, HEADER_BYTES)

    def _index(self, dtype: type, offset: int) -> np.ndarray:
        path = dataset_paths(self.prefix)[1]
        return self._maps.array(path, dtype, offset=offset, count=self.header.sequences)

    def length(self, document: int) -> int:
        """Tokens of a document."""
        return int(self._lengths()[document])

    def read(self, span: Span) -> np.ndarray:
        """The span's token ids, [tokens], mapped.

        Raises ValueError where the index leads outside of the .bin.
        """
        itemsize = self.header.dtype.itemsize
        offsets = self._index(np.int64, HEADER_BYTES + 4 * self.header.sequences)
        start = int(offsets[span.document]) // itemsize + span.offset
        if start < 0 or start + span.tokens > self.header.tokens:
            raise ValueError(
                f"{dataset_paths(self.prefix)[1]} does not fit its data: document {span.document} "
                f"would lie at tokens {start:,} to {start + span.tokens:,} of "
                f"{self.header.tokens:,}. Make the dataset anew"
            )
        return self._maps.array(
            dataset_paths(self.prefix)[0],
            self.header.dtype,
            offset=start * itemsize,
            count=span.tokens,
            scattered=True,
        )


def _add_spans(spans: list[Span], block: _Block, place: int, here: int, until: int) -> None:
    """Spans of the block's tokens here .. until-1; `place` is the document that holds `here`."""
    starts, documents = block.starts, block.documents
    while here < until:
        end = min(starts[place + 1], until)
        if end > here:
            spans.append(Span(documents[place], here - starts[place], end - here))
            here = end
        place += 1
