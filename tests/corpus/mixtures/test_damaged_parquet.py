"""A page of a Parquet file is checked when it is read; the error still names the file."""

from __future__ import annotations

import pytest

from equilibrium_mcore.config.mixture import DatasetConfig
from equilibrium_mcore.config.problems import parse
from equilibrium_mcore.corpus.mixtures.readers import parts_of, rows_of


def test_a_damaged_page_is_told_by_its_file(tmp_path):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    path = tmp_path / "text.parquet"
    table = pa.table({"text": [f"a text of its own, number {n * n}" for n in range(300)]})
    pq.write_table(table, path, compression="snappy")
    sound, told = path.read_bytes(), []
    dataset = parse(DatasetConfig, {"name": "a", "source": str(path), "mix_ratio": 1.0})
    for place in range(40, 1240, 60):  # in the data; its description stands at the end
        path.write_bytes(sound[:place] + b"\xff" * 8 + sound[place + 8 :])
        try:
            for part in parts_of(dataset):
                list(rows_of(dataset, part))
        except ValueError as error:
            told.append(str(error))
    assert told
    assert all(str(path) in text for text in told), told
