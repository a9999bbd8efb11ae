"""JSONL in, Megatron's .bin/.idx out: ordered, in a stream, on several processes.

`inputs.py` cuts the inputs into ranges of whole lines, `workers.py` makes token ids of them, and
here they are written in order and forgotten: memory does not grow with the input. Every
`JOURNAL_SECONDS` the files aside go to disk and the journal says how far they are whole, from
where a run goes on that was killed.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path

from equilibrium_mcore.config.schema import TokenizerConfig
from equilibrium_mcore.data.encode import EncoderChoice, EncoderPlan, plan_encoder
from equilibrium_mcore.data.indexed_files import IndexedWriter, Manifest, dataset_paths
from equilibrium_mcore.data.inputs import (
    RANGE_BYTES,
    Input,
    Range,
    RangeCutter,
    Window,
    list_inputs,
    partition_windows,
)
from equilibrium_mcore.data.journal import Journal, Progress, describe_run
from equilibrium_mcore.data.workers import Encoded, Job, Workers
from equilibrium_mcore.files.replace import refuse_sources
from equilibrium_mcore.processes.threads import available_cores

BAD_LINES_SHOWN = 20
JOURNAL_SECONDS = 20.0


class BadLinesError(ValueError):
    """Lines that are not documents, when `skip_bad_lines` is off."""


@dataclass(frozen=True)
class PreprocessSummary:
    """What was written, for each key; bytes are those of the inputs on disk."""

    prefixes: dict[str, Path]
    documents: int
    tokens: dict[str, int]
    bytes_read: int
    skipped_lines: int
    seconds: float


def preprocess(
    *,
    inputs: Sequence[Path],
    output_prefix: Path,
    tokenizer: TokenizerConfig,
    json_keys: Sequence[str] = ("text",),
    append_eod: bool = False,
    workers: int | None = None,
    encoder: EncoderChoice = "auto",
    skip_bad_lines: bool = False,
    overwrite: bool = False,
    restart: bool = False,
    partition: int = 1,
    partitions: int = 1,
    range_bytes: int = RANGE_BYTES,
    journal_seconds: float = JOURNAL_SECONDS,
) -> PreprocessSummary:
    """Write `<output_prefix>_<key>_document.{bin,idx,json}` for each key.

    Args:
        workers: processes; None takes the cores that this process may use.
        restart: forget what a stopped run left, instead of going on from it.
        partition, partitions: write only the lines of part K of N, counted from 1.

    Raises FileNotFoundError, FileExistsError, BadLinesError (unless `skip_bad_lines`) and
    ValueError (no document, no such tokenizer, an input that is damaged, a journal of another
    run). On any of them no final name is taken.
    """
    started = time.perf_counter()
    workers = available_cores() if workers is None else workers
    _check_arguments(json_keys, workers, partition, partitions)
    items = list_inputs(inputs)
    prefixes = output_prefixes(output_prefix, json_keys)
    written = [path for prefix in prefixes.values() for path in dataset_paths(prefix)]
    refuse_sources(written, [*inputs, tokenizer.model], option="--output-prefix")
    with ExitStack() as stack:
        # First of all: workers are forked, and later there are locked files and threads.
        pool = stack.enter_context(Workers(workers))
        plan = plan_encoder(tokenizer, choice=encoder)
        writers = {
            key: stack.enter_context(IndexedWriter(prefix, plan.dtype.type, overwrite=overwrite))
            for key, prefix in prefixes.items()
        }
        facts = describe_run(
            items,
            tokenizer={"sha256": plan.fingerprint, "end of document": plan.eod},
            options={
                "--json-keys": list(json_keys),
                "--append-eod": append_eod,
                "partition": f"{partition} of {partitions}",
            },
        )
        journal = Journal(Path(f"{next(iter(prefixes.values()))}.journal.partial"), facts)
        windows = partition_windows(items, partition=partition, partitions=partitions)
        run = _Run(items, windows, writers, journal, skip_bad_lines, journal_seconds)
        stack.push(run.leave)
        run.take_up(restart)
        with _stop_signals() as told_to_stop:
            job = Job(plan, tuple(json_keys), append_eod)
            run.write_all(pool, job, range_bytes=range_bytes, told_to_stop=told_to_stop)
        run.publish(plan, append_eod, may_be_empty=partitions > 1)
    return PreprocessSummary(
        prefixes=prefixes,
        documents=next(iter(writers.values())).documents,
        tokens={key: writer.tokens for key, writer in writers.items()},
        bytes_read=sum(end - start for start, end in windows),
        skipped_lines=run.bad.count,
        seconds=time.perf_counter() - started,
    )


def output_prefixes(output_prefix: Path, keys: Sequence[str]) -> dict[str, Path]:
    """The dataset of each key; Megatron-LM's names."""
    return {key: Path(f"{output_prefix}_{key}_document") for key in keys}


