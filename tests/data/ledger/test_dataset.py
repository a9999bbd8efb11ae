"""Samples: packing, shares over ranks and workers, what is refused before and while reading."""

from __future__ import annotations

import os
import pickle
import resource

import numpy as np
import pytest
import torch

from equilibrium_mcore.config.data import DataConfig, SourceConfig
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.data.blend import build_datasets
from equilibrium_mcore.data.indexed_files import fingerprint, read_header
from equilibrium_mcore.data.ledger.dataset import LedgerDataset
from equilibrium_mcore.data.loader import batches
from equilibrium_mcore.data.open_files import OpenFiles
from tests.data.ledger.support import laned, open_source, write_source

SEQUENCE = 32


@pytest.fixture
def blend(sources, tokenizer_config) -> DataConfig:
    return DataConfig(
        name="blend",
        tokenizer=tokenizer_config,
        sources=[
            SourceConfig(name=name, prefix=sources.prefixes[name], weight=weight)
            for name, weight in (("middling", 3.0), ("mixed", 1.0))
        ],
        split="90,8,2",
    )


def build(data, **changes):
    arguments = {
        "sequence_length": SEQUENCE,
        "train_samples": 200,
        "validation_samples": 20,
        "seed": 5,
        "model_vocab_size": 10**6,
        **changes,
    }
    return build_datasets(data, **arguments)


def test_a_sample_is_what_megatrons_is(blend):
    """Keys, shapes and types, so that whatever trains on one trains on the other."""
    ours = build(blend).train[0]
    theirs = build(blend.model_copy(update={"order": "megatron"})).train[0]
    assert set(ours) == set(theirs)
    for name in ("tokens", "labels", "position_ids", "loss_mask"):
        assert (ours[name].shape, ours[name].dtype) == (theirs[name].shape, theirs[name].dtype)
    assert torch.equal(ours["tokens"][1:], ours["labels"][:-1])
    assert ours["loss_mask"].all() and torch.equal(ours["position_ids"], torch.arange(SEQUENCE))


def test_by_number_or_in_batches_it_is_one_order(blend):
    train = build(blend).train
    rows = torch.stack([train[i]["tokens"] for i in range(48)])
    assert torch.equal(train[3]["tokens"], rows[3])  # a step back
    for micro, ranks, workers in ((1, 1, 0), (2, 3, 0), (4, 2, 2), (3, 1, 1)):
        loaders = [
            batches(
                train,
                consumed_samples=0,
                micro_batch_size=micro,
                data_parallel_rank=rank,
                data_parallel_size=ranks,
                num_workers=workers,
            )
            for rank in range(ranks)
        ]
        steps = 48 // (micro * ranks)
        seen = torch.cat([next(loader)["tokens"] for _ in range(steps) for loader in loaders])
        assert torch.equal(seen, rows[: len(seen)])


def test_the_order_does_not_depend_on_how_long_the_run_is(blend):
    short, long = build(blend, train_samples=50).train, build(blend, train_samples=5000).train
    assert all(torch.equal(short[i]["tokens"], long[i]["tokens"]) for i in range(50))


def test_splits_have_documents_of_their_own(blend):
    datasets = build(blend, test_samples=5)
    ranges = [[(s.begin, s.end) for s in part.sources] for part in datasets]
    for train, validation, test in zip(*ranges, strict=True):
        assert train[1] == validation[0] and validation[1] == test[0]


def test_going_back_before_the_checkpoint_is_an_error(blend):
    ledger = build(blend).train.cursor_at(50)
    later = build(blend, ledger_state=ledger.state(), consumed_samples=50).train
    assert torch.equal(later[50]["tokens"], build(blend).train[50]["tokens"])
    with pytest.raises(ValueError, match="sample 49 lies before sample 50"):
        later[49]


# ------------------------------------------------------------------------------------ packing


def numbered(prefix):
    """The document of each token id, and each document's first id: `write_source` counts up."""
    source = open_source(prefix, "x", split="100")
    lengths = [source.length(d) for d in range(source.documents)]
    starts = np.cumsum([0, *lengths])
    return starts, lambda ids: np.searchsorted(starts, ids, side="right") - 1


