"""Megatron's indexed dataset on disk: its format, its manifest, and the checks on opening.

    PREFIX.bin   token ids, one document after the other
    PREFIX.idx   header, then per sequence its length (int32) and byte offset (int64), then the
                 sequence numbers at which documents end (int64)
    PREFIX.json  the manifest: which tokenizer, how many documents and tokens, from what, hashes

The format is that of `megatron.core.datasets.indexed_dataset` (0.19.2), byte for byte; there are
no torch and no megatron here, so that workers start fast. `indexed_writer.py` writes it.
"""

from __future__ import annotations

import hashlib
import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from equilibrium_mcore.config.installation import command
from equilibrium_mcore.data.block_hashes import BlockHashes
from equilibrium_mcore.files.errors import reason

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
SAMPLE_BYTES = 16 << 20  # of a dataset without manifest, how much is searched for its largest id
FINGERPRINT_PIECES = 8  # places of an index that its fingerprint looks at
FINGERPRINT_BYTES = 1024  # read at each


def token_dtype(vocab_size: int) -> type:
    """uint16 where the vocabulary fits, else int32: megatron-core's choice."""
    return np.uint16 if vocab_size < UINT16_VOCABULARY_LIMIT else np.int32


def dataset_paths(prefix: Path | str) -> tuple[Path, Path, Path]:
    """The .bin, .idx and .json of a dataset. A prefix may hold dots, so no `with_suffix`."""
    return Path(f"{prefix}.bin"), Path(f"{prefix}.idx"), Path(f"{prefix}.json")


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
    partition: str | None = None
    """Which share of the inputs it holds, e.g. "3 of 16"; None: all of them."""
    hashes: BlockHashes | None = None
    """Of both files; None: written by a version that made none."""


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
                f"{index.name}. Make it with `{command('preprocess')}` (its --output-prefix P and "
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
                f"sequences, needs {expected:,}: it is cut short or damaged. Make the dataset again"
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
            f"Copy it again, or make the dataset again"
        )
    return IndexHeader(dtype, sequences, ends - 1, needed // dtype.itemsize)


def read_manifest(prefix: Path) -> Manifest | None:
    """The manifest beside a dataset, or None: datasets made by Megatron-LM have none."""
    path = dataset_paths(prefix)[2]
    if not path.is_file():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        hashes = values.get("hashes")
        return Manifest(**{**values, "hashes": hashes and BlockHashes(**hashes)})
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not a manifest of `{command('preprocess')}` ({reason(error)}); make the "
            f"dataset again, or remove the file to use the dataset without its checks"
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
            f"{header.tokens:,}. Make the dataset again"
        )
    return found


def fingerprint(prefix: Path, header: IndexHeader) -> str:
    """A short hash that tells datasets apart: some lengths and tokens, the same work for any size.

    It does not depend on where the files lie or when they were written.
    """
    binary, index, _ = dataset_paths(prefix)
    return fingerprint_of(binary, index, header)


def fingerprint_of(binary: Path, index: Path, header: IndexHeader) -> str:
    """`fingerprint`, of files of any name."""
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
                    f"not handled here: make it again without that option"
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
    item = header.dtype.itemsize
    block = max(1, min(1 << 16, sample_bytes // item))
    count = max(1, min(-(-header.tokens // block), sample_bytes // item // block))
    starts = np.linspace(0, max(0, header.tokens - block), count).astype(np.int64)
    largest = -1
    with dataset_paths(prefix)[0].open("rb") as stream:
        for start in starts.tolist():
            stream.seek(start * item)
            ids = np.frombuffer(stream.read(min(block, header.tokens) * item), header.dtype)
            largest = max(largest, int(ids.max()))
    return largest
