"""Datasets whose tokens tell where they come from."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from equilibrium_mcore.config.data import SourceConfig
from equilibrium_mcore.corpus.indexed_writer import IndexedWriter
from equilibrium_mcore.data.indexed_files import read_header
from equilibrium_mcore.data.ledger import lanes
from equilibrium_mcore.data.ledger.source import DocumentSlice, SourceDocuments

SEED = 11


def write_source(prefix: Path, lengths: list[int]) -> Path:
    """A dataset whose token i is the number i: a token names its document and its place in it."""
    with IndexedWriter(prefix, np.int32, overwrite=True) as writer:
        total = int(np.sum(lengths))
        writer.add(np.arange(total, dtype=np.int32).tobytes(), np.array(lengths, np.int32))
        writer.finish()
        for ending in ("bin", "idx"):
            prefix.with_name(f"{prefix.name}.{ending}.partial").rename(f"{prefix}.{ending}")
    return prefix


def open_source(prefix: Path, name: str, *, part="train", split="90,8,2", seed=SEED):
    source = SourceConfig(name=name, prefix=prefix, weight=1.0)
    return SourceDocuments(source, read_header(prefix), split=split, part=part, seed=seed)


def lanes_of(source: SourceDocuments) -> int:
    """How many documents are read side by side."""
    return min(lanes.LANES, source.documents)


def documents_in_order(source: SourceDocuments) -> Iterator[tuple[int, int, np.ndarray]]:
    """Epoch, number and token ids of the documents that hold tokens, epoch after epoch."""
    epoch = 0
    while True:
        for document in source.order(epoch, 0, source.documents).tolist():
            length = source.length(document)
            if length:
                yield epoch, document, source.read(DocumentSlice(document, 0, length))
        epoch += 1


def laned(source: SourceDocuments, lengths: Iterable[int]) -> list[np.ndarray]:
    """What samples of so many tokens hold, in the plainest way: no pointer, block or state."""
    coming, count = documents_in_order(source), lanes_of(source)
    rests = [np.empty(0, np.int32)] * count
    samples = []
    for number, length in enumerate(lengths):
        ids = rests[number % count]
        while ids.size < length:
            ids = np.concatenate([ids, next(coming)[2]])
        samples.append(ids[:length])
        rests[number % count] = ids[length:]
    return samples


def assert_given_once(
    source: SourceDocuments, samples: list[np.ndarray], cursor: dict[str, Any]
) -> None:
    """Every document of every epoch begun in its order, and given out once without gap or overlap.

    Of a dataset by `write_source`, from the ids alone: nothing is assumed of lanes. What is under
    way at the end is what the saved `cursor` holds.
    """
    lengths = np.array([source.length(d) for d in range(source.documents)])
    ends = np.cumsum(lengths)
    first_ids = ends - lengths
    with_tokens = first_ids[lengths > 0]
    begun: list[int] = []
    open_ends: dict[int, int] = {}  # the id with which a document under way goes on: how many
    for ids in samples:
        cuts = (np.diff(ids) != 1) | np.isin(ids[1:], with_tokens)
        for piece in np.split(ids, np.flatnonzero(cuts) + 1):
            document = int(np.searchsorted(ends, piece[0], side="right"))
            if piece[0] == first_ids[document]:
                begun.append(document)
            else:
                assert open_ends.get(piece[0], 0) > 0, f"token {piece[0]} follows none"
                open_ends[piece[0]] -= 1
            end = piece[-1] + 1
            if end < ends[document]:
                open_ends[end] = open_ends.get(end, 0) + 1
    order = documents_in_order(source)
    assert begun == [next(order)[1] for _ in begun]
    rests = sorted(int(end) for end, times in open_ends.items() for _ in range(times))
    held = [int(first_ids[document]) + offset for _, _, document, offset in cursor["held"]]
    assert rests == sorted(held)
    assert len(held) <= lanes_of(source)
