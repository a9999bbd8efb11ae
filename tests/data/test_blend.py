"""Blends: what is refused before anything is built; megatron-core's order, shares and caches.

The ledger's order has its own tests, in tests/data/ledger.
"""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.indexed_dataset import IndexedDataset

from equilibrium_mcore.config.data import DataConfig, SourceConfig
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.data.blend import build_datasets, cache_directory
from equilibrium_mcore.data.indexed_files import read_header
from equilibrium_mcore.data.sources import read_split_tokens, split_documents
from equilibrium_mcore.parallel.launch import RankInfo

SEQUENCE = 32


@pytest.fixture
def two_sources(two_sources):
    """In megatron-core's order."""
    return two_sources.model_copy(update={"order": "megatron"})


def build(data, **changes):
    arguments = {
        "sequence_length": SEQUENCE,
        "train_samples": 200,
        "validation_samples": 20,
        "test_samples": 0,
        "seed": 5,
        **changes,
    }
    return build_datasets(data, **arguments)


def repeating(data, **changes):
    """The same data may stand in it under several names."""
    return data.model_copy(update={"allow_repeated_sources": True, **changes})


def source_of(sample):
    """0 for source a, 1 for b: their ids do not overlap."""
    return int(sample["tokens"][0] >= 103)


def test_samples_and_shares(two_sources):
    train, validation, test = build(two_sources, model_vocab_size=640)
    assert len(train) >= 200 and len(validation) >= 20 and test is None
    sample = train[0]
    assert set(sample) == {"dataset_id", "tokens", "labels", "loss_mask", "position_ids"}
    for name in ("tokens", "labels", "position_ids"):
        assert sample[name].shape == (SEQUENCE,) and sample[name].dtype == torch.int64
    assert torch.equal(sample["tokens"][1:], sample["labels"][:-1])
    assert torch.equal(sample["loss_mask"], torch.ones(SEQUENCE))
    assert torch.equal(sample["position_ids"], torch.arange(SEQUENCE))
    # Every prefix holds the shares 3 : 1, give or take one sample.
    from_b = np.cumsum([source_of(train[i]) for i in range(200)])
    wanted = 0.25 * np.arange(1, 201)
    assert np.abs(from_b - wanted).max() <= 1
    assert sum(source_of(validation[i]) for i in range(20)) == 5


def test_splits_are_disjoint_runs_of_documents(two_sources):
    _, validation, _ = build(two_sources)
    seen = [set(), set()]
    for number in range(len(validation)):
        sample = validation[number]
        pairs = zip(sample["tokens"].tolist(), sample["labels"].tolist(), strict=True)
        seen[source_of(sample)].update(pairs)
    for source, pairs in zip(two_sources.sources, seen, strict=True):
        dataset = IndexedDataset(str(source.prefix))
        begin, end = split_documents(two_sources.split, len(dataset))[1]
        documents = [dataset[i].tolist() for i in range(begin, end)]
        inside = {pair for ids in documents for pair in zip(ids, ids[1:], strict=False)}
        # Pairs across documents are few: one per document boundary.
        assert len(pairs - inside) <= 2 * len(documents)
        tokens = read_split_tokens(source, read_header(source.prefix), "90,8,2", "validation")
        assert tokens.tolist() == sum(documents, [])


@pytest.mark.parametrize("split", ["98,1,1", "90,9,1", "1", "99.5,0.5,0", "1,2,3", "969,30,1"])
def test_split_bounds_are_megatron_cores(split):
    matrix = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
    for sequences in (1, 7, 417, 443, 99_999):
        ours = split_documents(split, sequences)
        for bounds, (begin, end) in zip(matrix, ours, strict=True):
            expected = [int(round(b * float(sequences))) for b in bounds] if bounds else None
            assert begin == end if expected is None else [begin, end] == expected


def test_order_depends_on_the_seed_and_not_on_the_cache(two_sources, tmp_path):
    def order(**changes):
        train = build(two_sources, **changes).train
        return torch.stack([train[i]["tokens"] for i in range(200)])

    first = order()
    assert torch.equal(first, order())  # from the cache
    moved = two_sources.model_copy(update={"cache_directory": tmp_path / "elsewhere"})
    again = build(moved).train
    assert torch.equal(first, torch.stack([again[i]["tokens"] for i in range(200)]))
    assert not torch.equal(first, order(seed=6))