def _check_arguments(keys: Sequence[str], workers: int, partition: int, partitions: int) -> None:
    double = sorted({key for key in keys if list(keys).count(key) > 1})
    if double:
        raise ValueError(f"--json-keys names {', '.join(double)} more than once")
    if workers < 1:
        raise ValueError(f"--workers {workers}: at least 1 is needed")
    if not 1 <= partition <= partitions:
        raise ValueError(f"--partition {partition}: partitions count from 1 to {partitions}")


class _Run:
    """The files of one run, what was read so far, and the journal of both."""

    def __init__(
        self,
        inputs: Sequence[Input],
        windows: Sequence[Window],
        writers: dict[str, IndexedWriter],
        journal: Journal,
        skip_bad_lines: bool,
        journal_seconds: float,
    ) -> None:
        self.inputs = inputs
        self.windows = windows
        self.writers = writers
        self.journal = journal
        self.journal_seconds = journal_seconds
        self.bad = _BadLines(skip_bad_lines)
        self.position = (0, 0)
        self.lines: dict[int, int] = {}
        self.journaled = False

    def take_up(self, restart: bool) -> None:
        """Go on from what a stopped run left, or begin."""
        left = None if restart else self.journal.read()
        if left and all(self.writers[key].holds(state) for key, state in left.writers.items()):
            self.position, self.lines = left.position, left.lines
            self.bad.count = left.skipped_lines
            self.journaled = True
            number, offset = left.position
            name = self.inputs[number].path if number < len(self.inputs) else "the end"
            print(f"{self.journal.path}: going on at {name}, byte {offset:,}", file=sys.stderr)
        for key, writer in self.writers.items():
            writer.rewind(left.writers[key] if self.journaled and left else None)
        self._remove_spooled()

    def write_all(
        self, pool: Workers, job: Job, *, range_bytes: int, told_to_stop: Callable[[], int]
    ) -> None:
        """Encode every range and write it in order; complain of bad lines at the end."""
        spool = partial(next, map(self._spool_path, count()))
        cutter = RangeCutter(self.inputs, self.windows, range_bytes=range_bytes, spool=spool)
        ranges = cutter.ranges(self.position)
        journaled_at = time.monotonic()
        with _progress_bar(sum(end - start for start, end in self.windows)) as advance:
            # Behind a bad line nothing will be published: the rest is only searched for more.
            for piece, encoded in pool.in_order(ranges, job, encode=lambda: not self.bad.fatal):
                self._take(piece, encoded)
                advance(piece.disk_bytes)
                if told_to_stop():
                    self._write_journal()
                    print("stopped; the same command goes on from here", file=sys.stderr)
                    raise SystemExit(128 + told_to_stop())
                if time.monotonic() - journaled_at >= self.journal_seconds:
                    self._write_journal()
                    journaled_at = time.monotonic()
        self.bad.finish(kept=self.journaled)

    def publish(self, plan: EncoderPlan, append_eod: bool, *, may_be_empty: bool) -> None:
        """Finish every key's files, and give them their final names."""
        names = ", ".join(str(item.path) for item in self.inputs[:5])
        for key, writer in self.writers.items():
            if writer.tokens == 0 and not may_be_empty:
                raise ValueError(
                    f"{names}{', ...' if len(self.inputs) > 5 else ''}: no line holds any text "
                    f"under {key!r}, so there is nothing to write"
                )
            writer.finish()
        facts = [
            {"path": str(item.path), "bytes": item.size, "lines": self.lines.get(number, 0)}
            for number, item in enumerate(self.inputs)
        ]
        for key, writer in self.writers.items():
            writer.publish(
                Manifest(
                    tokenizer_type=plan.kind,
                    tokenizer_sha256=plan.fingerprint,
                    vocab_size=plan.vocab_size,
                    eod=plan.eod,
                    append_eod=append_eod,
                    key=key,
                    documents=writer.documents,
                    tokens=writer.tokens,
                    largest_token=writer.largest_token,
                    dtype=writer.dtype.name,
                    skipped_lines=self.bad.count,
                    inputs=facts,
                )
            )
        self.journal.remove()
        self.journaled = False

    def leave(self, *_: object) -> None:
        """Without a journal, the writers remove their files; with one, a later run needs them."""
        self._remove_spooled()
        if self.journaled:
            for writer in self.writers.values():
                writer.keep()

    def _take(self, piece: Range, encoded: Encoded) -> None:
        self.bad.note(piece, encoded, self.line_number)
        if not self.bad.fatal:
            for key, writer in self.writers.items():
                writer.add(encoded.tokens[key], encoded.lengths[key])
            self.position = piece.after
        for span, lines in zip(piece.spans, encoded.lines, strict=True):
            self.lines[span.number] = self.lines.get(span.number, 0) + lines

    def line_number(self, number: int, line: int) -> int:
        """Number within its file of a line that is the `line`-th behind what was taken so far."""
        begin = self.windows[number][0]
        before = 0
        if begin:  # lines of other partitions are counted when there is something to say
            with self.inputs[number].path.open("rb") as stream:
                while block := stream.read(min(1 << 20, begin - stream.tell())):
                    before += block.count(b"\n")
        return before + self.lines.get(number, 0) + line

    def _write_journal(self) -> None:
        if self.bad.fatal or self.position == (0, 0):
            return  # what was written before the first bad line may be journaled already
        for writer in self.writers.values():
            writer.sync()
        states = {key: writer.state for key, writer in self.writers.items()}
        self.journal.write(Progress(self.position, self.lines, self.bad.count, states))
        self.journaled = True

    def _spool_path(self, number: int) -> Path:
        return self.journal.path.with_name(f"{self.journal.path.stem}.{number}.partial")

    def _remove_spooled(self) -> None:
        start = f"{self.journal.path.stem}."
        for path in self.journal.path.parent.iterdir():
            middle = path.name.removeprefix(start).removesuffix(".partial")
            if path.name.startswith(start) and middle.isdecimal():
                path.unlink(missing_ok=True)


