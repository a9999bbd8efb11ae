"""What opening a blend costs, beside megatron-core's builder, and how fast samples are planned.

All data is made up in a temporary folder: one small dataset linked under many names, and one index
of many documents linked under a few, whose .bin is sparse (it takes no room and reads as zeros).
"""

from __future__ import annotations

import json
import multiprocessing
import os
import struct
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from equilibrium_mcore.config.data import DataConfig, SourceConfig, TokenizerConfig
from equilibrium_mcore.corpus.indexed_writer import IndexedWriter
from equilibrium_mcore.corpus.train_tokenizer import train_tokenizer
from equilibrium_mcore.data.blend import build_datasets
from equilibrium_mcore.data.indexed_files import (
    MAGIC,
    VERSION,
    Manifest,
    dataset_paths,
)
from equilibrium_mcore.data.tokenizer import Tokenizer, load_tokenizer
from equilibrium_mcore.files.whole import sync_file, whole_file, write_whole

SEQUENCE_LENGTH = 2048
PLANNED_SAMPLES = 20_000
READ_SAMPLES = 500
INDEX_BLOCK = 1 << 20  # documents written at a time
SEED = 1


@dataclass(frozen=True)
class Opening:
    """One way to open one blend, in a process of its own."""

    what: str
    seconds: float
    memory_mib: float
    """Growth of the process's resident memory, mapped files included."""
    planned_per_second: float | None = None
    read_per_second: float | None = None