@pytest.mark.parametrize("name", ["small", "middling", "one", "mixed"])
@pytest.mark.parametrize("length", [1, 5, 64])
def test_documents_are_packed_with_resets(sources, name, length):
    """Positions and mask against what the ids themselves tell, token by token."""
    starts, document_of = numbered(sources.prefixes[name])
    source = open_source(sources.prefixes[name], name, split="100")
    dataset = LedgerDataset(
        [source],
        [1.0],
        sequence_length=length,
        samples=200,
        vocab_size=10**6,
        packing="documents",
    )
    for number in range(200):
        sample = {key: value.numpy() for key, value in dataset[number].items()}
        tokens, labels = sample["tokens"], sample["labels"]
        position = -1
        for i in range(length):
            begins = i == 0 or tokens[i] == starts[document_of(tokens[i])]
            position = 0 if begins else position + 1
            assert sample["position_ids"][i] == position
            goes_on = (
                document_of(labels[i]) == document_of(tokens[i]) and labels[i] == tokens[i] + 1
            )
            assert sample["loss_mask"][i] == goes_on


@pytest.mark.parametrize("name", ["small", "middling", "one", "mixed"])
def test_padded_documents_hold_the_same_text(sources, name):
    """What counts or begins a document is the text; every document fills whole multiples."""
    settings = dict(sequence_length=32, samples=100, vocab_size=10**6, packing="documents")
    source = open_source(sources.prefixes[name], name, split="100")
    padded = LedgerDataset([source], [1.0], document_multiple=8, **settings)
    ids, held_in_samples = [], []
    for number in range(100):
        sample = {key: value.numpy() for key, value in padded[number].items()}
        starts = np.flatnonzero(sample["position_ids"] == 0)
        assert not (starts % 8).any() and starts[0] == 0
        plan = padded.cursor_at(number).take()
        held_in_samples.append(sum(span.tokens for span in plan.spans))
        for begin, end, span in zip(starts, [*starts[1:], 32], plan.spans, strict=True):
            held, rest = begin + span.tokens, slice(begin + span.tokens, end)
            ids.append(sample["tokens"][begin:held])
            assert end - begin - span.tokens < 8
            assert (sample["labels"][begin : held - 1] == sample["tokens"][begin + 1 : held]).all()
            assert sample["loss_mask"][begin : held - 1].all()
            assert not sample["loss_mask"][rest].any()
            goes_on = plan.label[:2] == (span.document, span.offset + span.tokens)
            assert sample["loss_mask"][held - 1] == goes_on
    expected = laned(source, held_in_samples)
    assert np.array_equal(np.concatenate(ids), np.concatenate(expected))


def test_packing_changes_no_token(blend):
    packed = build(blend.model_copy(update={"packing": "documents"})).train
    stream = build(blend).train
    for number in range(50):
        assert torch.equal(packed[number]["tokens"], stream[number]["tokens"])
        assert torch.equal(packed[number]["labels"], stream[number]["labels"])


# ------------------------------------------------------------------------------- max_epochs


def capped(blend, epochs):
    first, second = blend.sources
    first = first.model_copy(update={"max_epochs": epochs})
    return blend.model_copy(update={"sources": [first, second]})


def test_a_run_that_needs_too_many_epochs_is_refused_with_the_sum(blend):
    tokens = build(blend).train.sources[0].tokens
    enough = int(2 * tokens / SEQUENCE / 0.75)
    assert build(capped(blend, 2.0), train_samples=enough).train is not None
    with pytest.raises(ConfigError) as caught:
        build(capped(blend, 2.0), train_samples=enough + 200)
    for text in (
        "'middling' would be read 2.",
        "max_epochs is 2",
        f"{enough + 200:,} sequences",
        "share 0.75",
        f"{tokens:,} there",
        f"at most {enough:,} sequences",
    ):
        assert text in str(caught.value)


