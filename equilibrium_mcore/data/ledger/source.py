"""One source's documents in their order: a seeded permutation per epoch.

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

from equilibrium_mcore.config.data import SourceConfig
from equilibrium_mcore.data.indexed_files import (
    HEADER_BYTES,
    IndexHeader,
    dataset_paths,
    fingerprint,
    read_manifest,
    tokens_before,
)
from equilibrium_mcore.data.ledger.permutation import Permutation
from equilibrium_mcore.data.open_files import OpenFiles
from equilibrium_mcore.data.sources import SPLITS, split_documents
from equilibrium_mcore.files.errors import FileContentError

BLOCK = 1024  # documents whose lengths are looked up together
BLOCKS_KEPT = 3  # those being planned, those being trained on, and the next


class Pointer(NamedTuple):
    """The document that a source begins next."""

    epoch: int
    position: int
    """Place in the epoch's order, not a document's number."""


START = Pointer(0, 0)


class Unfinished(NamedTuple):
    """A document that was begun and has tokens left."""

    epoch: int
    document: int
    """The sequence's number in the index."""
    offset: int
    """Tokens of it that were given out."""
    length: int = 0
    """Tokens that it has; 0: not looked up yet."""


class DocumentSlice(NamedTuple):
    """Consecutive tokens of one document."""

    document: int
    """The sequence's number in the index."""
    offset: int
    tokens: int
    epoch: int = 0
    """The epoch in which the document was begun."""


class _Block(NamedTuple):
    """Consecutive positions of one epoch's order."""

    epoch: int
    first: int
    documents: memoryview
    starts: memoryview
    """Tokens in front of each document within the block, and after the last: one more entry."""


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
        files: OpenFiles | None = None,
    ) -> None:
        """`split` is the run's shares, `part` one of SPLITS; sources of a blend share `files`.

        Raises ValueError where the split holds no token, or the index does not fit its data.
        """
        self.name, self.prefix, self.header = source.name, Path(source.prefix), header
        self._data_file, self._index_file, _ = dataset_paths(self.prefix)
        self.begin, self.end = split_documents(split, header.sequences)[SPLITS.index(part)]
        self.documents = self.end - self.begin
        """How many documents an epoch has."""
        first, last = tokens_before(self.prefix, header, [self.begin, self.end])
        self.tokens = last - first
        """How many tokens an epoch has."""
        if not self.tokens:
            raise ValueError(f"{self.prefix}: the split {split!r} leaves no token for {part}")
        self._files = files or OpenFiles()
        self._files.expect(self._data_file)
        self._files.expect(self._index_file)
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

    @cached_property
    def content(self) -> str | None:
        """Tells any byte of it from others; None where the dataset's manifest holds no hashes."""
        manifest = read_manifest(self.prefix)
        return manifest.hashes.content if manifest and manifest.hashes else None

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

    def advance(
        self, at: Pointer, tokens: int, spans: list[DocumentSlice] | None = None
    ) -> tuple[Pointer, Unfinished | None]:
        """Give out `tokens` tokens of the documents from `at` on; their spans go to `spans`.

        Returns the document to begin next, and the last one begun where it has tokens left.
        """
        epoch, position = at
        while True:
            block = self._block(epoch, position // BLOCK)
            starts, place = block.starts, position - block.first
            here, whole = starts[place], starts[-1]
            target = here + tokens
            if spans is not None and tokens:
                _add_spans(spans, block, place, here, min(target, whole))
            if target < whole:
                place = bisect_right(starts, target) - 1
                offset = target - starts[place]
                if not offset:
                    return Pointer(epoch, block.first + place), None
                length = starts[place + 1] - starts[place]
                held = Unfinished(epoch, block.documents[place], offset, length)
                return self._pointer(epoch, block.first + place + 1), held
            tokens = target - whole
            epoch, position = self._pointer(epoch, block.first + len(block.documents))

    def _pointer(self, epoch: int, position: int) -> Pointer:
        return Pointer(epoch, position) if position < self.documents else Pointer(epoch + 1, 0)

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
        lengths = self._files.gather(
            self._index_file,
            np.int32,
            offset=HEADER_BYTES,
            count=self.header.sequences,
            places=documents,
        ).astype(np.int64)
        if lengths.min() < 0:
            raise FileContentError(
                f"{self._index_file} is damaged: document "
                f"{documents[lengths.argmin()]} has {lengths.min()} tokens. Make the dataset again"
            )
        starts = np.zeros(lengths.size + 1, np.int64)
        np.cumsum(lengths, out=starts[1:])
        return _Block(epoch, first, memoryview(documents), memoryview(starts))

    # ------------------------------------------------------------------------------ the tokens

    def length(self, document: int) -> int:
        """Tokens of a document."""
        return self._of_index(np.int32, HEADER_BYTES, document)

    def _of_index(self, dtype: type, offset: int, document: int) -> int:
        at = offset + document * np.dtype(dtype).itemsize
        return int(self._files.read(self._index_file, dtype, offset=at, count=1)[0])

    def read(self, span: DocumentSlice) -> np.ndarray:
        """The span's token ids, [tokens].

        Raises ValueError where the index leads outside of the .bin, and where a file has changed
        since the run opened it.
        """
        itemsize = self.header.dtype.itemsize
        offsets = HEADER_BYTES + 4 * self.header.sequences
        start = self._of_index(np.int64, offsets, span.document) // itemsize + span.offset
        if start < 0 or start + span.tokens > self.header.tokens:
            raise FileContentError(
                f"{self._index_file} does not fit its data: document {span.document} "
                f"would lie at tokens {start:,} to {start + span.tokens:,} of "
                f"{self.header.tokens:,}. Make the dataset again"
            )
        return self._files.read(
            self._data_file, self.header.dtype, offset=start * itemsize, count=span.tokens
        )


def _add_spans(
    spans: list[DocumentSlice], block: _Block, place: int, here: int, until: int
) -> None:
    """Spans of the block's tokens here .. until-1; `place` is the document that holds `here`."""
    starts, documents = block.starts, block.documents
    while here < until:
        end = min(starts[place + 1], until)
        if end > here:
            offset = here - starts[place]
            spans.append(DocumentSlice(documents[place], offset, end - here, block.epoch))
            here = end
        place += 1