def measure(
    folder: Path, *, prefixes: int, samples: int, sources: int, documents: int
) -> tuple[list[Opening], list[Opening]]:
    """`prefixes` small sources opened both ways for `samples` samples; then `sources` sources.

    The latter have `documents` documents in all and are opened by the ledger alone. `folder` is for
    the data: some 20 bytes for each document of one source.
    """
    tokenizer_config = _made_up_tokenizer(folder)
    tokenizer = load_tokenizer(tokenizer_config)
    small = _small_source(folder / "small", tokenizer)
    many = _blend(folder / "many", small, prefixes, tokenizer_config)
    both = [
        _in_a_process(many, "ledger", samples),
        _in_a_process(many, "megatron", samples),
    ]
    large = _large_source(folder / "large", documents // sources, tokenizer)
    blend = _blend(folder / "few", large, sources, tokenizer_config)
    for path in (folder / "few").iterdir():
        _forget(path)
    return both, [_in_a_process(blend, "ledger", samples)]


def report(both: list[Opening], large: list[Opening], **sizes: int) -> str:
    """The figures as text; `sizes` as given to `measure`."""
    ours, theirs = both
    lines = [f"{sizes['prefixes']:,} prefixes, order for {sizes['samples']:,} samples:"]
    lines += [_line(opening) for opening in both]
    lines += [
        f"  opened {theirs.seconds / ours.seconds:.1f} times faster by the ledger",
        f"{sizes['sources']} sources with {sizes['documents']:,} documents in all, not in the page "
        "cache:",
        *(_line(opening) for opening in large),
    ]
    return "\n".join(lines)


def _line(opening: Opening) -> str:
    text = f"  {opening.what:<9} opened in {opening.seconds:7.2f} s, {opening.memory_mib:7.1f} MiB"
    if opening.planned_per_second is not None:
        text += (
            f"; plans {opening.planned_per_second:,.0f} samples/s, reads "
            f"{opening.read_per_second:,.0f} samples/s of {SEQUENCE_LENGTH:,} tokens"
        )
    return text


# ---------------------------------------------------------------------------------- measuring


def _open(data: DataConfig, order: str, samples: int) -> Opening:
    """Open the training split and use it; to be called in a process of its own."""
    tokenizer = load_tokenizer(data.tokenizer)
    if order == "megatron":
        import megatron.core.datasets.gpt_dataset  # noqa: F401  not a part of opening
    before, start = _resident_mib(), time.perf_counter()
    train = build_datasets(
        data.model_copy(update={"order": order}),
        sequence_length=SEQUENCE_LENGTH,
        train_samples=samples,
        validation_samples=0,
        seed=SEED,
        tokenizer=tokenizer,
    ).train
    train[0]
    seconds, memory = time.perf_counter() - start, _resident_mib() - before
    if order == "megatron":
        return Opening(order, seconds, memory)
    ledger = train.cursor_at(0)
    planned = _rate(lambda: ledger.skip(PLANNED_SAMPLES), PLANNED_SAMPLES)
    plans = [ledger.take() for _ in range(READ_SAMPLES)]
    read = _rate(lambda: [train[plan] for plan in plans], READ_SAMPLES)
    return Opening(order, seconds, memory, planned, read)


def _rate(work: Callable[[], Any], count: int) -> float:
    start = time.perf_counter()
    work()
    return count / (time.perf_counter() - start)


def _resident_mib() -> float:
    import psutil

    return psutil.Process().memory_info().rss / 2**20


def _in_a_process(*arguments: Any) -> Opening:
    """What `_open` returns, in a fresh process: memory is its own, and no thread is missing."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as apart:
        return apart.submit(_open, *arguments).result()


def _forget(path: Path) -> None:
    """Take a file out of the page cache, so that opening it reads the disk."""
    sync_file(path)  # pages that are not written yet stay in memory
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


# ---------------------------------------------------------------------------------- made-up data


def _made_up_tokenizer(folder: Path) -> TokenizerConfig:
    generator = np.random.default_rng(SEED)
    words = ["".join(generator.choice(list("abcdefghij"), 5)) for _ in range(500)]
    text = folder / "text.jsonl"
    lines = [f'{{"text": "{" ".join(generator.choice(words, 40))}"}}\n' for _ in range(200)]
    write_whole(text, "".join(lines))
    model = folder / "tokenizer.model"
    train_tokenizer(inputs=[text], output=model, vocab_size=512, threads=1)
    return TokenizerConfig(type="SentencePieceTokenizer", model=model)


def _manifest(tokenizer: Tokenizer, documents: int, tokens: int) -> Manifest:
    return Manifest(
        tokenizer_type=tokenizer.kind,
        tokenizer_sha256=tokenizer.fingerprint,
        vocab_size=tokenizer.vocab_size,
        eod=tokenizer.eod,
        append_eod=True,
        key="text",
        documents=documents,
        tokens=tokens,
        largest_token=tokenizer.vocab_size - 1,
        dtype="uint16",
        skipped_lines=0,
        inputs=[],
    )


def _small_source(prefix: Path, tokenizer: Tokenizer) -> Path:
    """100 documents of some 500 tokens."""
    generator = np.random.default_rng(SEED)
    lengths = generator.integers(100, 900, 100, dtype=np.int32)
    tokens = generator.integers(0, tokenizer.vocab_size, lengths.sum(), dtype=np.uint16)
    with IndexedWriter(prefix, np.uint16) as writer:
        writer.add(tokens.tobytes(), lengths)
        writer.finish()
        writer.stage(_manifest(tokenizer, lengths.size, tokens.size))
        writer.publish()
    return prefix


def _large_source(prefix: Path, documents: int, tokenizer: Tokenizer) -> Path:
    """An index of `documents` documents of 100 to 899 tokens, over a sparse .bin."""
    binary, index, _ = dataset_paths(prefix)
    generator = np.random.default_rng(SEED)
    tokens = 0
    with whole_file(index, "wb") as stream:
        stream.write(MAGIC + struct.pack("<QBQQ", VERSION, 8, documents, documents + 1))
        starts = stream.tell() + 4 * documents
        for begin in range(0, documents, INDEX_BLOCK):
            count = min(INDEX_BLOCK, documents - begin)
            lengths = generator.integers(100, 900, count, dtype=np.int32)
            stream.seek(starts - 4 * documents + 4 * begin)
            stream.write(lengths.tobytes())
            ends = tokens + np.cumsum(lengths, dtype=np.int64)
            stream.seek(starts + 8 * begin)
            stream.write((2 * (ends - lengths)).tobytes())
            tokens = int(ends[-1])
        stream.seek(starts + 8 * documents)
        for begin in range(0, documents + 1, INDEX_BLOCK):
            end = min(begin + INDEX_BLOCK, documents + 1)
            stream.write(np.arange(begin, end, dtype=np.int64).tobytes())
    with whole_file(binary, "wb") as stream:
        stream.truncate(2 * tokens)
    manifest = _manifest(tokenizer, documents, tokens)
    write_whole(dataset_paths(prefix)[2], json.dumps(asdict(manifest)))
    return prefix


def _blend(folder: Path, source: Path, count: int, tokenizer: TokenizerConfig) -> DataConfig:
    """`count` sources of different weights, all links to one dataset."""
    folder.mkdir()
    sources = []
    for number in range(count):
        prefix = folder / f"source_{number:05d}"
        for ours, theirs in zip(dataset_paths(prefix), dataset_paths(source), strict=True):
            os.link(theirs, ours)
        sources.append(SourceConfig(name=prefix.name, prefix=prefix, weight=1.0 + number % 17))
    return DataConfig(
        name=folder.name,
        tokenizer=tokenizer,
        sources=sources,
        allow_repeated_sources=True,
        split="98,1,1",
    )