def test_what_was_read_counts_towards_max_epochs(blend):
    data = capped(blend, 1.0)
    tokens = build(blend).train.sources[0].tokens
    enough = int(tokens / SEQUENCE / 0.75)
    half = build(blend).train.cursor_at(enough // 2)
    going_on = {"ledger_state": half.state(), "consumed_samples": enough // 2}
    build(data, train_samples=enough, **going_on)
    with pytest.raises(ConfigError, match="tokens taken so far"):
        build(data, train_samples=enough + 50, **going_on)


# ------------------------------------------------------------------------------------ bad data


def test_an_id_beyond_the_vocabulary_is_named_with_its_document(sources):
    source = open_source(sources.prefixes["middling"], "middling", split="100")
    dataset = LedgerDataset([source], [1.0], sequence_length=64, samples=999, vocab_size=3000)
    with pytest.raises(ValueError, match=r"document \d+ holds the token id \d+, but .*3,000"):
        for number in range(999):
            dataset[number]


def damage(prefix, where, value, dtype):
    with open(f"{prefix}.idx", "r+b") as stream:  # noqa: PTH123
        stream.seek(34 + where)
        stream.write(np.array(value, dtype).tobytes())


def test_an_index_that_does_not_fit_its_data_is_named(tmp_path):
    lengths = [5] * 100
    prefix = write_source(tmp_path / "a", lengths)
    damage(prefix, 4 * 40, -7, np.int32)
    with pytest.raises(ValueError, match=r"a\.idx is damaged: document 40 has -7 tokens"):
        open_source(prefix, "a", split="100").advance((0, 0), 10)
    prefix = write_source(tmp_path / "b", lengths)
    damage(prefix, 4 * 100 + 8 * 40, 4 * 499, np.int64)
    source = open_source(prefix, "b", split="100")
    dataset = LedgerDataset([source], [1.0], sequence_length=10, samples=50, vocab_size=999)
    with pytest.raises(ValueError, match=r"b\.idx does not fit its data: document 40"):
        [dataset[number] for number in range(50)]
    with pytest.raises(ValueError, match=r"b\.idx does not fit its data: sequences \[0, 40\]"):
        damage(prefix, 4 * 100 + 8 * 40, -8, np.int64)
        open_source(prefix, "b", split="40,60")


@pytest.mark.parametrize("spoil", ["missing", "empty", "truncated"])
def test_bad_files_are_refused_before_anything_starts(blend, tmp_path, spoil):
    prefix = write_source(tmp_path / "bad", [10] * 50 if spoil != "empty" else [0])
    words = "is empty"
    if spoil == "missing":
        os.remove(f"{prefix}.idx")
        words = "bad.idx does not exist"
    elif spoil == "truncated":
        os.truncate(f"{prefix}.bin", 77)
        words = "bad.bin is cut short"
    bad = SourceConfig(name="bad", prefix=prefix, weight=1.0)
    with pytest.raises(ConfigError, match=f"'bad'.*{words}"):
        build(blend.model_copy(update={"sources": [*blend.sources, bad]}))


def test_a_fingerprint_tells_datasets_apart_and_not_places(tmp_path):
    def of(name, lengths):
        prefix = write_source(tmp_path / name, lengths)
        return fingerprint(prefix, read_header(prefix))

    first = of("a", [3, 4, 5] * 1000)
    assert first == of("elsewhere", [3, 4, 5] * 1000)
    assert first != of("b", [4, 3, 5] * 1000)
    assert first != of("c", [3, 4, 5] * 1000 + [1])


# ------------------------------------------------------------------------------- many sources


def test_few_files_are_open_however_many_sources(sources, tmp_path):
    files = OpenFiles(limit=3)
    paths = [tmp_path / f"{i}" for i in range(9)]
    for number, path in enumerate(paths):
        path.write_bytes(np.full(10, number, np.int32).tobytes())
    for _ in range(2):
        for number, path in enumerate(paths):
            values = files.read(path, np.int32, offset=4, count=9)
            assert values.tolist() == [number] * 9
            assert len(files._open) <= 3
    assert pickle.loads(pickle.dumps(files))._open == {}
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    assert OpenFiles().limit <= max(1, allowed // 4) or allowed == resource.RLIM_INFINITY