def test_many_sources_and_few_samples(two_sources):
    a, b = two_sources.sources
    for count in (1, 2, 7, 50):
        sources = [
            SourceConfig(name=f"s{i}", prefix=(a, b)[i % 2].prefix, weight=w)
            for i, w in enumerate([90.0, 1.0, 3.0, 5.0, 0.5, 0.5])
        ]
        data = repeating(two_sources, sources=sources)
        datasets = build(data, train_samples=count, validation_samples=count, test_samples=1)
        assert len(datasets.train) >= count and len(datasets.validation) >= count
        assert datasets.test[0]["tokens"].shape == (SEQUENCE,)


def test_rounding_never_oversamples_a_source(two_sources, tmp_path, write_dataset):
    # One document of SEQUENCE tokens: n samples need n + 1 epochs and have none to spare.
    prefix = write_dataset(tmp_path / "tight", [np.arange(SEQUENCE)])
    for weights in ([90.0, 1.0, 3.0, 5.0, 0.5, 0.5], [1.0] * 9, [0.7, 0.3]):
        sources = [
            SourceConfig(name=f"s{i}", prefix=prefix, weight=w) for i, w in enumerate(weights)
        ]
        data = repeating(two_sources, sources=sources, split="1,0,0")
        for count in (1, 10, 33):
            train = build(data, train_samples=count, validation_samples=0).train
            assert len(train) >= count
            assert train[count - 1]["tokens"].shape == (SEQUENCE,)


