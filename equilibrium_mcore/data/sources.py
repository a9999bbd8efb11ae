"""The sources of a blend: their checks before anything is built, and the tokens of a split.

No torch and no megatron here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from equilibrium_mcore.config.data import DataConfig, SourceConfig
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.data.block_hashes import FileBlocks
from equilibrium_mcore.data.indexed_files import (
    SAMPLE_BYTES,
    IndexHeader,
    Manifest,
    dataset_paths,
    fingerprint,
    largest_token_sampled,
    open_tokens,
    read_header,
    read_manifest,
    tokens_before,
)
from equilibrium_mcore.data.repeats import same_values
from equilibrium_mcore.data.tokenizer import Tokenizer
from equilibrium_mcore.data.verify import check_sample, hashed_files

SPLITS = ("train", "validation", "test")
# What all sources without a manifest together may read for their largest token id.
SEARCHED_BYTES = 512 << 20


def split_documents(split: str, sequences: int) -> list[tuple[int, int]]:
    """[begin, end) of the sequences of train, validation and test, as megatron-core cuts them.

    Raises ValueError for a split that is not up to three shares.
    """
    try:
        shares = [float(part) for part in split.split(",")]
    except ValueError:
        shares = []
    if not 1 <= len(shares) <= 3 or min(shares) < 0 or sum(shares) <= 0:
        raise ValueError(
            f"data.split {split!r}: give up to three shares for train, validation and test, none "
            f"negative and not all 0, e.g. 98,1,1"
        )
    shares += [0.0] * (3 - len(shares))
    # The same floating point as megatron-core: normalize, add up, round.
    normalized = (np.array(shares) / np.sum(shares)).tolist()
    bounds = [0.0]
    for share in normalized:
        bounds.append(bounds[-1] + share)
    edges = [int(round(bound * float(sequences))) for bound in bounds]
    return list(zip(edges[:-1], edges[1:], strict=True))


def check_sources(
    data: DataConfig,
    *,
    tokenizer: Tokenizer,
    model_vocab_size: int | None = None,
    needed: dict[str, int] | None = None,
    seed: str = "",
    say: Callable[[str], object] = lambda text: None,
) -> dict[str, IndexHeader]:
    """Check every source's files before anything is built; returns their headers by name.

    `needed` gives the samples wanted of each split; `seed` chooses which blocks of the files are
    compared with their hashes, and `say` gets at most one line of text. Raises one ConfigError with
    all problems: missing or damaged files, files that are not those that were written, another
    tokenizer or end of document than the dataset's, ids beyond the model's vocabulary, a split
    without documents, sources of which only some end their documents, the same data twice.
    """
    problems: list[str] = []
    headers: dict[str, IndexHeader] = {}
    ends: dict[str, bool] = {}
    files: dict[str, list[FileBlocks]] = {}
    vocab_size = model_vocab_size or tokenizer.vocab_size
    sample_bytes = min(SAMPLE_BYTES, SEARCHED_BYTES // len(data.sources))
    if tokenizer.vocab_size > vocab_size:
        problems.append(
            f"tokenizer {tokenizer.path} has {tokenizer.vocab_size:,} tokens, but the model's "
            f"vocabulary has {vocab_size:,}: set model.vocab_size to at least "
            f"{tokenizer.vocab_size}"
        )
    for source in data.sources:
        try:
            header = read_header(source.prefix)
            manifest = read_manifest(source.prefix)
            _check_tokenizer(source, manifest, tokenizer)
            _check_ids(source, header, manifest, vocab_size, sample_bytes)
            _check_splits(source, header, data.split, needed or {})
            if manifest:
                ends[source.name] = manifest.append_eod
            if manifest and manifest.hashes:
                files[source.name] = hashed_files(source.prefix, header, manifest.hashes)
        except (ValueError, OSError) as error:
            problems.append(f"data source {source.name!r}: {error}")
        else:
            headers[source.name] = header
    problems += _ends_of_documents(ends)
    if not data.allow_repeated_sources:
        problems += _repeated(data.sources, headers)
    problems += check_sample(files, seed=seed)
    if problems:
        raise ConfigError(problems, source=f"data {data.name!r}")
    without = len(headers) - len(files)
    if without:
        say(
            f"data {data.name!r}: {without:,} of {len(headers):,} sources have no hashes in a "
            f"manifest (made by Megatron-LM, or before there were any): damage goes unnoticed"
        )
    return headers


def read_split_tokens(
    source: SourceConfig, header: IndexHeader, split: str, name: str
) -> np.ndarray:
    """The token ids of one split of one source, [tokens], mapped and not read.

    A split is a run of documents, so its tokens lie together in the .bin.
    """
    bounds = split_documents(split, header.sequences)[SPLITS.index(name)]
    begin, end = tokens_before(source.prefix, header, list(bounds))
    return open_tokens(source.prefix, header)[begin:end]


# ------------------------------------------------------------------------------------- checks


def _check_tokenizer(source: SourceConfig, manifest: Manifest | None, tokenizer: Tokenizer) -> None:
    if manifest is None:
        return
    if manifest.tokenizer_sha256 == tokenizer.fingerprint:
        if manifest.append_eod and manifest.eod != tokenizer.eod:
            raise ValueError(
                f"{source.prefix} ends its documents with the id {manifest.eod}, the run with "
                f"{tokenizer.eod}: set tokenizer.end_of_document to the token of that id, or "
                f"preprocess the text again with this one (--end-of-document)"
            )
        return
    raise ValueError(
        f"{source.prefix} was made with another tokenizer than {tokenizer.path} (its manifest "
        f"{dataset_paths(source.prefix)[2].name} has {manifest.tokenizer_type} with "
        f"{manifest.vocab_size:,} tokens, SHA-256 {manifest.tokenizer_sha256[:12]}..., this one "
        f"{tokenizer.vocab_size:,} tokens, {tokenizer.fingerprint[:12]}...): name that tokenizer "
        f"in tokenizer.model, or preprocess the text again with this one"
    )


def _ends_of_documents(ends: dict[str, bool]) -> list[str]:
    """A problem where some sources end their documents with a token and others do not."""
    ending, open_ended = ([name for name in ends if ends[name] is state] for state in (True, False))
    if not ending or not open_ended:
        return []
    return [
        f"{', '.join(open_ended)}: made without --append-eod, {', '.join(ending)} with it: the "
        f"model would learn two ways in which a document ends. Preprocess one of them again"
    ]


def _repeated(sources: Sequence[SourceConfig], headers: dict[str, IndexHeader]) -> list[str]:
    """A problem for sources that hold the same data; their names and places do not matter."""
    prints = {
        source.name: fingerprint(source.prefix, headers[source.name])
        for source in sources
        if source.name in headers
    }
    pairs = same_values(prints)
    if not pairs:
        return []
    more = f"; and {len(pairs) - 5:,} more" if len(pairs) > 5 else ""
    return [
        f"{'; '.join(pairs[:5])}{more} hold the same data: leave one out and give its weight to "
        f"the other, or say that it is meant with data.allow_repeated_sources=true"
    ]


def _check_ids(
    source: SourceConfig,
    header: IndexHeader,
    manifest: Manifest | None,
    vocab_size: int,
    sample_bytes: int,
) -> None:
    if manifest:
        largest = manifest.largest_token
    else:
        largest = largest_token_sampled(source.prefix, header, sample_bytes=sample_bytes)
    if largest >= vocab_size:
        raise ValueError(
            f"{source.prefix} holds the token id {largest}, but the model's vocabulary ends at "
            f"{vocab_size - 1}: set model.vocab_size to at least {largest + 1}, or preprocess the "
            f"text with a smaller tokenizer"
        )


def _check_splits(
    source: SourceConfig, header: IndexHeader, split: str, needed: dict[str, int]
) -> None:
    # Going through an empty split would never end.
    for name, (begin, end) in zip(SPLITS, split_documents(split, header.sequences), strict=True):
        if not needed.get(name):
            continue
        first, last = tokens_before(source.prefix, header, [begin, end])
        if first == last:
            raise ValueError(
                f"{source.prefix} has {header.sequences:,} documents, and the split {split!r} "
                f"leaves none for {name}, of which {needed[name]:,} samples are needed: give it a "
                f"larger share, or ask for no {name} samples"
            )
