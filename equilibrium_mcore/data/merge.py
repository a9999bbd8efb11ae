"""Datasets one after the other as one dataset, byte for byte as if made in one run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from equilibrium_mcore.data.indexed_files import (
    IndexedWriter,
    IndexHeader,
    Manifest,
    dataset_paths,
    document_lengths,
    read_header,
    read_manifest,
)
from equilibrium_mcore.files.replace import refuse_sources

# What two datasets must share, with the name that a message gives it.
SAME = {
    "tokenizer_sha256": "tokenizer (SHA-256)",
    "eod": "end-of-document id",
    "append_eod": "--append-eod",
    "key": "key",
}
TOKEN_BLOCK_BYTES = 8 << 20


def merge_datasets(
    *, prefixes: Sequence[Path], output_prefix: Path, overwrite: bool = False
) -> IndexHeader:
    """Write `<output_prefix>.{bin,idx}`, and the manifest where every part has one.

    Raises FileNotFoundError, FileExistsError, and ValueError for parts that do not fit together:
    another token type, another tokenizer.
    """
    if not prefixes:
        raise ValueError("--input names no dataset")
    sources = [path for prefix in prefixes for path in dataset_paths(prefix)]
    refuse_sources(dataset_paths(output_prefix), sources, option="--output-prefix")
    headers = [read_header(prefix, may_be_empty=True) for prefix in prefixes]
    manifests = [read_manifest(prefix) for prefix in prefixes]
    _check_fit(prefixes, headers, manifests)
    with IndexedWriter(output_prefix, headers[0].dtype.type, overwrite=overwrite) as writer:
        for prefix, header in zip(prefixes, headers, strict=True):
            _append(writer, prefix, header)
        if writer.tokens == 0:
            raise ValueError(f"{prefixes[0]} and the other parts hold no token: nothing to write")
        writer.finish()
        known = [manifest for manifest in manifests if manifest is not None]
        writer.publish(_joined(known) if len(known) == len(prefixes) else None)
    return read_header(output_prefix)


def _check_fit(
    prefixes: Sequence[Path],
    headers: Sequence[IndexHeader],
    manifests: Sequence[Manifest | None],
) -> None:
    for prefix, header in zip(prefixes, headers, strict=True):
        if header.dtype != headers[0].dtype:
            raise ValueError(
                f"{prefix} holds {header.dtype.name} tokens and {prefixes[0]} "
                f"{headers[0].dtype.name}: they are of different tokenizers. Make them anew with "
                f"one tokenizer"
            )
    known = [(p, m) for p, m in zip(prefixes, manifests, strict=True) if m is not None]
    for prefix, manifest in known[1:]:
        for name, words in SAME.items():
            first, other = (getattr(m, name) for m in (known[0][1], manifest))
            if first != other:
                raise ValueError(
                    f"{prefix} and {known[0][0]} differ in their {words}: {other!r} and "
                    f"{first!r}. Merge datasets of one kind, or make one of them anew"
                )


def _append(writer: IndexedWriter, prefix: Path, header: IndexHeader) -> None:
    """A part's documents, in blocks, so that memory is flat."""
    with dataset_paths(prefix)[0].open("rb") as tokens:
        for lengths in document_lengths(prefix, header):
            writer.add_lengths(lengths)
            left = int(lengths.sum(dtype=np.int64)) * header.dtype.itemsize
            while left:
                block = tokens.read(min(left, TOKEN_BLOCK_BYTES))
                writer.add_tokens(block)
                left -= len(block)


def _joined(manifests: Sequence[Manifest]) -> Manifest:
    """The manifest of all: sums, and each input once with the lines of all parts."""
    inputs: dict[str, dict[str, Any]] = {}
    for manifest in manifests:
        for entry in manifest.inputs:
            seen = inputs.setdefault(entry["path"], {**entry, "lines": 0})
            seen["lines"] += entry["lines"]
    return replace(
        manifests[0],
        documents=sum(manifest.documents for manifest in manifests),
        tokens=sum(manifest.tokens for manifest in manifests),
        skipped_lines=sum(manifest.skipped_lines for manifest in manifests),
        largest_token=max(manifest.largest_token for manifest in manifests),
        inputs=list(inputs.values()),
    )
