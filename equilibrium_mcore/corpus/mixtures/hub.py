"""Datasets of the Hugging Face Hub, through its own library: downloaded, or as a stream."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from equilibrium_mcore.config.mixture import DatasetConfig
from equilibrium_mcore.corpus.mixtures.parts import SourcePart

HUB_BUILDERS = {"jsonl": "json", "parquet": "parquet", "arrow": "arrow"}
"""The library's builder for each format of data_files."""


def hub_parts(dataset: DatasetConfig) -> list[SourcePart]:
    """Parts of a stream, or the Arrow files that the library keeps of a download.

    Raises ValueError when the library cannot open the dataset, with a way around the Hub.
    """
    parts = []
    for split in dataset.splits:
        loaded = _open(dataset, split)
        if dataset.streaming:
            shards = loaded.num_shards
            parts += [SourcePart("stream", dataset.source, i, shards, split) for i in range(shards)]
        else:
            parts += [SourcePart("arrow", file["filename"]) for file in loaded.cache_files]
    return parts


def stream_rows(dataset: DatasetConfig, part: SourcePart, skip: int) -> Iterator[tuple[str, Any]]:
    """Rows of one shard of a stream; what is skipped is read over the network all the same."""
    stream = _open(dataset, part.split).shard(num_shards=part.end, index=part.begin)
    where, number = f"{part.path} ({part.split}, shard {part.begin} of {part.end})", skip
    rows = iter(stream.skip(skip) if skip else stream)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:  # the network's errors are of many kinds
            raise ValueError(
                f"{dataset.name}: {where}: reading stopped after row {number:,} "
                f"({type(error).__name__}: {str(error)[:300]}); call again to resume"
            ) from error
        number += 1
        yield f"{where}, row {number:,}", row


def _open(dataset: DatasetConfig, split: str):
    return _load(
        dataset.name,
        dataset.source,
        dataset.subset,
        dataset.revision,
        dataset.data_files,
        dataset.format,
        dataset.streaming,
        split,
    )


@lru_cache(maxsize=8)
def _load(name, source, subset, revision, data_files, kind, streaming, split):
    try:
        import datasets
    except ImportError:
        raise ImportError(
            f"{name}: {source} is read by the package datasets: "
            f"pip install 'equilibrium_mcore[data]'"
        ) from None
    arguments: dict[str, Any] = {"split": split, "streaming": streaming}
    try:
        if data_files:
            version = f"@{revision}" if revision else ""
            where = f"hf://datasets/{source}{version}/{data_files}"
            builder = HUB_BUILDERS[kind]
            return datasets.load_dataset(builder, data_files={split: where}, **arguments)
        return datasets.load_dataset(source, subset, revision=revision, **arguments)
    except Exception as error:  # the library raises many kinds, its network layer more
        text = " ".join(str(error).split())[:400]
        raise ValueError(
            f"{name}: {source} is not a file or folder here, and could not be opened as a dataset "
            f"of the Hub (subset {subset}, split {split}): {type(error).__name__}: {text}. Check "
            f"the name, subset and split, log in with `hf auth login` if it is gated, or give a "
            f"copy with --local {name}=PATH"
        ) from error
