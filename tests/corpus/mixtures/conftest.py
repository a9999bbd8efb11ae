"""Small sources in every format, and a mixture over them."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import zstandard

from equilibrium_mcore.config.load_mixture import load_mixture
from equilibrium_mcore.config.mixture import MixtureConfig
from equilibrium_mcore.config.yaml_io import to_yaml
from equilibrium_mcore.corpus.mixtures.prepare import Options, prepare
from equilibrium_mcore.corpus.mixtures.statistics import all_document_lengths
from equilibrium_mcore.data.indexed_files import open_tokens, read_header


@pytest.fixture(scope="session")
def rows(texts) -> list[dict]:
    """400 rows of real text with an id, a quality and nested metadata."""
    return [
        {
            "text": f"{text}\n# {place}",  # no two alike
            "id": place,
            "score": 1 + place % 5,
            "weight": 100.0 if place % 2 else 1.0,
            "meta": {"level": place / 10},
        }
        for place, text in enumerate(texts)
    ]


@pytest.fixture(scope="session")
def write_rows() -> Callable[[Path, list[dict]], Path]:
    """Rows to a file (or a `datasets` folder) by the ending of its name."""
    return _write_rows


def _write_rows(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if path.suffix == ".jsonl":
        path.write_bytes(lines)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(lines))
    elif path.suffix == ".zst":
        # Two frames: what tools that append or compress in parallel write.
        half = lines.index(b"\n", len(lines) // 2) - 3
        compress = zstandard.ZstdCompressor().compress
        path.write_bytes(compress(lines[:half]) + compress(lines[half:]))
    elif path.suffix == ".parquet":
        import pyarrow as pa
        import pyarrow.parquet as pq

        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=90)
    elif path.suffix in (".arrow", ".feather"):
        import pyarrow as pa

        table = pa.Table.from_pylist(rows)
        new = pa.ipc.new_stream if path.suffix == ".arrow" else pa.ipc.new_file
        with pa.OSFile(str(path), "wb") as sink, new(sink, table.schema) as writer:
            writer.write_table(table, max_chunksize=70)
    else:
        import datasets

        split = datasets.Dataset.from_list(rows)
        datasets.DatasetDict({"train": split, "test": split.select(range(5))}).save_to_disk(path)
    return path


@pytest.fixture
def mixture(tmp_path, tokenizer_config) -> Callable[..., MixtureConfig]:
    """A mixture over (name, source, share, changes), written as YAML and read back."""

    def make(*datasets: tuple, total_tokens: int | None = 20_000, **sections) -> MixtureConfig:
        values = {
            "metadata": {"phase": "pretrain", "total_tokens": total_tokens},
            "tokenizer": tokenizer_config.model_dump(mode="json"),
            "datasets": [
                {"name": name, "source": str(source), "mix_ratio": share, **dict(*changes)}
                for name, source, share, *changes in datasets
            ],
            "validation": {"ratio": 0.1, "seed": 7},
            **sections,
        }
        file = tmp_path / "mixture.yaml"
        file.write_text(to_yaml({k: v for k, v in values.items() if v is not None}))
        return load_mixture(file)

    return make


@pytest.fixture
def run(tmp_path):
    """`prepare` into tmp_path/out; small shards, so that there are several."""

    def call(config: MixtureConfig, **changes):
        options = {"output": tmp_path / "out", "shard_characters": 60_000, **changes}
        return prepare(config, Options(**options))

    return call


@pytest.fixture
def documents_of(tokenizer) -> Callable[[Path], list[str]]:
    """The texts of an indexed dataset, in order."""

    def read(prefix: Path) -> list[str]:
        tokens, texts, end = open_tokens(prefix, read_header(prefix)), [], 0
        for length in all_document_lengths(prefix):
            ids = tokens[end : end + length].tolist()
            assert ids[-1] == tokenizer.eod
            texts.append(tokenizer.decode(ids[:-1]))
            end += length
        return texts

    return read
