"""Ranges of text to token ids: what one worker does, and a pool of them that keeps the order.

Only the names of ranges go to a worker and only token ids come back; texts do not travel. At most
`IN_FLIGHT_PER_WORKER` ranges per worker are under way, so memory does not grow with the input.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

import numpy as np

from equilibrium_mcore.corpus.encode import (
    THREAD_VARIABLES,
    BatchEncoder,
    EncoderPlan,
    open_encoder,
)
from equilibrium_mcore.data.inputs import BYTE_ORDER_MARK, Range, read_span
from equilibrium_mcore.data.jsonl import parse_lines
from equilibrium_mcore.processes.ordered_pool import OrderedPool

IN_FLIGHT_PER_WORKER = 3
BAD_LINES_KEPT = 20  # of a range


@dataclass(frozen=True)
class EncodingTask:
    """What is the same for all ranges of a run."""

    plan: EncoderPlan
    keys: tuple[str, ...]
    append_eod: bool


@dataclass
class Encoded:
    """What becomes of a Range.

    Attributes:
        lines: of each span.
        tokens, lengths: per key, ids as bytes and each document's number of them (int32).
        bad_lines: number of the span, of the line within it (from 1), and the reason.
    """

    lines: list[int] = field(default_factory=list)
    tokens: dict[str, bytes] = field(default_factory=dict)
    lengths: dict[str, np.ndarray] = field(default_factory=dict)
    bad_lines: list[tuple[int, int, str]] = field(default_factory=list)
    bad_count: int = 0


def encode_range(piece: Range, encoder: BatchEncoder, job: EncodingTask) -> Encoded:
    """Read the range, encode its documents, note its bad lines."""
    result = Encoded()
    documents: list[tuple[str, ...]] = []
    for number, span in enumerate(piece.spans):
        data = read_span(span)
        if span.head:
            data = data.removeprefix(BYTE_ORDER_MARK)
        bad: list[tuple[int, str]] = []
        found, lines = parse_lines(data, job.keys, bad)
        documents += found
        result.lines.append(lines)
        result.bad_count += len(bad)
        room = BAD_LINES_KEPT - len(result.bad_lines)
        result.bad_lines += [(number, line, reason) for line, reason in bad[:room]]
    if piece.encode:
        for column, key in enumerate(job.keys):
            ids, lengths = encoder.encode([texts[column] for texts in documents])
            if job.append_eod:
                ids, lengths = with_eod(ids, lengths, encoder.eod)
            result.tokens[key] = ids.tobytes()
            result.lengths[key] = lengths.astype(np.int32)
    return result


def with_eod(ids: np.ndarray, lengths: np.ndarray, eod: int) -> tuple[np.ndarray, np.ndarray]:
    """The end-of-document id after each document; an empty one stays empty, as in Megatron-LM."""
    filled = lengths > 0
    ends = np.cumsum(lengths)[filled]
    longer = np.empty(ids.size + ends.size, ids.dtype)
    at = ends + np.arange(ends.size)
    is_text = np.ones(longer.size, bool)
    is_text[at] = False
    longer[at] = eod
    longer[is_text] = ids
    return longer, lengths + filled


# ------------------------------------------------------------------------------------ pool


class Workers:
    """Maps ranges to Encoded in order: in this process, or by `count` workers.

    Make it before anything starts a thread, as an `OrderedPool`.
    """

    def __init__(self, count: int) -> None:
        self._stack = contextlib.ExitStack()
        self._pool: OrderedPool | None = None
        if count > 1:
            pool = OrderedPool(count, ahead_per_worker=IN_FLIGHT_PER_WORKER, start=_start_worker)
            self._pool = self._stack.enter_context(pool)

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.__exit__(*error)

    def in_order(
        self, ranges: Iterator[Range], job: EncodingTask, *, encode: Callable[[], bool]
    ) -> Iterator[tuple[Range, Encoded]]:
        """Yields (range, result) in order; `encode()` says whether new ranges need token ids.

        Raises ChildProcessError where a worker dies.
        """
        tasks = (replace(piece, encode=encode()) for piece in ranges)
        for piece, encoded in self._encoded(tasks, job):
            yield piece, encoded
            if piece.spooled is not None:
                piece.spooled.unlink(missing_ok=True)

    def _encoded(
        self, tasks: Iterator[Range], job: EncodingTask
    ) -> Iterator[tuple[Range, Encoded]]:
        if self._pool is None:
            encoder = open_encoder(job.plan)
            yield from ((piece, encode_range(piece, encoder, job)) for piece in tasks)
            return
        for piece, done in self._pool.in_order(_encode_in_worker, tasks, job):
            yield piece, done.result()


# ------------------------------------------------------------------------------------ in a worker

_opened: dict[EncoderPlan, BatchEncoder] = {}  # of this worker process


def _start_worker() -> None:
    # Each process is one core's worth; the libraries would start threads in each.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.environ.update(dict.fromkeys(THREAD_VARIABLES, "1"))


def _encode_in_worker(piece: Range, job: EncodingTask) -> Encoded:
    if job.plan not in _opened:
        _opened[job.plan] = open_encoder(job.plan)
    return encode_range(piece, _opened[job.plan], job)