class _BadLines:
    """Counts bad lines, shows the first, and decides whether the run can still succeed."""

    def __init__(self, skip: bool) -> None:
        self.skip = skip
        self.count = 0
        self.shown: list[str] = []

    @property
    def fatal(self) -> bool:
        return self.count > 0 and not self.skip

    def note(self, piece: Range, encoded: Encoded, line_number: Callable[[int, int], int]) -> None:
        self.count += encoded.bad_count
        for which, line, reason in encoded.bad_lines[: BAD_LINES_SHOWN - len(self.shown)]:
            span = piece.spans[which]
            self.shown.append(f"{span.source}, line {line_number(span.number, line)}: {reason}")
            print(self.shown[-1], file=sys.stderr)

    def finish(self, *, kept: bool) -> None:
        if self.count > len(self.shown):
            print(f"... and {self.count - len(self.shown):,} more", file=sys.stderr)
        if self.fatal:
            written = (
                "What was written before it is kept aside: with --skip-bad-lines the run goes on "
                "from there"
                if kept
                else "Nothing was written. Repair them, or leave them out with --skip-bad-lines"
            )
            raise BadLinesError(f"{self.count:,} bad lines, the first: {self.shown[0]}. {written}")


@contextmanager
def _stop_signals() -> Iterator[Callable[[], int]]:
    """A function that gives the signal which told this process to stop, or 0."""
    received = [0]
    if threading.current_thread() is not threading.main_thread():
        yield lambda: 0
        return
    before = {
        number: signal.signal(number, lambda number, _: received.__setitem__(0, number))
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield lambda: received[0]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def _progress_bar(total_bytes: int) -> Iterator[Callable[[int], object]]:
    """A bar on a terminal; nothing in a log file, where the summary is enough."""
    if not sys.stderr.isatty():
        yield lambda _: None
        return
    from tqdm import tqdm

    with tqdm(total=total_bytes, unit="B", unit_scale=True, desc="tokenizing") as bar:
        yield bar.update
