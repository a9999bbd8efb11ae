"""Megatron's indexed dataset, written in a stream: temporary files that become whole at once.

Memory is flat however many documents there are. No torch and no megatron here.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import struct
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np

from equilibrium_mcore.data.block_hashes import BlockHasher, BlockHashes, HashedStream, rehash
from equilibrium_mcore.data.indexed_files import (
    COPY_BLOCK,
    DTYPE_CODES,
    LENGTH_BYTES,
    MAGIC,
    VERSION,
    IndexHeader,
    Manifest,
    dataset_paths,
    fingerprint_of,
)
from equilibrium_mcore.files.named import open_named
from equilibrium_mcore.files.replace import refuse_existing
from equilibrium_mcore.files.whole import partial_path, rename_durably, sync_stream

LOCK_PATIENCE_SECONDS = 5.0  # workers of a killed run hold its lock for a moment


@dataclass(frozen=True)
class WriterState:
    """How far a writer was: what its temporary files hold up to here is whole.

    `blocks` are the hashes of the full blocks of the .bin; those that are missing are made again.
    """

    documents: int = 0
    sequences: int = 0
    tokens: int = 0
    largest_token: int = -1
    blocks: tuple[str, ...] = ()


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
    return _begins_as_index(index) or _begins_as_index(partial_path(index))


def _begins_as_index(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return stream.read(len(MAGIC)) == MAGIC


class IndexedWriter:
    """Writes temporary files and gives them their final names when the dataset is whole.

    `.bin` is renamed first and `.idx` last, so an `.idx` under its final name means complete. The
    temporary files are locked while their writer lives. Those of a dead run are still there when
    the writer is made: `rewind` continues from a state of it, or from the start.
    """

    def __init__(self, prefix: Path, dtype: type, *, overwrite: bool = False) -> None:
        """Raises FileExistsError if the dataset exists, or if another run is writing it."""
        self.prefix = prefix
        self.dtype = np.dtype(dtype)
        self.documents = self.sequences = self.tokens = 0
        self.largest_token = -1
        refuse_existing_dataset(prefix, overwrite=overwrite)
        prefix.parent.mkdir(parents=True, exist_ok=True)
        self._bin = _open_locked(partial_path(dataset_paths(prefix)[0]))
        self._lengths = open_named(_lengths_path(prefix), "a+b")  # not whole: as the .bin
        self._rewound = False
        self._hasher = BlockHasher()
        self._hashes: BlockHashes | None = None

    def holds(self, state: WriterState) -> bool:
        """Whether the files of a dead run hold all that this state speaks of."""
        sizes = (os.fstat(stream.fileno()).st_size for stream in (self._bin, self._lengths))
        needed = (state.tokens * self.dtype.itemsize, state.documents * LENGTH_BYTES)
        return all(size >= least for size, least in zip(sizes, needed, strict=True))

    def rewind(self, state: WriterState | None = None) -> None:
        """Forget what was written after `state`; without one, everything."""
        state = state or WriterState()
        end = state.tokens * self.dtype.itemsize
        self._bin.truncate(end)
        self._lengths.truncate(state.documents * LENGTH_BYTES)
        self.documents, self.sequences = state.documents, state.sequences
        self.tokens, self.largest_token = state.tokens, state.largest_token
        self._hasher = rehash(partial_path(dataset_paths(self.prefix)[0]), state.blocks, end)
        self._rewound = True

    @property
    def state(self) -> WriterState:
        """What was added so far."""
        return WriterState(
            documents=self.documents,
            sequences=self.sequences,
            tokens=self.tokens,
            largest_token=self.largest_token,
            blocks=tuple(self._hasher.whole),
        )

    def sync(self) -> None:
        """To disk, so that what was added so far outlives a crash of the machine."""
        sync_stream(self._bin)
        sync_stream(self._lengths)

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
        self._hasher.update(tokens)
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
        """Write the index, and everything to disk; `stage` and `publish` come next."""
        if not self._rewound:
            self.rewind()
        binary, index, description = map(partial_path, dataset_paths(self.prefix))
        description.unlink(missing_ok=True)  # of a dead run
        with open_named(index, "wb") as stream:  # not whole: published with the .bin, by `publish`
            hashed = HashedStream(stream)
            self._write_index(hashed)
            sync_stream(stream)
        sync_stream(self._bin)
        header = IndexHeader(self.dtype, self.sequences, self.documents, self.tokens)
        self._hashes = BlockHashes(
            bin=self._hasher.hashes(),
            idx=hashed.hasher.hashes(),
            fingerprint=fingerprint_of(binary, index, header),
        )

    def stage(self, manifest: Manifest) -> None:
        """Write the manifest, with the hashes, to be published with the rest."""
        values = asdict(replace(manifest, hashes=self._hashes))
        description = partial_path(dataset_paths(self.prefix)[2])
        with open_named(description, "w") as stream:  # not whole: as the index
            json.dump(values, stream, indent=2)
            stream.write("\n")
            sync_stream(stream)

    def publish(self) -> None:
        """Rename into place. Until the last rename no `.idx` has its final name."""
        self._lengths.close()
        complete_publication(self.prefix)
        # From here on, temporary files belong to another run: only let go of the lock.
        self._bin.close()

    def discard(self) -> None:
        """Remove the temporary files and release the lock."""
        self._lengths.close()
        _lengths_path(self.prefix).unlink(missing_ok=True)
        for path in dataset_paths(self.prefix):
            partial_path(path).unlink(missing_ok=True)
        self._bin.close()

    def keep(self) -> None:
        """Leave the temporary files to a later run, and release the lock."""
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

    def _write_index(self, index: HashedStream) -> None:
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

    def _length_blocks(self) -> Iterator[np.ndarray]:
        self._lengths.flush()
        self._lengths.seek(0)
        while block := self._lengths.read(LENGTH_BYTES * COPY_BLOCK):
            yield np.frombuffer(block, np.int32)


def complete_publication(prefix: Path) -> None:
    """Give a finished dataset its final names, or the rest of them; safe to call again.

    What has a temporary name is new, so the old dataset's index goes first.
    """
    binary, index, description = dataset_paths(prefix)
    if partial_path(index).exists():
        index.unlink(missing_ok=True)
        _lengths_path(prefix).unlink(missing_ok=True)
    if partial_path(binary).exists():
        description.unlink(missing_ok=True)
    for path in (binary, description, index):
        with contextlib.suppress(FileNotFoundError):
            rename_durably(partial_path(path), path)


def publication_cut_short(prefix: Path) -> bool:
    """Whether a kill came between the renames: only then has the .bin its name, not the .idx."""
    binary, index, _ = dataset_paths(prefix)
    begun = binary.exists() and not partial_path(binary).exists()
    return begun and partial_path(index).exists() and not index.exists()


def _lengths_path(prefix: Path) -> Path:
    return partial_path(Path(f"{prefix}.lengths"))


def _open_locked(path: Path) -> IO[bytes]:
    """Open for appending; raises FileExistsError while another process writes it."""
    deadline = time.monotonic() + LOCK_PATIENCE_SECONDS
    while True:
        stream = open_named(path, "ab")  # not whole: grows for hours, and a later run resumes it
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