def test_one_source_and_several_epochs(two_sources):
    data = two_sources.model_copy(update={"sources": two_sources.sources[:1]})
    header = read_header(data.sources[0].prefix)
    train = build(data, train_samples=3 * header.tokens // SEQUENCE).train
    assert len(train) >= 3 * header.tokens // SEQUENCE
    assert train[len(train) - 1]["tokens"].max() < 103


def test_a_dataset_made_anew_is_read_anew(two_sources, write_dataset):
    before = cache_directory(two_sources)
    assert int(build(two_sources).train[0]["tokens"].min()) >= 3
    for source in two_sources.sources:
        write_dataset(source.prefix, [np.full(70, 250) for _ in range(120)])
    assert cache_directory(two_sources) != before
    refused(two_sources, "b and a hold the same data", "data.allow_repeated_sources=true")
    train = build(repeating(two_sources)).train
    assert all(train[i]["tokens"].eq(250).all() for i in range(200))


def test_a_cache_cut_short_is_built_again(two_sources):
    expected = build(two_sources).train[7]["tokens"]
    files = sorted(cache_directory(two_sources).glob("*.npy"))
    assert files
    for number, path in enumerate(files):
        os.truncate(path, (0, 50, path.stat().st_size - 1)[number % 3])
    assert torch.equal(build(two_sources).train[7]["tokens"], expected)


def refused(data, *texts, **changes):
    """The one error names every text."""
    with pytest.raises(ConfigError) as caught:
        build(data, **changes)
    for text in texts:
        assert text in str(caught.value)
    return caught.value


def test_missing_and_damaged_files_are_named_together(two_sources):
    a, b = two_sources.sources
    os.truncate(f"{a.prefix}.bin", 1000)
    os.remove(f"{b.prefix}.idx")
    error = refused(
        two_sources,
        "source 'a'",
        f"{a.prefix}.bin is cut short: it has 1,000 bytes",
        "source 'b'",
        f"{b.prefix}.idx does not exist",
    )
    assert len(error.problems) == 2


def test_damaged_index(two_sources):
    a, b = two_sources.sources
    os.truncate(f"{a.prefix}.idx", 300)
    with Path(f"{b.prefix}.idx").open("r+b") as stream:
        stream.write(b"something")
    refused(two_sources, f"{a.prefix}.idx has 300 bytes", f"{b.prefix}.idx is not the index")
    with Path(f"{b.prefix}.idx").open("r+b") as stream:
        stream.write(b"MMIDIDX\x00\x00\x02")
    refused(two_sources, f"{b.prefix}.idx has version 2")


def test_index_of_another_dataset(two_sources):
    a, b = (source.prefix for source in two_sources.sources)
    os.replace(f"{a}.idx", f"{b}.idx")
    refused(two_sources, f"{b}.bin", "describes")


def test_tokens_beyond_the_vocabulary(two_sources, tmp_path, write_dataset):
    prefix = write_dataset(tmp_path / "high", [np.full(500, 640) for _ in range(20)])
    sources = [SourceConfig(name="high", prefix=prefix, weight=1.0)]
    data = two_sources.model_copy(update={"sources": sources})
    refused(data, "token id 640", "ends at 639", "at least 641", model_vocab_size=640)
    assert len(build(data, model_vocab_size=641).train) >= 200
    refused(data, "has 600 tokens", "vocabulary has 512", model_vocab_size=512)


def test_another_tokenizer_than_the_manifests(two_sources, tokenizer):
    manifest = {
        "tokenizer_type": "SentencePieceTokenizer",
        "tokenizer_sha256": tokenizer.fingerprint,
        "vocab_size": 600,
        "eod": 1,
        "append_eod": True,
        "key": "text",
        "documents": 100,
        "tokens": 1,
        "largest_token": 599,
        "dtype": "uint16",
        "skipped_lines": 0,
        "inputs": [],
    }
    path = Path(f"{two_sources.sources[0].prefix}.json")
    path.write_text(json.dumps(manifest))
    build(two_sources)
    path.write_text(json.dumps(manifest | {"eod": 2}))
    refused(two_sources, "source 'a'", "documents with the id 2, the run with 1", "end_of_document")
    path.write_text(json.dumps(manifest | {"eod": 2, "append_eod": False}))
    build(two_sources)  # no document of it ends with that id
    other = Path(f"{two_sources.sources[1].prefix}.json")
    other.write_text(json.dumps(manifest))
    refused(two_sources, "a: made without --append-eod, b with it")
    other.unlink()
    path.write_text(json.dumps(manifest | {"tokenizer_sha256": "0123456789abcdef"}))
    refused(two_sources, "source 'a'", "another tokenizer", str(tokenizer.path), "0123456789ab")
    path.write_text("{}")
    refused(two_sources, f"{path} is not a manifest")


def test_empty_splits_and_bad_split_strings(two_sources, write_dataset):
    data = two_sources.model_copy(update={"split": "100,0,0"})
    refused(data, "leaves none for validation", "20 samples")
    assert build(data, validation_samples=0).validation is None
    for split in ("", "a,b", "1,2,3,4", "-1,2", "0,0,0"):
        refused(two_sources.model_copy(update={"split": split}), f"data.split {split!r}")


def test_empty_dataset(two_sources, write_dataset, tmp_path):
    prefix = write_dataset(tmp_path / "empty", [np.empty(0)])
    sources = [SourceConfig(name="none", prefix=prefix, weight=1.0)]
    refused(two_sources.model_copy(update={"sources": sources}), f"{prefix} is empty")


def test_shipped_configs(repository):
    folder = repository / "configs" / "data"
    configs = {
        path.stem: DataConfig.model_validate_json(json.dumps(yaml.safe_load(path.read_text())))
        for path in folder.glob("*.yaml")
    }
    assert {source.name: source.weight for source in configs["pretrain_3b"].sources} == {
        "math": 0.30,
        "code": 0.30,
        "economics": 0.20,
        "general": 0.15,
        "science": 0.05,
    }
    assert [source.name for source in configs["quickstart"].sources] == ["code", "prose"]


def _first_samples(rank_info: RankInfo, data: DataConfig) -> list[list[np.ndarray]]:
    """The first tokens of each split, built by this rank together with the others."""
    torch.distributed.init_process_group(
        "gloo",
        init_method=rank_info.init_method,
        rank=rank_info.rank,
        world_size=rank_info.world_size,
    )
    datasets = build(data)
    torch.distributed.destroy_process_group()
    return _first_tokens(datasets)


def _first_tokens(datasets) -> list[list[np.ndarray]]:
    return [[d[i]["tokens"].numpy() for i in range(20)] for d in datasets if d is not None]


def test_ranks_build_once_and_agree(ranks, two_sources):
    seen = ranks.run(3, _first_samples, two_sources)
    alone = [
        [d[i]["tokens"].numpy() for i in range(20)] for d in build(two_sources) if d is not None
    ]
    for splits in seen:
        np.testing.assert_array_equal(splits, alone)
