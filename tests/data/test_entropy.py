"""The n-gram baseline equals counting with dictionaries."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset

from equilibrium_mcore.data.blend import build_datasets
from equilibrium_mcore.data.entropy import (
    _sample_blocks,
    ngram_baseline,
    ngram_entropies,
    validation_pairs,
)
from equilibrium_mcore.data.sources import split_documents


def naive(streams, pairs, vocab_size):
    """Add-one unigram and Witten-Bell bigram, as the formulas say."""
    total = sum(len(tokens) for tokens, _ in streams)
    all_weights = sum(weight for _, weight in streams)
    unigram, bigram, followers = Counter(), Counter(), defaultdict(set)
    for tokens, weight in streams:
        scale = weight / all_weights * total / len(tokens)
        for token in tokens:
            unigram[token] += scale
        for first, second in zip(tokens, tokens[1:], strict=False):
            bigram[first, second] += scale
            followers[first].add(second)
    context = Counter()
    for (first, _), count in bigram.items():
        context[first] += count

    def p1(token):
        return (unigram[token] + 1) / (total + vocab_size)

    def p2(first, second):
        types = len(followers[first])
        if not types:
            return p1(second)
        return (bigram[first, second] + types * p1(second)) / (context[first] + types)

    # A distribution over the vocabulary, for seen and unseen contexts.
    for first in range(vocab_size):
        assert sum(p2(first, second) for second in range(vocab_size)) == pytest.approx(1)
    return (
        -sum(math.log(p1(second)) for _, second in pairs) / len(pairs),
        -sum(math.log(p2(*pair)) for pair in pairs) / len(pairs),
    )


def test_equals_naive_counting():
    generator = np.random.default_rng(0)
    vocab_size = 30
    # Ids of 25 and more are unknown in training.
    streams = [
        ((generator.integers(0, 25, 400) ** 2 // 25).tolist(), 3.0),
        (generator.integers(10, 25, 100).tolist(), 1.0),
    ]
    inputs = generator.integers(0, vocab_size, 200)
    labels = generator.integers(0, vocab_size, 200)
    pairs = list(zip(inputs.tolist(), labels.tolist(), strict=True))
    expected = naive(streams, pairs, vocab_size)
    train = [([np.array(tokens, np.uint16)], weight) for tokens, weight in streams]
    result = ngram_entropies(train, inputs, labels, vocab_size=vocab_size)
    assert (result.unigram, result.bigram) == pytest.approx(expected, rel=1e-12)
    assert result.train_tokens == 500 and result.validation_tokens == 200


def test_counts_the_training_split_and_scores_the_validation_samples(two_sources):
    datasets = build_datasets(
        two_sources, sequence_length=32, train_samples=10, validation_samples=20, seed=1
    )
    streams, pairs = [], []
    for source in two_sources.sources:
        dataset = IndexedDataset(str(source.prefix))
        begin, end = split_documents(two_sources.split, len(dataset))[0]
        streams.append((np.concatenate(dataset[begin:end]).tolist(), source.weight))
    for number in range(20):
        sample = datasets.validation[number]
        pairs += zip(sample["tokens"].tolist(), sample["labels"].tolist(), strict=True)
    result = ngram_baseline(two_sources, validation_pairs(datasets.validation, 20), vocab_size=210)
    assert (result.unigram, result.bigram) == pytest.approx(naive(streams, pairs, 210), rel=1e-12)
    assert result.validation_tokens == 640


def test_positions_without_loss_do_not_count():
    class OneSample:
        def __getitem__(self, _):
            import torch

            return {
                "tokens": torch.tensor([1, 2, 3]),
                "labels": torch.tensor([2, 3, 4]),
                "loss_mask": torch.tensor([1.0, 0.0, 1.0]),
            }

    ((inputs, labels),) = validation_pairs(OneSample(), 1)
    assert inputs.tolist() == [1, 3] and labels.tolist() == [2, 4]


def test_order_matters_to_the_bigram_only():
    tokens = np.tile(np.arange(8), 500)
    train = [([tokens], 1.0)]
    result = ngram_entropies(train, tokens[:-1], tokens[1:], vocab_size=8)
    assert result.unigram == pytest.approx(math.log(8), abs=1e-3)
    assert result.bigram < 0.05


def test_large_sources_are_sampled_evenly():
    tokens = np.arange(1_000_000)
    blocks = _sample_blocks(tokens, 300_000)
    assert sum(map(len, blocks)) <= 300_000
    assert blocks[0][0] == 0 and blocks[-1][-1] == 999_999
    assert len(_sample_blocks(tokens, 100)[0]) == 100
    assert [len(block) for block in _sample_blocks(tokens, 2_000_000)] == [1_000_000]


def test_nothing_to_count():
    tokens = np.arange(4)
    with pytest.raises(ValueError, match="0 validation tokens"):
        ngram_entropies([([tokens], 1.0)], tokens[:0], tokens[:0], vocab_size=4)
    with pytest.raises(ValueError, match=r"\[0\] training tokens"):
        ngram_entropies([([tokens[:0]], 1.0)], tokens, tokens, vocab_size=4)
