"""Megatron's indexed dataset on disk: a streaming writer, the manifest, and the checks on opening.

    PREFIX.bin   token ids, one document after the other
    PREFIX.idx   header, then per sequence its length (int32) and byte offset (int64), then the
                 sequence numbers at which documents end (int64)
    PREFIX.json  the manifest: which tokenizer, how many documents and tokens, from what

The format is that of `megatron.core.datasets.indexed_dataset` (0.19.2), byte for byte; there are
no torch and no megatron here, so that workers start fast. Memory is flat however many documents.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import struct
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

from equilibrium_mcore.files.replace import refuse_existing

MAGIC = b"MMIDIDX\x00\x00"
VERSION = 1
HEADER_BYTES = 34
DTYPE_CODES: dict[type, int] = {np.int32: 4, np.uint16: 8}
CODE_DTYPES: dict[int, type] = {
    1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16,
}  # fmt: skip
# megatron-core's own limit (DType.optimal_dtype), a little below 2^16.
UINT16_VOCABULARY_LIMIT = 65500
LENGTH_BYTES = 4
COPY_BLOCK = 1 << 18  # sequences handled at a time when the index is written
LOCK_PATIENCE_SECONDS = 5.0  # workers of a killed run hold its lock for a moment
SAMPLE_BYTES = 16 << 20  # of a dataset without manifest, how much is searched for its largest id
FINGERPRINT_PIECES = 8  # places of an index that its fingerprint looks at
FINGERPRINT_BYTES = 1024  # read at each


def token_dtype(vocab_size: int) -> type:
    """uint16 where the vocabulary fits, else int32: megatron-core's choice."""
    return np.uint16 if vocab_size < UINT16_VOCABULARY_LIMIT else np.int32


def dataset_paths(prefix: Path | str) -> tuple[Path, Path, Path]:
    """The .bin, .idx and .json of a dataset. A prefix may hold dots, so no `with_suffix`."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), Path(f"{prefix}.json")


# ------------------------------------------------------------------------------------ writing


@dataclass(frozen=True)
class Manifest:
    """What made a dataset, and how large it is; written beside it as JSON."""

    tokenizer_type: str
    tokenizer_sha256: str
    vocab_size: int
    eod: int
    append_eod: bool
    key: str
    documents: int
    tokens: int
    largest_token: int
    dtype: str
    skipped_lines: int
    inputs: list[dict[str, Any]]
    format_version: int = 1


@dataclass(frozen=True)
class WriterState:
    """How far a writer was: what lies aside up to here is whole."""

    documents: int = 0
    sequences: int = 0
    tokens: int = 0
    largest_token: int = -1


def refuse_existing_dataset(prefix: Path, *, overwrite: bool) -> None:
    """Raises FileExistsError if files are there, unless `overwrite` and they are a dataset's."""
    refuse_existing(
        dataset_paths(prefix),
        overwrite=overwrite,
        is_ours=lambda path: _is_of_dataset(path, prefix),
        what="of an indexed dataset",
        option="--output-prefix",
    )


def _is_of_dataset(path: Path, prefix: Path) -> bool:
    """By the content of the index, also of one whose publication was cut short; of the manifest."""
    _, index, description = dataset_paths(prefix)
    if path == description:
        try:
            values = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            return False
        return isinstance(values, dict) and {"tokenizer_sha256", "documents"} <= values.keys()
    return _begins_as_index(index) or _begins_as_index(_aside(index))


