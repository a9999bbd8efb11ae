"""Input files cut into ranges of whole lines, which a worker reads by itself.

A plain file is cut at newlines; many small files make one range, so that ten thousand of them cost
what one large file costs. A compressed file (gzip, Zstandard) is one stream: a small one goes to a
worker whole, a large one is decompressed here, piece by piece, into temporary files that workers
read like any other. A Range ends with the position after it, from which a later run can resume.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from equilibrium_mcore.data.compression import compression_of, decompressed_blocks
from equilibrium_mcore.files.named import open_named

RANGE_BYTES = 4 << 20
BYTE_ORDER_MARK = b"\xef\xbb\xbf"  # of UTF-8, which some editors put in front of a file

Position = tuple[int, int]  # number of the input, byte of its (decompressed) content
Window = tuple[int, int]  # bytes [start, end) of an input


@dataclass(frozen=True)
class Input:
    """An input as it was when the run began; `compression` is None, "gzip" or "zstd"."""

    path: Path
    size: int
    modified_ns: int
    compression: str | None


@dataclass(frozen=True)
class InputSlice:
    """Whole lines of one input: bytes [start, end) of `path`, or all of a compressed file.

    Attributes:
        number: which input.
        source: that input's path, for messages.
        head: whether it starts where the input starts.
    """

    number: int
    source: Path
    path: Path
    start: int
    end: int
    head: bool
    compression: str | None = None


@dataclass(frozen=True)
class Range:
    """What a worker gets at a time.

    Attributes:
        spans: in the order of the inputs.
        after: where the next range begins.
        disk_bytes: of the inputs, for the progress bar.
        spooled: a temporary file to be removed when the range is done.
        encode: off: only look for bad lines.
    """

    spans: tuple[InputSlice, ...]
    after: Position
    disk_bytes: int
    spooled: Path | None = None
    encode: bool = True


def list_inputs(paths: Sequence[Path], *, allow_repeats: bool = False) -> list[Input]:
    """Look at every input once.

    Raises FileNotFoundError and ValueError that name the files, also for a file that is given
    twice, by one name or by two (a link), unless `allow_repeats`.
    """
    items: list[Input] = []
    missing: list[str] = []
    repeats: list[str] = []
    seen: dict[tuple[int, int], Path] = {}
    for path in paths:
        try:
            item, identity = _look_at(path)
        except (FileNotFoundError, IsADirectoryError):
            missing.append(str(path))
            continue
        items.append(item)
        if (first := seen.get(identity)) is not None:
            repeats.append(str(path) if first == path else f"{path} (which is {first})")
        seen.setdefault(identity, path)
    if missing:
        more = f" and {len(missing) - 5:,} more" if len(missing) > 5 else ""
        raise FileNotFoundError(f"--input: no such file: {', '.join(missing[:5])}{more}")
    if repeats and not allow_repeats:
        raise ValueError(
            f"--input names {', '.join(repeats[:5])} more than once: its documents would count "
            f"twice. Name each file once, or say that it is meant with --allow-repeats"
        )
    return items


def _look_at(path: Path) -> tuple[Input, tuple[int, int]]:
    """An input, and which file of the file system it is."""
    compression = compression_of(path)
    status = path.stat()
    item = Input(path, status.st_size, status.st_mtime_ns, compression)
    return item, (status.st_dev, status.st_ino)


def read_span(span: InputSlice) -> bytes:
    """The span's bytes, decompressed. Raises ValueError if the file has changed or is damaged."""
    if span.compression is not None:
        return b"".join(block for block, _ in decompressed_blocks(span.path, span.compression))
    with span.path.open("rb") as stream:
        stream.seek(span.start)
        data = stream.read(span.end - span.start)
    if len(data) != span.end - span.start:
        raise ValueError(
            f"{span.path} became shorter while it was read: its bytes {span.start:,} to "
            f"{span.end:,} are not there any more. Start again when it has stopped changing"
        )
    return data


# ------------------------------------------------------------------------------------ ranges


