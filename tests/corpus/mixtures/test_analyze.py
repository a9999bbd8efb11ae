"""An analysis against counting by hand; reports that can be read back."""

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest

from equilibrium_mcore.config.load_mixture import load_mixture
from equilibrium_mcore.config.yaml_io import read_mapping, to_yaml
from equilibrium_mcore.corpus.mixtures.analyze import analyze, expected
from equilibrium_mcore.corpus.mixtures.pictures import draw
from equilibrium_mcore.corpus.mixtures.report import csv_text, json_text, markdown
from equilibrium_mcore.corpus.mixtures.statistics import DuplicateCounter, lengths_of


@pytest.fixture
def prepared(tmp_path, rows, write_rows, mixture, run) -> Path:
    """Two datasets; b repeats 20 documents of a, and 5 of its own."""
    filters = {"filters": [{"type": "length", "min_length": 100}], "max_epochs": 1e6}
    second = [*rows[180:300], *rows[295:300]]
    run(
        mixture(
            ("a", write_rows(tmp_path / "a.jsonl", rows[:200]), 0.75, filters),
            ("b", write_rows(tmp_path / "b.jsonl", second), 0.25, filters),
            total_tokens=10**6,
        )
    )
    return tmp_path / "out"


def test_prepared_data_by_hand(prepared, rows, tokenizer):
    analysis = analyze(prepared)
    a, b = analysis.sources
    kept = [row["text"] for row in rows[:200] if len(row["text"]) >= 100]
    ids = [[*tokenizer.encode(text), tokenizer.eod] for text in kept]
    lengths = sorted(map(len, ids))
    assert a.documents == a.lengths.documents == len(kept)
    assert a.lengths.total == sum(lengths) == a.train_tokens + a.validation_tokens
    assert (a.lengths.smallest, a.lengths.largest) == (lengths[0], lengths[-1])
    assert a.lengths.quantiles["0.5"] == lengths[int(np.ceil(len(lengths) * 0.5)) - 1]
    counts = np.bincount(np.concatenate(ids))
    shares = counts[counts > 0] / counts.sum()
    assert a.tokens.counted == counts.sum() and a.tokens.distinct == np.count_nonzero(counts)
    assert a.tokens.entropy_bits == pytest.approx(-(shares * np.log2(shares)).sum())
    assert a.tokens.top[0] == (int(counts.argmax()), counts.max() / counts.sum())
    long = [len(row["text"]) >= 100 for row in rows]
    assert b.duplicates["across"] == sum(long[180:200])
    assert b.duplicates["within"] == sum(long[295:300])
    assert a.dropped == {"length: fewer than 100 characters": 200 - len(kept)}
    assert (a.expected_share, a.training_share) == (0.75, 0.75)
    assert a.epochs == pytest.approx(0.75 * 10**6 / a.train_tokens)
    assert a.prepared_share + b.prepared_share == pytest.approx(1)
    assert any("repeat one of its own" in note for note in analysis.notes)


def test_a_blend_changed_by_hand_shows(prepared):
    values = read_mapping(prepared / "blend.yaml")
    values["sources"][0]["weight"] = 0.25
    (prepared / "blend.yaml").write_text(to_yaml(values))
    a, b = analyze(prepared).sources
    assert a.training_share == b.training_share == 0.5 and a.expected_share == 0.75
    assert any("the blend's share is 0.5000" in note for note in analyze(prepared).notes)


def test_reports_hold_the_same_figures(prepared, tmp_path):
    analysis = analyze(prepared)
    values = json.loads(json_text(analysis, cost={"days": 1.5}))
    lines = list(csv.DictReader(io.StringIO(csv_text(analysis))))
    text = markdown(analysis, cost=["1 * 2 = 2"], pictures=["shares.png"])
    for source, line, written in zip(analysis.sources, lines, values["sources"], strict=True):
        assert line["dataset"] == written["name"] == source.name
        assert int(line["on_disk_training"]) == written["train_tokens"] == source.train_tokens
        assert f"{source.train_tokens:,}" in text
    assert values["training_cost"] == {"days": 1.5} and "- 1 * 2 = 2" in text
    drawn = draw(analysis, tmp_path)
    assert drawn == ["shares.png", "dropped.png", "lengths.png"]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in drawn)


def test_what_a_mixture_alone_says(tmp_path):
    analysis = expected(load_mixture("pretrain/phase1/mixture1"))
    assert not analysis.prepared and len(analysis.sources) == 9
    code = next(s for s in analysis.sources if s.name == "starcoder")
    assert code.expected_tokens == pytest.approx(0.2 * 2e12) and code.epochs == pytest.approx(1.6)
    text = markdown(analysis)
    assert "before any filter" in text and "Kept and dropped" not in text
    assert draw(analysis, tmp_path) == ["shares.png"]
    assert len(csv_text(analysis).splitlines()) == 10


def test_lengths_in_blocks_are_those_of_the_whole():
    values = np.random.default_rng(0).integers(1, 5000, 1001)
    found = lengths_of(iter(np.split(values, [10, 500])), sequence_length=4096)
    assert found.total == values.sum() and found.longer_than_sequence == (values > 4096).sum()
    assert sum(found.histogram) == values.size
    assert found.histogram[3] == ((values >= 8) & (values < 16)).sum()
    ordered = np.sort(values)
    for name, value in found.quantiles.items():
        assert value == ordered[int(np.ceil(float(name) * values.size)) - 1]


def test_duplicates_within_and_across():
    counter = DuplicateCounter()
    assert counter.count("a", iter([b"1", b"2", b"1", b"1"])) == {
        "looked_at": 4, "within": 2, "across": 0,
    }  # fmt: skip
    assert counter.count("b", iter([b"3", b"2", b"3", b"2"])) == {
        "looked_at": 4, "within": 1, "across": 2,
    }  # fmt: skip


def test_a_folder_that_is_not_whole_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="its preparation has not ended"):
        analyze(tmp_path)
    (tmp_path / "manifest.json").write_text('{"name": "x", "datasets": []}')
    with pytest.raises(ValueError, match="is not a manifest of"):
        analyze(tmp_path)