def _begins_as_index(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.read(len(MAGIC)) == MAGIC


class IndexedWriter:
    """Writes a dataset aside and gives it its final names when it is whole.

    `.bin` is renamed first and `.idx` last, so an `.idx` under its final name means complete. The
    files aside are locked while their writer lives. Those of a dead run are still there when the
    writer is made: `rewind` takes up from a state of it, or from the start.
    """

    def __init__(self, prefix: Path, dtype: type, *, overwrite: bool = False) -> None:
        """Raises FileExistsError if the dataset exists, or if another run is writing it."""
        self.prefix = prefix
        self.dtype = np.dtype(dtype)
        self.documents = self.sequences = self.tokens = 0
        self.largest_token = -1
        refuse_existing_dataset(prefix, overwrite=overwrite)
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self._bin = _open_locked(_aside(dataset_paths(prefix)[0]))
        self._lengths = _lengths_path(prefix).open("a+b")
        self._rewound = False

    def holds(self, state: WriterState) -> bool:
        """Whether the files of a dead run hold all that this state speaks of."""
        sizes = (os.fstat(stream.fileno()).st_size for stream in (self._bin, self._lengths))
        needed = (state.tokens * self.dtype.itemsize, state.documents * LENGTH_BYTES)
        return all(size >= least for size, least in zip(sizes, needed, strict=True))

    def rewind(self, state: WriterState | None = None) -> None:
        """Forget what was written behind `state`; without one, everything."""
        state = state or WriterState()
        self._bin.truncate(state.tokens * self.dtype.itemsize)
        self._lengths.truncate(state.documents * LENGTH_BYTES)
        self.documents, self.sequences = state.documents, state.sequences
        self.tokens, self.largest_token = state.tokens, state.largest_token
        self._rewound = True

    @property
    def state(self) -> WriterState:
        """What was added so far."""
        return WriterState(self.documents, self.sequences, self.tokens, self.largest_token)

    def sync(self) -> None:
        """To disk, so that what was added so far outlives a crash of the machine."""
        _to_disk(self._bin)
        _to_disk(self._lengths)

    def add(self, tokens: bytes, lengths: np.ndarray) -> None:
        """Append documents: their token ids as bytes of `dtype`, and each one's length (int32).

        A document of length 0 counts as a document without a sequence, as in Megatron-LM.
        """
        count = len(tokens) // self.dtype.itemsize
        if int(lengths.sum(dtype=np.int64)) != count:
            raise ValueError(f"lengths sum to {lengths.sum()}, but there are {count} tokens")
        self.add_tokens(tokens)
        self.add_lengths(lengths)

    def add_tokens(self, tokens: bytes) -> None:
        """Token ids alone, of documents whose lengths `add_lengths` gets."""
        if not self._rewound:
            self.rewind()
        values = np.frombuffer(tokens, self.dtype)
        self._bin.write(tokens)
        self.tokens += values.size
        if values.size:
            self.largest_token = max(self.largest_token, int(values.max()))

    def add_lengths(self, lengths: np.ndarray) -> None:
        """Lengths alone (int32 [documents])."""
        if not self._rewound:
            self.rewind()
        self._lengths.write(np.ascontiguousarray(lengths, np.int32).data)
        self.documents += lengths.size
        self.sequences += int(np.count_nonzero(lengths))

    def finish(self) -> None:
        """Write the index, and everything to disk; `publish` then gives the final names."""
        if not self._rewound:
            self.rewind()
        with _aside(dataset_paths(self.prefix)[1]).open("wb") as index:
            self._write_index(index)
            _to_disk(index)
        self._lengths.close()
        _lengths_path(self.prefix).unlink()
        _to_disk(self._bin)

    def publish(self, manifest: Manifest | None) -> None:
        """Rename into place. Until the last rename no `.idx` has its final name."""
        binary, index, description = dataset_paths(self.prefix)
        if manifest is not None:
            with _aside(description).open("w", encoding="utf-8") as stream:
                json.dump(asdict(manifest), stream, indent=2)
                stream.write("\n")
                _to_disk(stream)
        for path in (index, description):  # of the dataset that is replaced
            path.unlink(missing_ok=True)
        for path in (binary, description, index):
            if path != description or manifest is not None:
                os.replace(_aside(path), path)
        # From here on, files aside belong to another run: only let go of the lock.
        self._bin.close()

    def discard(self) -> None:
        """Remove what lies aside and release the lock."""
        self._lengths.close()
        _lengths_path(self.prefix).unlink(missing_ok=True)
        for path in dataset_paths(self.prefix):
            _aside(path).unlink(missing_ok=True)
        self._bin.close()

    def keep(self) -> None:
        """Leave what lies aside to a later run, and release the lock."""
        self._lengths.close()
        self._bin.close()

    def __enter__(self) -> IndexedWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if not self._bin.closed:
            self.discard()

    def _write_index(self, index: IO[bytes]) -> None:
        code = DTYPE_CODES[self.dtype.type]
        index.write(MAGIC)
        index.write(struct.pack("<QBQQ", VERSION, code, self.sequences, self.documents + 1))
        for lengths in self._length_blocks():
            index.write(lengths[lengths > 0].tobytes())
        offset = 0
        for lengths in self._length_blocks():
            lengths = lengths[lengths > 0].astype(np.int64)
            ends = offset + np.cumsum(lengths) * self.dtype.itemsize
            index.write((ends - lengths * self.dtype.itemsize).tobytes())
            offset = int(ends[-1]) if ends.size else offset
        index.write(np.zeros(1, np.int64).tobytes())
        sequences = 0
        for lengths in self._length_blocks():
            ends = sequences + np.cumsum(lengths > 0, dtype=np.int64)
            index.write(ends.tobytes())
            sequences = int(ends[-1])

    def _length_blocks(self):
        self._lengths.flush()
        self._lengths.seek(0)
        while block := self._lengths.read(LENGTH_BYTES * COPY_BLOCK):
            yield np.frombuffer(block, np.int32)


def _aside(path: Path) -> Path:
    return path.with_name(path.name + ".partial")


def _lengths_path(prefix: Path) -> Path:
    return _aside(Path(f"{prefix}.lengths"))


def _to_disk(stream: IO) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def _open_locked(path: Path) -> IO[bytes]:
    """Open for appending; raises FileExistsError while another process writes it."""
    deadline = time.monotonic() + LOCK_PATIENCE_SECONDS
    while True:
        stream = path.open("ab")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.close()
            if time.monotonic() > deadline:
                raise FileExistsError(
                    f"{path}: another run is writing this dataset; wait for it, or choose another "
                    f"--output-prefix"
                ) from None
            time.sleep(0.1)
            continue
        except OSError:
            pass  # a file system without locks
        # Between opening and locking, its owner may have renamed it to its final name.
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(stream.fileno()), path.stat()):
                return stream
        stream.close()


