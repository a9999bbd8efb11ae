"""Cuts against sorting, and each way of sampling against its expectation."""

import numpy as np
import pytest

from equilibrium_mcore.config.data import DataConfig
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.problems import parse
from equilibrium_mcore.config.yaml_io import read_mapping
from equilibrium_mcore.corpus.mixtures.selection import (
    CutReader,
    find_cut,
    ordered,
    scrambled,
    weighted_keys,
)

ALL = 10**9


@pytest.mark.parametrize("distinct", [3, 50, 10**18])
def test_cut_takes_what_sorting_would_take(distinct):
    generator = np.random.default_rng(distinct % 97)
    for _ in range(20):
        keys = generator.integers(0, distinct, 500).astype(np.uint64)
        weights = generator.integers(1, 40, 500)
        target = int(generator.integers(1, weights.sum() + 1))
        blocks = list(
            zip(np.split(keys, [100, 101, 350]), np.split(weights, [100, 101, 350]), strict=True)
        )
        cut = find_cut(lambda blocks=blocks: iter(blocks), target)
        reader = CutReader(cut)
        taken = np.concatenate([reader.take(*block) for block in blocks])
        order = np.argsort(keys, kind="stable")
        needed = int(np.searchsorted(np.cumsum(weights[order]), target)) + 1
        assert sorted(order[:needed]) == np.flatnonzero(taken).tolist()
    assert find_cut(lambda: iter(blocks), int(weights.sum()) + 1) is None
    assert not CutReader(find_cut(lambda: iter(blocks), 0)).take(keys, weights).any()


def test_keys_are_in_the_order_of_their_values():
    values = np.array([-np.inf, -2.5, -1e-300, -0.0, 0.0, 1e-300, 1.0, 7.0, np.inf])
    keys = ordered(values)
    assert (keys[3] == keys[4]) and (
        np.diff(keys[[0, 1, 2, 3, 5, 6, 7, 8]].astype(object)) > 0
    ).all()
    assert (np.argsort(ordered(values[[1, 5, 7]], descending=True)) == [2, 1, 0]).all()


def test_weighted_keys_follow_the_weights():
    """The first of two, drawn often: weight 3 comes before weight 1 in 3 of 4 draws."""
    count = 40_000
    hashes = scrambled(np.arange(2 * count, dtype=np.uint64), 9)
    keys = weighted_keys(hashes, np.tile([3.0, 1.0], count)).reshape(count, 2)
    first = float((keys[:, 0] < keys[:, 1]).mean())
    assert abs(first - 0.75) < 4 * np.sqrt(0.75 * 0.25 / count)
    # Another purpose of the same hash is independent of it.
    held_out = scrambled(hashes, 1).reshape(count, 2)
    assert abs(np.corrcoef(keys[:, 0] < keys[:, 1], held_out[:, 0] < held_out[:, 1])[0, 1]) < 0.02


def test_uniform_sampling_takes_a_seeded_part(
    tmp_path, rows, write_rows, mixture, run, documents_of, monkeypatch
):
    from equilibrium_mcore.corpus.mixtures import readers

    monkeypatch.setattr(readers, "RANGE_BYTES", (5_000, 5_000))
    source, places = write_rows(tmp_path / "a.jsonl", rows), {}
    by_text = {row["text"]: row["id"] for row in rows}
    for seed in (1, 1, 2):
        config = mixture(("a", source, 1.0), validation={"ratio": 0.1, "seed": seed})
        (facts,) = run(config, overwrite=True).datasets
        texts = documents_of(tmp_path / "out" / facts.outputs[0].prefix)
        found = sorted(by_text[text] for text in texts)
        assert places.setdefault(seed, found) == found
    assert places[1] != places[2]
    for found in places.values():
        assert len(found) < 200 and min(found) < 100 and max(found) > 300  # not the file's head


def test_weighted_sampling_prefers_the_heavier_ones(
    tmp_path, rows, write_rows, mixture, run, documents_of, tokenizer
):
    sampling = {"sampling": {"method": "weighted", "field": "weight"}}
    config = mixture(("a", write_rows(tmp_path / "a.parquet", rows), 1.0, sampling))
    (facts,) = run(config).datasets
    assert facts.rows == len(rows) and facts.rows == facts.documents + facts.not_needed
    longest = max(len(tokenizer.encode(row["text"])) + 1 for row in rows)
    wanted = 20_000 / 0.9 * 1.01
    assert wanted <= facts.tokens < wanted + longest
    weights = {row["text"]: row["weight"] for row in rows}
    texts = documents_of(tmp_path / "out" / facts.outputs[0].prefix)
    heavy = sum(weights[text] > 1 for text in texts)
    assert len(texts) > 25 and heavy > 0.85 * len(texts)


