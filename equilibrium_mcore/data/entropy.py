"""What counting can reach: unigram and bigram cross-entropy of the validation tokens.

A model that has learnt nothing but token frequencies reaches the unigram figure; one that looks
at the previous token only reaches the bigram figure. Counts come from the training split.

    p1(w)     = (c(w) + 1) / (N + V)                                 add-one
    p2(w | u) = (c(u, w) + T(u) * p1(w)) / (c(u) + T(u))             Witten and Bell, 1991

with V the vocabulary, N the tokens counted, and T(u) how many different tokens follow u. T(u) = 0
gives p1. With several sources the counts of each are scaled to its weight in the blend.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from equilibrium_mcore.config.data import DataConfig
from equilibrium_mcore.data.indexed_files import read_header
from equilibrium_mcore.data.sources import read_split_tokens

BLOCK_TOKENS = 1 << 16
MAX_TOKENS_PER_SOURCE = 8_000_000


@dataclass(frozen=True)
class NgramBaseline:
    """Cross-entropies in nats per token, and from how many tokens they come."""

    unigram: float
    bigram: float
    train_tokens: int
    validation_tokens: int


def ngram_baseline(
    data: DataConfig,
    validation: Iterable[tuple[np.ndarray, np.ndarray]],
    *,
    vocab_size: int,
    max_tokens_per_source: int = MAX_TOKENS_PER_SOURCE,
) -> NgramBaseline:
    """Entropies of the `validation` pairs under counts from the training split of the blend.

    `validation` gives (inputs, labels), the very pairs that the validation loss averages over:
    see `validation_pairs`. Of a source with more tokens than `max_tokens_per_source`, evenly
    spaced blocks are counted.
    """
    streams = []
    for source in data.sources:
        tokens = read_split_tokens(source, read_header(source.prefix), data.split, "train")
        streams.append((_sample_blocks(tokens, max_tokens_per_source), source.weight))
    pairs = list(validation)
    inputs = np.concatenate([pair[0].ravel() for pair in pairs])
    labels = np.concatenate([pair[1].ravel() for pair in pairs])
    return ngram_entropies(streams, inputs, labels, vocab_size=vocab_size)


def validation_pairs(dataset, samples: int) -> Iterable[tuple[np.ndarray, np.ndarray]]:
    """(inputs, labels) of the first `samples` samples, without the positions the loss leaves out"""
    for number in range(samples):
        sample = dataset[number]
        counted = sample["loss_mask"].numpy() > 0
        yield sample["tokens"].numpy()[counted], sample["labels"].numpy()[counted]


def ngram_entropies(
    train: Sequence[tuple[Sequence[np.ndarray], float]],
    inputs: np.ndarray,
    labels: np.ndarray,
    *,
    vocab_size: int,
) -> NgramBaseline:
    """Entropies of `labels` after `inputs`, both [tokens], counted from `train`.

    `train` has per source its blocks of consecutive tokens and its weight. Raises ValueError when
    there is nothing to count from or for.
    """
    sizes = [sum(block.size for block in blocks) for blocks, _ in train]
    if not labels.size or not all(sizes):
        raise ValueError(
            f"n-gram baseline: {labels.size} validation tokens and {sizes} training tokens per "
            f"source; each must be more than 0"
        )
    total, weights = sum(sizes), sum(weight for _, weight in train)
    unigram = np.zeros(vocab_size)
    keys, counts = [], []
    for (blocks, weight), size in zip(train, sizes, strict=True):
        scale = weight / weights * total / size
        unigram += scale * np.bincount(np.concatenate(blocks), minlength=vocab_size)
        pairs = np.concatenate([_pair_ids(b[:-1], b[1:], vocab_size) for b in blocks])
        key, count = np.unique(pairs, return_counts=True)
        keys.append(key)
        counts.append(scale * count)
    bigram_keys, places = np.unique(np.concatenate(keys), return_inverse=True)
    bigram = np.bincount(places, weights=np.concatenate(counts), minlength=bigram_keys.size)
    firsts = bigram_keys // vocab_size
    context = np.bincount(firsts, weights=bigram, minlength=vocab_size)
    followers = np.bincount(firsts, minlength=vocab_size)

    p1 = (unigram + 1) / (total + vocab_size)
    wanted = _pair_ids(inputs, labels, vocab_size)
    place = np.minimum(np.searchsorted(bigram_keys, wanted), bigram_keys.size - 1)
    seen = np.where(bigram_keys[place] == wanted, bigram[place], 0.0)
    known = followers[inputs] > 0
    weight = np.where(known, followers[inputs], 1)  # an unknown context leaves p1
    p2 = (seen + weight * p1[labels]) / (context[inputs] + weight)
    return NgramBaseline(
        unigram=float(-np.log(p1[labels]).mean()),
        bigram=float(-np.log(p2).mean()),
        train_tokens=total,
        validation_tokens=int(labels.size),
    )


def _pair_ids(first: np.ndarray, second: np.ndarray, vocab_size: int) -> np.ndarray:
    return first.astype(np.int64) * vocab_size + second


def _sample_blocks(tokens: np.ndarray, limit: int) -> list[np.ndarray]:
    """All tokens as one block, or evenly spaced blocks of `limit` tokens in all."""
    if tokens.size <= limit:
        return [np.asarray(tokens)]
    count = max(1, limit // BLOCK_TOKENS)
    length = min(BLOCK_TOKENS, limit)
    starts = np.linspace(0, tokens.size - length, count).astype(np.int64)
    return [np.asarray(tokens[start : start + length]) for start in starts]
