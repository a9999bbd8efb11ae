"""One preprocessing run: its files, how far they are, and what is left when it ends."""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count
from pathlib import Path

from equilibrium_mcore.corpus.encode import EncoderPlan
from equilibrium_mcore.corpus.finished import Request
from equilibrium_mcore.corpus.indexed_writer import IndexedWriter
from equilibrium_mcore.corpus.journal import Journal, Savepoint
from equilibrium_mcore.corpus.workers import Encoded, EncodingTask, Workers
from equilibrium_mcore.data.indexed_files import Manifest
from equilibrium_mcore.data.inputs import Input, Range, RangeCutter, Window

BAD_LINES_SHOWN = 20


class BadLinesError(ValueError):
    """Lines that are not documents, when `skip_bad_lines` is off."""


class PreprocessRun:
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

    def resume(self, restart: bool) -> None:
        """Go on from what a stopped run left, or begin."""
        left = None if restart else self.journal.read()
        if left and all(self.writers[key].holds(state) for key, state in left.writers.items()):
            self.position, self.lines = left.position, left.lines
            self.bad.count = left.skipped_lines
            self.journaled = True
            number, offset = left.position
            name = self.inputs[number].path if number < len(self.inputs) else "the end"
            print(f"{self.journal.path}: resuming at {name}, byte {offset:,}", file=sys.stderr)
        for key, writer in self.writers.items():
            writer.rewind(left.writers[key] if self.journaled and left else None)
        self._remove_spooled()

    def write_all(
        self, pool: Workers, job: EncodingTask, *, range_bytes: int, told_to_stop: Callable[[], int]
    ) -> None:
        """Encode every range and write it in order; complain of bad lines at the end."""
        spool = partial(next, map(self._spool_path, count()))
        cutter = RangeCutter(self.inputs, self.windows, range_bytes=range_bytes, spool=spool)
        ranges = cutter.ranges(self.position)
        journaled_at = time.monotonic()
        with _progress_bar(sum(end - start for start, end in self.windows)) as advance:
            # After a bad line nothing will be published: the rest is only searched for more.
            done = pool.in_order(ranges, job, encode=lambda: not self.bad.fatal)
            for piece, encoded in self._kept_if_a_worker_dies(done):
                self._take(piece, encoded)
                advance(piece.disk_bytes)
                if told_to_stop():
                    self._write_journal()
                    print("stopped; the same command resumes from here", file=sys.stderr)
                    raise SystemExit(128 + told_to_stop())
                if time.monotonic() - journaled_at >= self.journal_seconds:
                    self._write_journal()
                    journaled_at = time.monotonic()
        self.bad.finish(kept=self.journaled)

    def _kept_if_a_worker_dies(
        self, done: Iterator[tuple[Range, Encoded]]
    ) -> Iterator[tuple[Range, Encoded]]:
        try:
            yield from done
        except ChildProcessError:
            self._write_journal()  # between two ranges: what was written is whole
            raise

    def publish(self, plan: EncoderPlan, request: Request) -> None:
        """Finish every key's files, and give them their final names.

        Between the two the journal says so: after a kill the next run only gives the names.
        """
        names = ", ".join(str(item.path) for item in self.inputs[:5])
        for key, writer in self.writers.items():
            if writer.tokens == 0 and request.partition is None:
                raise ValueError(
                    f"{names}{', ...' if len(self.inputs) > 5 else ''}: no line holds any text "
                    f"under {key!r}, so there is nothing to write"
                )
            writer.finish()
        for key, writer in self.writers.items():
            writer.stage(self._manifest(key, plan, request))
        self._write_journal(whole=True)
        for writer in self.writers.values():
            writer.publish()
        self.journal.remove()
        self.journaled = False

    def _manifest(self, key: str, plan: EncoderPlan, request: Request) -> Manifest:
        writer = self.writers[key]
        return Manifest(
            tokenizer_type=plan.kind,
            tokenizer_sha256=plan.fingerprint,
            vocab_size=plan.vocab_size,
            eod=plan.eod,
            append_eod=request.append_eod,
            key=key,
            documents=writer.documents,
            tokens=writer.tokens,
            largest_token=writer.largest_token,
            dtype=writer.dtype.name,
            skipped_lines=self.bad.count,
            inputs=[
                {
                    "path": str(item.path),
                    "bytes": item.size,
                    "modified_ns": item.modified_ns,
                    "lines": self.lines.get(number, 0),
                }
                for number, item in enumerate(self.inputs)
            ],
            partition=request.partition,
        )

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
        """Number within its file of a line that is the `line`-th after what was taken so far."""
        begin = self.windows[number][0]
        before = 0
        if begin:  # lines of other partitions are counted when there is something to say
            with self.inputs[number].path.open("rb") as stream:
                while block := stream.read(min(1 << 20, begin - stream.tell())):
                    before += block.count(b"\n")
        return before + self.lines.get(number, 0) + line

    def _write_journal(self, *, whole: bool = False) -> None:
        if self.bad.fatal or (self.position == (0, 0) and not whole):
            return  # what was written before the first bad line may be journaled already
        if not whole:
            for writer in self.writers.values():
                writer.sync()
        states = {key: writer.state for key, writer in self.writers.items()}
        self.journal.write(Savepoint(self.position, self.lines, self.bad.count, states, whole))
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
                "What was written before it is kept: with --skip-bad-lines the run resumes "
                "from there"
                if kept
                else "Nothing was written. Repair them, or leave them out with --skip-bad-lines"
            )
            raise BadLinesError(f"{self.count:,} bad lines, the first: {self.shown[0]}. {written}")


@contextmanager
def stop_signals() -> Iterator[Callable[[], int]]:
    """A function that gives the signal which asked this process to stop, or 0."""
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
