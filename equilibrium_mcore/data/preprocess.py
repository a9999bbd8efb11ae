"""JSONL in, Megatron's .bin/.idx out: ordered, in a stream, on several processes.

The inputs are cut into ranges of whole lines. Only (file, start, end) goes to a worker, which
reads its range itself; token ids come back as bytes, are written in order, and forgotten. At most
`IN_FLIGHT_PER_WORKER` ranges per worker are under way, so memory does not grow with the input.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from equilibrium_mcore.config.schema import TokenizerConfig
from equilibrium_mcore.data.indexed_files import IndexedWriter, Manifest, token_dtype
from equilibrium_mcore.data.tokenizer import Tokenizer, load_tokenizer

RANGE_BYTES = 1 << 20
IN_FLIGHT_PER_WORKER = 4
BAD_LINES_SHOWN = 20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class Range:
    """Whole lines of one file, as bytes [start, end). `encode` off: only look for bad lines."""

    path: Path
    start: int
    end: int
    encode: bool = True


@dataclass
class Encoded:
    """What a worker makes of a Range; line numbers count from 1 within it."""

    lines: int = 0
    tokens: dict[str, bytes] = field(default_factory=dict)
    lengths: dict[str, np.ndarray] = field(default_factory=dict)
    bad_lines: list[tuple[int, str]] = field(default_factory=list)
    bad_count: int = 0


class BadLinesError(ValueError):
    """Lines that are not documents, when `skip_bad_lines` is off."""


@dataclass(frozen=True)
class PreprocessSummary:
    """What was written, for each key."""

    prefixes: dict[str, Path]
    documents: int
    tokens: dict[str, int]
    bytes_read: int
    skipped_lines: int
    seconds: float


@dataclass(frozen=True)
class LineEncoder:
    """Lines of a Range to token ids; lives in each worker."""

    tokenizer: Tokenizer
    keys: Sequence[str]
    append_eod: bool

    def encode_range(self, piece: Range) -> Encoded:
        """Read the range, encode its documents, note its bad lines."""
        with piece.path.open("rb") as stream:
            stream.seek(piece.start)
            data = stream.read(piece.end - piece.start)
        if piece.start == 0:
            data = data.removeprefix(BYTE_ORDER_MARK)
        result = Encoded()
        dtype = token_dtype(self.tokenizer.vocab_size)
        ids: dict[str, list[np.ndarray]] = {key: [] for key in self.keys}
        for line in data.removesuffix(b"\n").split(b"\n") if data else []:
            result.lines += 1
            if not line.strip():
                continue
            try:
                texts = parse_line(line, self.keys)
            except ValueError as error:
                result.bad_count += 1
                if len(result.bad_lines) < BAD_LINES_SHOWN:
                    result.bad_lines.append((result.lines, str(error)))
                continue
            if piece.encode:
                for key, text in zip(self.keys, texts, strict=True):
                    ids[key].append(np.array(self._encode(text), dtype=dtype))
        for key, documents in ids.items():
            joined = np.concatenate(documents) if documents else np.empty(0, dtype)
            result.tokens[key] = joined.tobytes()
            result.lengths[key] = np.array([document.size for document in documents], np.int32)
        return result

    def _encode(self, text: str) -> list[int]:
        ids = self.tokenizer.encode(text)
        # An empty text stays empty, as in Megatron-LM.
        return [*ids, self.tokenizer.eod] if ids and self.append_eod else ids


def parse_line(line: bytes, keys: Sequence[str]) -> list[str]:
    """The texts under `keys`. Raises ValueError that says what is wrong with the line."""
    try:
        record = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"not UTF-8 (byte {error.start} of the line)") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON ({error.msg} at column {error.colno})") from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"not usable JSON ({error})") from None
    if not isinstance(record, dict):
        raise ValueError(f"not a JSON object but {_json_name(record)}")
    texts = []
    for key in keys:
        if key not in record:
            held = ", ".join(map(repr, list(record)[:8])) or "no key"
            raise ValueError(f"no key {key!r}; it has {held}")
        text = record[key]
        if not isinstance(text, str):
            raise ValueError(f"{key!r} is not a string but {_json_name(text)}")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:
            raise ValueError(f"{key!r} holds half of a surrogate pair, which is no text") from None
        texts.append(text)
    return texts


def _json_name(value: object) -> str:
    names = {dict: "an object", list: "an array", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")


# ------------------------------------------------------------------------------------ the line


def preprocess(
    *,
    inputs: Sequence[Path],
    output_prefix: Path,
    tokenizer: TokenizerConfig,
    json_keys: Sequence[str] = ("text",),
    append_eod: bool = False,
    workers: int = 1,
    skip_bad_lines: bool = False,
    overwrite: bool = False,
    range_bytes: int = RANGE_BYTES,
) -> PreprocessSummary:
    """Write `<output_prefix>_<key>_document.{bin,idx,json}` for each key.

    Raises FileNotFoundError, FileExistsError, BadLinesError (unless `skip_bad_lines`) and
    ValueError (no document, no such tokenizer). On any of them no final name is taken.
    """
    started = time.perf_counter()
    _check_arguments(inputs, json_keys, workers)
    loaded = load_tokenizer(tokenizer)
    dtype = token_dtype(loaded.vocab_size)
    prefixes = {key: Path(f"{output_prefix}_{key}_document") for key in json_keys}
    bad = _BadLines(skip_bad_lines)
    with ExitStack() as stack:
        run = stack.enter_context(_Runner(tokenizer, json_keys, append_eod, workers))
        writers = {
            key: stack.enter_context(IndexedWriter(prefix, dtype, overwrite=overwrite))
            for key, prefix in prefixes.items()
        }
        lines = _write_documents(inputs, range_bytes, run, writers, bad)
        bad.finish()
        facts = [
            {"path": str(path), "bytes": path.stat().st_size, "lines": lines[path]}
            for path in inputs
        ]
        for key, writer in writers.items():
            if writer.tokens == 0:
                raise ValueError(
                    f"{', '.join(map(str, inputs))}: no line holds any text under {key!r}, so "
                    f"there is nothing to write"
                )
            writer.finish()
        for key, writer in writers.items():
            writer.publish(
                Manifest(
                    tokenizer_type=loaded.kind,
                    tokenizer_sha256=loaded.fingerprint,
                    vocab_size=loaded.vocab_size,
                    eod=loaded.eod,
                    append_eod=append_eod,
                    key=key,
                    documents=writer.documents,
                    tokens=writer.tokens,
                    largest_token=writer.largest_token,
                    dtype=writer.dtype.name,
                    skipped_lines=bad.count,
                    inputs=facts,
                )
            )
    return PreprocessSummary(
        prefixes=prefixes,
        documents=next(iter(writers.values())).documents,
        tokens={key: writer.tokens for key, writer in writers.items()},
        bytes_read=sum(fact["bytes"] for fact in facts),
        skipped_lines=bad.count,
        seconds=time.perf_counter() - started,
    )


def _write_documents(
    inputs: Sequence[Path],
    range_bytes: int,
    run: _Runner,
    writers: dict[str, IndexedWriter],
    bad: _BadLines,
) -> dict[Path, int]:
    """Encode every range and write it in order; returns the lines of each input."""
    lines = dict.fromkeys(inputs, 0)
    ranges = (piece for path in inputs for piece in line_ranges(path, range_bytes))
    with _progress_bar(sum(path.stat().st_size for path in inputs)) as progress:
        # Behind a bad line nothing will be published: the rest is only searched for more of them.
        for piece, encoded in run.in_order(ranges, encode=lambda: not bad.fatal):
            bad.note(piece.path, lines[piece.path], encoded)
            lines[piece.path] += encoded.lines
            if not bad.fatal:
                for key, writer in writers.items():
                    writer.add(encoded.tokens[key], encoded.lengths[key])
            progress.update(piece.end - piece.start)
    return lines


def line_ranges(path: Path, range_bytes: int) -> Iterator[Range]:
    """Cut a file into ranges of about `range_bytes`, each ending behind a newline."""
    size = path.stat().st_size
    with path.open("rb") as stream:
        start = 0
        while start < size:
            stream.seek(min(start + range_bytes, size))
            stream.readline()  # to the end of the line that the cut fell into
            end = min(stream.tell(), size)
            yield Range(path, start, end)
            start = end


def _check_arguments(inputs: Sequence[Path], keys: Sequence[str], workers: int) -> None:
    missing = [str(path) for path in inputs if not path.is_file()]
    if missing:
        raise FileNotFoundError(f"--input: no such file: {', '.join(missing)}")
    for name, values in (("--input", [str(p) for p in inputs]), ("--json-keys", list(keys))):
        double = sorted({value for value in values if values.count(value) > 1})
        if double:
            raise ValueError(f"{name} names {', '.join(double)} more than once")
    if workers < 1:
        raise ValueError(f"--workers {workers}: at least 1 is needed")


class _BadLines:
    """Counts bad lines, shows the first, and decides whether the run can still succeed."""

    def __init__(self, skip: bool) -> None:
        self.skip = skip
        self.count = 0
        self.shown: list[str] = []

    @property
    def fatal(self) -> bool:
        return self.count > 0 and not self.skip

    def note(self, path: Path, lines_before: int, encoded: Encoded) -> None:
        self.count += encoded.bad_count
        for number, reason in encoded.bad_lines[: BAD_LINES_SHOWN - len(self.shown)]:
            self.shown.append(f"{path}, line {lines_before + number}: {reason}")
            print(self.shown[-1], file=sys.stderr)

    def finish(self) -> None:
        if self.count > len(self.shown):
            print(f"... and {self.count - len(self.shown):,} more", file=sys.stderr)
        if self.fatal:
            raise BadLinesError(
                f"{self.count:,} bad lines, the first: {self.shown[0]}. Nothing was written. "
                f"Repair them, or leave them out with --skip-bad-lines"
            )


# ------------------------------------------------------------------------------------ workers


class _Runner:
    """Maps ranges to Encoded in order: in this process, or on a bounded queue of workers."""

    def __init__(
        self, tokenizer: TokenizerConfig, keys: Sequence[str], append_eod: bool, workers: int
    ) -> None:
        self._arguments = (tokenizer, tuple(keys), append_eod)
        self._in_flight = workers * IN_FLIGHT_PER_WORKER
        self._pool: ProcessPoolExecutor | None = None
        if workers > 1:
            method = "fork" if sys.platform == "linux" else "spawn"
            self._pool = ProcessPoolExecutor(
                workers,
                mp_context=multiprocessing.get_context(method),
                initializer=_start_worker,
                initargs=(os.getpid(), *self._arguments),
            )
            # Fork now: later there are locked files to inherit, and the bar's thread.
            self._pool.submit(os.getpid).result()

    def __enter__(self) -> _Runner:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)

    def in_order(self, ranges: Iterator[Range], *, encode) -> Iterator[tuple[Range, Encoded]]:
        """Yields (range, result) in order; `encode()` says whether new ranges need token ids."""
        if self._pool is None:
            encoder = _make_encoder(*self._arguments)
            for piece in ranges:
                yield piece, encoder.encode_range(_with_encode(piece, encode()))
            return
        pending: deque = deque()
        for piece in ranges:
            job = self._pool.submit(_encode_in_worker, _with_encode(piece, encode()))
            pending.append((piece, job))
            if len(pending) >= self._in_flight:
                oldest, job = pending.popleft()
                yield oldest, job.result()
        for piece, job in pending:
            yield piece, job.result()


_worker_encoder: LineEncoder | None = None


def _make_encoder(tokenizer: TokenizerConfig, keys: Sequence[str], append_eod: bool) -> LineEncoder:
    return LineEncoder(load_tokenizer(tokenizer), keys, append_eod)


def _start_worker(
    parent: int, tokenizer: TokenizerConfig, keys: Sequence[str], append_eod: bool
) -> None:
    """Load the tokenizer, and leave when the parent is gone: a killed parent cannot say so."""
    global _worker_encoder
    # The parent ends its workers; a signal to the whole group must not reach them first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # Each process is one core's worth; the tokenizers library would start threads in each.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    threading.Thread(target=_exit_with_parent, args=(parent,), daemon=True).start()
    _worker_encoder = _make_encoder(tokenizer, keys, append_eod)


def _exit_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _encode_in_worker(piece: Range) -> Encoded:
    assert _worker_encoder is not None
    return _worker_encoder.encode_range(piece)


def _with_encode(piece: Range, encode: bool) -> Range:
    return Range(piece.path, piece.start, piece.end, encode)


def _progress_bar(total_bytes: int):
    """A bar on a terminal; nothing in a log file, where the summary is enough."""
    from tqdm import tqdm

    return tqdm(total=total_bytes, unit="B", unit_scale=True, desc="tokenizing", disable=None)
