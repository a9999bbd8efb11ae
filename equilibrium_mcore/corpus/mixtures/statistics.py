"""What prepared data holds: lengths, tokens, what is there twice. Memory is flat.

Lengths are counted exactly. Tokens and duplicates of a large dataset are counted in evenly spaced
blocks and in its first documents; each figure comes with how many were looked at.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from equilibrium_mcore.data.indexed_files import (
    HEADER_BYTES,
    dataset_paths,
    open_tokens,
    read_header,
)

BLOCK = 1 << 20
MAX_TOKENS = 64 << 20
MAX_DOCUMENTS = 1_000_000
EDGES = 2 ** np.arange(0, 33, dtype=np.int64)
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)


@dataclass(frozen=True)
class Lengths:
    """Lengths of documents, in tokens (or in characters of a JSONL line).

    `histogram[i]` counts those from 2^i to below 2^(i+1); `quantiles` are exact.
    """

    documents: int
    total: int
    mean: float
    smallest: int
    largest: int
    quantiles: dict[str, int]
    histogram: list[int]
    longer_than_sequence: int


@dataclass(frozen=True)
class Tokens:
    """Frequencies of tokens: `top` has (id, share) of the most frequent ones."""

    counted: int
    distinct: int
    vocabulary: int
    entropy_bits: float
    top: list[tuple[int, float]]


class DuplicateCounter:
    """Exact repetitions among the first `MAX_DOCUMENTS` documents of every dataset, and across."""

    def __init__(self) -> None:
        self._seen: dict[bytes, str] = {}

    def count(self, name: str, documents: Iterator[bytes]) -> dict[str, int]:
        """`within`: documents that repeat one of this dataset; `across`: one of an earlier one."""
        found = {"looked_at": 0, "within": 0, "across": 0}
        of_this: set[bytes] = set()
        for document in documents:
            if found["looked_at"] == MAX_DOCUMENTS:
                break
            found["looked_at"] += 1
            key = hashlib.blake2b(document, digest_size=12).digest()
            first = self._seen.setdefault(key, name)
            if first != name:
                found["across"] += 1
            elif key in of_this:
                found["within"] += 1
            of_this.add(key)
        return found


def lengths_of(blocks: Iterator[np.ndarray], *, sequence_length: int) -> Lengths:
    """Statistics of lengths that come in blocks; exact, by counting each length."""
    counts: dict[int, int] = {}
    for block in blocks:
        values, times = np.unique(block, return_counts=True)
        for value, number in zip(values.tolist(), times.tolist(), strict=True):
            counts[value] = counts.get(value, 0) + number
    values = np.array(sorted(counts), np.int64)
    times = np.array([counts[value] for value in values.tolist()], np.int64)
    documents, total = int(times.sum()), int((values * times).sum())
    sums = np.cumsum(times)
    places = [int(np.searchsorted(sums, quantile * documents)) for quantile in QUANTILES]
    histogram, _ = np.histogram(values, EDGES, weights=times)
    used = np.flatnonzero(histogram)
    return Lengths(
        documents=documents,
        total=total,
        mean=total / documents if documents else 0.0,
        smallest=int(values[0]) if documents else 0,
        largest=int(values[-1]) if documents else 0,
        quantiles={
            f"{quantile:g}": int(values[place])
            for quantile, place in zip(QUANTILES, places, strict=True)
            if documents
        },
        histogram=histogram[: used[-1] + 1].astype(int).tolist() if used.size else [],
        longer_than_sequence=int(times[values > sequence_length].sum()),
    )


def all_document_lengths(prefix: Path) -> np.ndarray:
    """Tokens of each document with a token, int32, mapped and not read."""
    count = read_header(prefix).sequences
    return np.memmap(dataset_paths(prefix)[1], np.int32, "r", offset=HEADER_BYTES, shape=(count,))


def indexed_lengths(prefix: Path) -> Iterator[np.ndarray]:
    """Lengths of an indexed dataset's documents, in blocks."""
    lengths = all_document_lengths(prefix)
    for begin in range(0, lengths.size, BLOCK):
        yield np.asarray(lengths[begin : begin + BLOCK])


def indexed_documents(prefix: Path) -> Iterator[bytes]:
    """Token ids of each document, as bytes."""
    tokens, end = open_tokens(prefix, read_header(prefix)), 0
    for length in all_document_lengths(prefix):
        yield tokens[end : end + length].tobytes()
        end += int(length)


def token_statistics(prefixes: list[Path], *, vocab_size: int, top: int = 20) -> Tokens:
    """Frequencies over datasets of one vocabulary, from evenly spaced blocks of large ones."""
    counts = np.zeros(vocab_size, np.int64)
    for prefix in prefixes:
        tokens = open_tokens(prefix, read_header(prefix))
        blocks = -(-tokens.size // BLOCK)
        wanted = min(blocks, max(1, MAX_TOKENS // BLOCK // len(prefixes)))
        for place in np.unique(np.linspace(0, blocks - 1, wanted).astype(np.int64)):
            counts += np.bincount(tokens[place * BLOCK : (place + 1) * BLOCK], minlength=vocab_size)
    total = int(counts.sum())
    shares = counts[counts > 0] / total
    order = np.argsort(-counts, kind="stable")[:top]
    return Tokens(
        counted=total,
        distinct=int(np.count_nonzero(counts)),
        vocabulary=vocab_size,
        entropy_bits=float(-(shares * np.log2(shares)).sum()),
        top=[(int(place), float(counts[place] / total)) for place in order if counts[place]],
    )


def jsonl_lines(paths: list[Path]) -> Iterator[bytes]:
    """Lines of JSONL files."""
    for path in paths:
        with path.open("rb") as stream:
            yield from stream