# ------------------------------------------------------------------------------------ opening


@dataclass(frozen=True)
class IndexHeader:
    """What the head of an .idx says."""

    dtype: np.dtype
    sequences: int
    documents: int
    tokens: int


def read_header(prefix: Path, *, may_be_empty: bool = False) -> IndexHeader:
    """Read and check a dataset's files without reading its data.

    Raises FileNotFoundError for a missing file and ValueError for an index that is not one, is cut
    short, is empty, or does not fit its .bin. Each names the file and the numbers.
    """
    binary, index, _ = dataset_paths(prefix)
    for path in (index, binary):
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist: the dataset {prefix} needs {binary.name} and "
                f"{index.name}. Make it with tools/preprocess_data.py (its --output-prefix P and "
                f"--json-keys text give P_text_document), or correct the source's prefix"
            )
    with index.open("rb") as stream:
        head = stream.read(HEADER_BYTES)
        if len(head) < HEADER_BYTES or not head.startswith(MAGIC):
            raise ValueError(f"{index} is not the index of a Megatron dataset: bad header")
        version, code, sequences, ends = struct.unpack("<QBQQ", head[len(MAGIC) :])
        if version != VERSION or code not in CODE_DTYPES:
            raise ValueError(
                f"{index} has version {version} and type code {code}; read here are version "
                f"{VERSION} and codes {', '.join(map(str, CODE_DTYPES))}"
            )
        dtype = np.dtype(CODE_DTYPES[code])
        expected = HEADER_BYTES + sequences * 12 + ends * 8
        if index.stat().st_size != expected:
            raise ValueError(
                f"{index} has {index.stat().st_size:,} bytes, but its header, with {sequences:,} "
                f"sequences, needs {expected:,}: it is cut short or damaged. Make the dataset anew"
            )
        if sequences == 0 and may_be_empty and binary.stat().st_size == 0:
            return IndexHeader(dtype, 0, ends - 1, 0)
        if sequences == 0:
            raise ValueError(f"{prefix} is empty: {index.name} lists no sequence with a token")
        stream.seek(HEADER_BYTES + 4 * (sequences - 1))
        (last_length,) = struct.unpack("<i", stream.read(4))
        stream.seek(HEADER_BYTES + 4 * sequences + 8 * (sequences - 1))
        (last_offset,) = struct.unpack("<q", stream.read(8))
    size, needed = binary.stat().st_size, last_offset + last_length * dtype.itemsize
    if size != needed:
        state = "is cut short" if size < needed else "does not belong to this index"
        raise ValueError(
            f"{binary} {state}: it has {size:,} bytes, but {index.name} describes {needed:,}. "
            f"Copy it again, or make the dataset anew"
        )
    return IndexHeader(dtype, sequences, ends - 1, needed // dtype.itemsize)


def read_manifest(prefix: Path) -> Manifest | None:
    """The manifest beside a dataset, or None: datasets made by Megatron-LM have none."""
    path = dataset_paths(prefix)[2]
    if not path.is_file():
        return None
    try:
        return Manifest(**json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{path} is not a manifest of tools/preprocess_data.py ({error}); make the dataset "
            f"anew, or remove the file to use the dataset without its checks"
        ) from None


def tokens_before(prefix: Path, header: IndexHeader, places: list[int]) -> list[int]:
    """How many tokens lie in front of each of these sequences; reads a few bytes of the index.

    Raises ValueError for offsets that do not grow or leave the .bin.
    """
    index = dataset_paths(prefix)[1]
    found = []
    with index.open("rb") as stream:
        for place in places:
            if place == header.sequences:
                found.append(header.tokens)
                continue
            stream.seek(HEADER_BYTES + 4 * header.sequences + 8 * place)
            (offset,) = struct.unpack("<q", stream.read(8))
            found.append(offset // header.dtype.itemsize)
    if found != sorted(found) or found[0] < 0 or found[-1] > header.tokens:
        raise ValueError(
            f"{index} does not fit its data: sequences {places} start at the tokens {found} of "
            f"{header.tokens:,}. Make the dataset anew"
        )
    return found


def fingerprint(prefix: Path, header: IndexHeader) -> str:
    """A short hash that tells datasets apart: some lengths and tokens, the same work for any size.

    It does not depend on where the files lie or when they were written.
    """
    binary, index, _ = dataset_paths(prefix)
    state = hashlib.sha256(f"{header.dtype.str} {header.sequences} {header.tokens}".encode())
    item = header.dtype.itemsize
    regions = ((index, HEADER_BYTES, 4 * header.sequences, 4), (binary, 0, header.tokens * item, 4))
    for path, start, size, unit in regions:
        last = max(0, size - FINGERPRINT_BYTES) // unit * unit
        with path.open("rb") as stream:
            for piece in range(FINGERPRINT_PIECES):
                stream.seek(start + last * piece // (FINGERPRINT_PIECES - 1) // unit * unit)
                state.update(stream.read(min(FINGERPRINT_BYTES, size)))
    return state.hexdigest()[:16]


def document_lengths(prefix: Path, header: IndexHeader) -> Iterator[np.ndarray]:
    """Tokens of each document, in blocks of int32; 0 for an empty one, which has no sequence.

    Raises ValueError for documents of several sequences.
    """
    with (
        dataset_paths(prefix)[1].open("rb") as lengths,
        dataset_paths(prefix)[1].open("rb") as ends,
    ):
        lengths.seek(HEADER_BYTES)
        ends.seek(HEADER_BYTES + 12 * header.sequences)
        before = int(np.frombuffer(ends.read(8), np.int64)[0])
        while block := ends.read(8 * COPY_BLOCK):
            steps = np.diff(np.frombuffer(block, np.int64), prepend=before)
            before += int(steps.sum())
            if steps.size and steps.max(initial=0) > 1:
                raise ValueError(
                    f"{prefix} has documents of several sequences (--split-sentences), which are "
                    f"not handled here: make it anew without that option"
                )
            sizes = np.zeros(steps.size, np.int32)
            count = int(steps.sum())
            sizes[steps == 1] = np.frombuffer(lengths.read(LENGTH_BYTES * count), np.int32)
            yield sizes


def open_tokens(prefix: Path, header: IndexHeader) -> np.ndarray:
    """All token ids, [tokens], mapped and not read."""
    return np.memmap(dataset_paths(prefix)[0], header.dtype, "r", shape=(header.tokens,))


def largest_token_sampled(
    prefix: Path, header: IndexHeader, *, sample_bytes: int = SAMPLE_BYTES
) -> int:
    """The largest id in an evenly spaced sample of the data, for datasets without a manifest."""
    tokens = open_tokens(prefix, header)
    block = max(1, min(1 << 16, sample_bytes // header.dtype.itemsize))
    count = max(1, min(-(-tokens.size // block), sample_bytes // header.dtype.itemsize // block))
    starts = np.linspace(0, max(0, tokens.size - block), count).astype(np.int64)
    return max(int(tokens[start : start + block].max()) for start in starts)