class RangeCutter:
    """Cuts inputs into ranges of about `range_bytes`, from a position on.

    Args:
        windows: the part of each input that is wanted, as `partition_windows` gives it.
        spool: names a new temporary file for a piece of decompressed content.
    """

    def __init__(
        self,
        inputs: Sequence[Input],
        windows: Sequence[Window],
        *,
        range_bytes: int,
        spool: Callable[[], Path],
    ) -> None:
        self.inputs = inputs
        self.windows = windows
        self.range_bytes = range_bytes
        self.spool = spool
        self._spans: list[InputSlice] = []
        self._bytes = 0

    def ranges(self, start: Position = (0, 0)) -> Iterator[Range]:
        """Ranges in order; `after` of a range is a `start` for a later run."""
        first, offset = start
        for number in range(first, len(self.inputs)):
            item = self.inputs[number]
            begin, end = self.windows[number]
            if begin >= end:
                continue
            begin = max(begin, offset) if number == first else begin
            if item.compression is None:
                yield from self._plain(number, begin, end)
            elif item.size > self.range_bytes // 4:
                yield from self._flush((number, 0))
                yield from self._stream(number, begin)
            elif begin == 0:  # a small one is done or not: there is no position within it
                self._add(
                    InputSlice(number, item.path, item.path, 0, item.size, True, item.compression)
                )
            if self._bytes >= self.range_bytes:
                yield from self._flush((number + 1, 0))
        yield from self._flush((len(self.inputs), 0))

    def _add(self, span: InputSlice) -> None:
        self._spans.append(span)
        self._bytes += span.end - span.start

    def _flush(self, after: Position) -> Iterator[Range]:
        if self._spans:
            yield Range(tuple(self._spans), after, self._bytes)
            self._spans, self._bytes = [], 0

    def _plain(self, number: int, begin: int, end: int) -> Iterator[Range]:
        path = self.inputs[number].path
        if end - begin > self.range_bytes - self._bytes:
            with path.open("rb") as stream:
                while end - begin > self.range_bytes - self._bytes:
                    cut = min(line_start(stream, begin + self.range_bytes - self._bytes), end)
                    self._add(InputSlice(number, path, path, begin, cut, begin == 0))
                    yield from self._flush((number, cut))
                    begin = cut
        if begin < end:
            self._add(InputSlice(number, path, path, begin, end, begin == 0))

    def _stream(self, number: int, skip: int) -> Iterator[Range]:
        """A large compressed file, from byte `skip` of its content on."""
        item = self.inputs[number]
        position = held = told = read = 0
        pieces: list[bytes] = []
        for block, read in decompressed_blocks(item.path, item.compression or ""):
            if position + len(block) <= skip:
                position += len(block)
                continue
            block = block[max(0, skip - position) :]
            position = max(position, skip) + len(block)
            cut = block.rfind(b"\n") + 1
            if held + len(block) < self.range_bytes or cut == 0:
                pieces.append(block)
                held += len(block)
                continue
            rest = block[cut:]
            yield self._spooled(number, [*pieces, block[:cut]], position - len(rest), read - told)
            told = read
            pieces, held = [rest], len(rest)
        if held:
            yield self._spooled(number, pieces, position, read - told)

    def _spooled(self, number: int, pieces: list[bytes], after: int, read: int) -> Range:
        path = self.spool()
        with open_named(
            path, "wb"
        ) as stream:  # not whole: a worker reads it once, then it is removed
            stream.writelines(pieces)
        size = sum(map(len, pieces))
        span = InputSlice(number, self.inputs[number].path, path, 0, size, after == size)
        return Range((span,), (number, after), read, spooled=path)


def line_start(stream, offset: int) -> int:
    """The first byte at or after `offset` at which a line starts (or the end of the file)."""
    if offset == 0:
        return 0
    stream.seek(offset - 1)
    stream.readline()
    return stream.tell()


def partition_windows(
    inputs: Sequence[Input], *, partition: int = 1, partitions: int = 1
) -> list[Window]:
    """The bytes of each input that partition K of N gets: its lines start there.

    Partitions are equal shares of the bytes on disk, in order. A compressed file goes whole to the
    one in which it starts.
    """
    total = sum(item.size for item in inputs)
    low, high = (total * k // partitions for k in (partition - 1, partition))
    windows: list[Window] = []
    at = 0
    for item in inputs:
        first, last = (min(max(0, cut - at), item.size) for cut in (low, high))
        if item.compression is not None:
            mine = low <= at < high
            windows.append((0, item.size) if mine else (0, 0))
        elif first >= last or (first, last) == (0, item.size):
            windows.append((first, last))
        else:
            with item.path.open("rb") as stream:
                windows.append((line_start(stream, first), line_start(stream, last)))
        at += item.size
    return windows
