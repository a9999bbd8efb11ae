"""Datasets whose tokens tell where they come from."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from equilibrium_mcore.config.schema import SourceConfig
from equilibrium_mcore.data.indexed_files import IndexedWriter, read_header
from equilibrium_mcore.data.ledger.source import SourceDocuments

SEED = 11


def write_source(prefix: Path, lengths: list[int]) -> Path:
    """A dataset whose token i is the number i: a token names its document and its place in it."""
    with IndexedWriter(prefix, np.int32, overwrite=True) as writer:
        total = int(np.sum(lengths))
        writer.add(np.arange(total, dtype=np.int32).tobytes(), np.array(lengths, np.int32))
        writer.finish()
        for ending in ("bin", "idx"):
            prefix.with_name(f"{prefix.name}.{ending}.partial").rename(f"{prefix}.{ending}")
    return prefix


def open_source(prefix: Path, name: str, *, part="train", split="90,8,2", seed=SEED):
    source = SourceConfig(name=name, prefix=prefix, weight=1.0)
    return SourceDocuments(source, read_header(prefix), split=split, part=part, seed=seed)