def test_weights_must_be_numbers_and_zero_is_never_taken(tmp_path, rows, write_rows, mixture, run):
    sampling = {"max_epochs": 1e6, "sampling": {"method": "weighted", "field": "meta.level"}}
    source = write_rows(tmp_path / "a.jsonl", rows)  # the first row's level is 0
    (facts,) = run(mixture(("a", source, 1.0, sampling), total_tokens=ALL)).datasets
    assert facts.dropped == {"row: weight 0": 1} and facts.documents == len(rows) - 1
    sampling["sampling"]["field"] = "text"
    with pytest.raises(ConfigError, match="field 'text' holds .* and sampling needs a number"):
        run(mixture(("a", source, 1.0, sampling), total_tokens=ALL), overwrite=True)
    sampling["sampling"]["field"] = "meta.depth"
    with pytest.raises(ConfigError, match=r"no field 'meta\.depth'"):
        run(mixture(("a", source, 1.0, sampling), total_tokens=ALL), overwrite=True)


@pytest.mark.parametrize("hardest_first", [False, True])
def test_curriculum_makes_stages_and_a_blend_each(
    tmp_path, rows, write_rows, mixture, run, documents_of, hardest_first
):
    curriculum = {
        "max_epochs": 1e6,
        "sampling": {"method": "curriculum", "field": "meta.level", "stages": 3,
                     "hardest_first": hardest_first},
    }  # fmt: skip
    config = mixture(
        ("a", write_rows(tmp_path / "a.jsonl", rows), 0.75, curriculum),
        ("b", write_rows(tmp_path / "b.jsonl", rows[:50]), 0.25, {"max_epochs": 1e6}),
        total_tokens=ALL,
    )
    manifest = run(config)
    a, b = manifest.datasets
    by_text = {row["text"]: row["meta"]["level"] for row in rows}
    levels = [
        [by_text[text] for text in documents_of(tmp_path / "out" / output.prefix)]
        for output in a.outputs
    ]
    if hardest_first:
        levels = [[-level for level in stage] for stage in levels]
    assert max(levels[0]) < min(levels[1]) and max(levels[1]) < min(levels[2])
    assert sum(map(len, levels)) == len(rows) and levels[0] != sorted(levels[0])
    longest = max(output.tokens for output in a.outputs) - min(o.tokens for o in a.outputs)
    assert longest < 0.1 * a.tokens
    assert manifest.blends == [f"blend_stage{k}.yaml" for k in (1, 2, 3)]
    for k, name in enumerate(manifest.blends, start=1):
        blend = parse(DataConfig, read_mapping(tmp_path / "out" / name))
        assert [source.name for source in blend.sources] == [f"a_stage{k}", "b"]
        assert [source.weight for source in blend.sources] == [0.75, 0.25]
        assert all(
            source.prefix.with_name(source.prefix.name + ".idx").is_file()
            for source in blend.sources
        )
    assert len(b.outputs) == 1


def test_curriculum_with_boundaries(tmp_path, rows, write_rows, mixture, run):
    def config(boundaries):
        sampling = {"method": "curriculum", "field": "score", "boundaries": boundaries}
        changes = {"max_epochs": 1e6, "sampling": sampling}
        return mixture(
            ("a", write_rows(tmp_path / "a.jsonl", rows), 1.0, changes), total_tokens=ALL
        )

    (facts,) = run(config([1.0, 3.5])).datasets
    assert [(o.low, o.high) for o in facts.outputs] == [(1, 1), (2, 3), (4, 5)]
    assert [o.documents for o in facts.outputs] == [80, 160, 160]
    with pytest.raises(ValueError, match="stage 3 of 3 has no document"):
        run(config([1.0, 9.0]), overwrite=True)


def test_temperature_flattens_the_blend(tmp_path, rows, write_rows, mixture, run):
    flat = {"max_epochs": 1e6, "sampling": {"temperature": 2.0}}
    config = mixture(
        ("a", write_rows(tmp_path / "a.jsonl", rows[:300]), 0.8, flat),
        ("b", write_rows(tmp_path / "b.jsonl", rows[300:]), 0.2, flat),
    )
    manifest = run(config)
    assert [d.share for d in manifest.datasets] == pytest.approx([2 / 3, 1 / 3])
    blend = parse(DataConfig, read_mapping(tmp_path / "out/blend.yaml"))
    assert [s.weight for s in blend.sources] == pytest.approx([2 / 3, 1 / 3])
