"""Datasets one after the other as one dataset, byte for byte as if made in one run.

What is read is compared with the parts' hashes, so that damage is not merged under new ones.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from equilibrium_mcore.corpus.indexed_writer import (
    IndexedWriter,
    complete_publication,
    publication_cut_short,
)
from equilibrium_mcore.data.block_hashes import BlockHasher, blocks_of, compare_read
from equilibrium_mcore.data.indexed_files import (
    IndexHeader,
    Manifest,
    dataset_paths,
    document_lengths,
    fingerprint,
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
    *,
    prefixes: Sequence[Path],
    output_prefix: Path,
    overwrite: bool = False,
    allow_repeats: bool = False,
) -> IndexHeader:
    """Write `<output_prefix>.{bin,idx}`, and the manifest where every part has one.

    If the merged dataset is there already, that is all. Raises FileNotFoundError, FileExistsError,
    and ValueError for parts that are damaged or do not fit together: another token type, another
    tokenizer, or, unless `allow_repeats`, the same data twice.
    """
    if not prefixes:
        raise ValueError("--input names no dataset")
    sources = [path for prefix in prefixes for path in dataset_paths(prefix)]
    refuse_sources(dataset_paths(output_prefix), sources, option="--output-prefix")
    headers = [read_header(prefix, may_be_empty=True) for prefix in prefixes]
    manifests = [read_manifest(prefix) for prefix in prefixes]
    _check_fit(prefixes, headers, manifests)
    if not allow_repeats:
        _refuse_repeats(prefixes, headers)
    if publication_cut_short(output_prefix):
        complete_publication(output_prefix)
    if not overwrite and _is_merged(prefixes, headers, output_prefix):
        print(f"{output_prefix}: there already, made of the same: nothing to do", file=sys.stderr)
        return read_header(output_prefix)
    with IndexedWriter(output_prefix, headers[0].dtype.type, overwrite=overwrite) as writer:
        for prefix, header, manifest in zip(prefixes, headers, manifests, strict=True):
            _append(writer, prefix, header, manifest)
        if writer.tokens == 0:
            raise ValueError(f"{prefixes[0]} and the other parts hold no token: nothing to write")
        writer.finish()
        known = [manifest for manifest in manifests if manifest is not None]
        if len(known) == len(prefixes):
            writer.stage(_joined(known))
        writer.publish()
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
                f"{headers[0].dtype.name}: they are of different tokenizers. Make them again with "
                f"one tokenizer"
            )
    known = [(p, m) for p, m in zip(prefixes, manifests, strict=True) if m is not None]
    for prefix, manifest in known[1:]:
        for name, words in SAME.items():
            first, other = (getattr(m, name) for m in (known[0][1], manifest))
            if first != other:
                raise ValueError(
                    f"{prefix} and {known[0][0]} differ in their {words}: {other!r} and "
                    f"{first!r}. Merge datasets of one kind, or make one of them again"
                )


def _refuse_repeats(prefixes: Sequence[Path], headers: Sequence[IndexHeader]) -> None:
    first: dict[str, Path] = {}
    for prefix, header in zip(prefixes, headers, strict=True):
        if not header.tokens:
            continue
        content = fingerprint(prefix, header)
        known = first.get(content)
        first[content] = prefix
        if known is not None:
            raise ValueError(
                f"--input: {prefix} and {known} hold the same data, which would come twice: name "
                f"one of them, or say that it is meant with --allow-repeats"
            )


def _append(
    writer: IndexedWriter, prefix: Path, header: IndexHeader, manifest: Manifest | None
) -> None:
    """A part's documents, in blocks, so that memory is flat."""
    binary, index, _ = dataset_paths(prefix)
    hashes = manifest.hashes if manifest else None
    if hashes:
        for block in blocks_of(hashes, binary, index)[1]:
            block.check()
    for lengths in document_lengths(prefix, header):
        writer.add_lengths(lengths)
    hasher = BlockHasher()
    for tokens in _token_blocks(prefix):
        writer.add_tokens(tokens)
        if hashes:
            hasher.update(tokens)
    if hashes:
        compare_read(binary, hasher.hashes(), hashes.bin, header.tokens * header.dtype.itemsize)


def _token_blocks(prefix: Path) -> Iterator[bytes]:
    with dataset_paths(prefix)[0].open("rb") as tokens:
        while block := tokens.read(TOKEN_BLOCK_BYTES):
            yield block


def _is_merged(prefixes: Sequence[Path], headers: Sequence[IndexHeader], output: Path) -> bool:
    """Whether the output is there and holds what the parts hold, in this order, byte for byte."""
    if not all(path.is_file() for path in dataset_paths(output)[:2]):
        return False
    there = read_header(output, may_be_empty=True)
    sums = [sum(getattr(h, name) for h in headers) for name in ("sequences", "documents", "tokens")]
    if [there.sequences, there.documents, there.tokens] != sums or there.dtype != headers[0].dtype:
        return False
    pairs = list(zip(prefixes, headers, strict=True))
    lengths = (block.tobytes() for pair in pairs for block in document_lengths(*pair))
    tokens = (block for prefix in prefixes for block in _token_blocks(prefix))
    return _same_bytes(
        lengths, (block.tobytes() for block in document_lengths(output, there))
    ) and _same_bytes(tokens, _token_blocks(output))


def _same_bytes(one: Iterator[bytes], other: Iterator[bytes]) -> bool:
    """Whether two streams that are cut differently hold the same."""
    ours = theirs = b""
    while True:
        ours, theirs = ours or next(one, b""), theirs or next(other, b"")
        size = min(len(ours), len(theirs))
        if not size or ours[:size] != theirs[:size]:
            return not ours and not theirs
        ours, theirs = ours[size:], theirs[size:]


def _joined(manifests: Sequence[Manifest]) -> Manifest:
    """The manifest of all: sums, and each input once with the lines of all parts."""
    inputs: dict[tuple[str, int], dict[str, Any]] = {}
    for manifest in manifests:
        times: Counter[str] = Counter()  # a file may be an input more than once
        for entry in manifest.inputs:
            times[entry["path"]] += 1
            key = entry["path"], times[entry["path"]]
            seen = inputs.setdefault(key, {**entry, "lines": 0})
            seen["lines"] += entry["lines"]
    return replace(
        manifests[0],
        documents=sum(manifest.documents for manifest in manifests),
        tokens=sum(manifest.tokens for manifest in manifests),
        skipped_lines=sum(manifest.skipped_lines for manifest in manifests),
        largest_token=max(manifest.largest_token for manifest in manifests),
        inputs=list(inputs.values()),
        partition=_joined_partition([manifest.partition for manifest in manifests]),
    )


def _joined_partition(shares: Sequence[str | None]) -> str | None:
    """None for all shares of one run, in order: the whole."""
    count = len(shares)
    if set(shares) == {None} or list(shares) == [f"{k} of {count}" for k in range(1, count + 1)]:
        return None
    return ", ".join(str(share) for share in shares)
