"""Logistic regression on hashed words and word pairs: which of two kinds a text is like.

A word is lower case; each word and each two words in a row set one of 2^bits features; features
have the value log(1 + count) and the document the length 1. The model is one float32 array, its
scores are probabilities that are trained to be right on average. A document longer than
`MAX_CHARACTERS` is judged by evenly spaced pieces of it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import regex

from equilibrium_mcore.config.installation import command
from equilibrium_mcore.corpus.filters.language import sample
from equilibrium_mcore.corpus.filters.model_file import load_model, save_model
from equilibrium_mcore.corpus.filters.ngram_hashes import hash_ngrams, hash_words

KIND = "linear classifier"
MADE_BY = command("quality-classifier")
MAX_CHARACTERS = 20_000
NGRAM_WORDS = 2
_WORD = regex.compile(r"\p{L}[\p{L}\p{M}'’]*|\p{N}+|[^\s\p{L}\p{N}]")


@dataclass(frozen=True)
class LinearClassifier:
    """Weights by feature, float32 [2^bits], and a bias."""

    weights: np.ndarray
    bias: float

    @property
    def bits(self) -> int:
        """Binary logarithm of the number of features."""
        return int(math.log2(self.weights.size))

    def score(self, text: str) -> float:
        """Probability of the positive class, 0 to 1."""
        places, values = features(text, self.bits)
        logit = float(values @ self.weights[places]) + self.bias
        return 0.5 * (1 + math.tanh(logit / 2))

    def save(self, path: Path, **notes: object) -> None:
        """Write the model; `notes` are kept with it."""
        settings = {"bias": self.bias, **notes}
        save_model(path, kind=KIND, settings=settings, arrays={"weights": self.weights})

    @classmethod
    def load(cls, path: Path) -> LinearClassifier:
        """Read a model. Raises ValueError when the file is not one."""
        settings, arrays = load_model(path, kind=KIND, made_by=MADE_BY)
        return cls(arrays["weights"], settings["bias"])


def features(text: str, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """(places, values) of a text's features: int64 [n] without repeats, float32 [n] of length 1."""
    words = [word.lower() for word in _WORD.findall(sample(text, MAX_CHARACTERS))]
    hashes = hash_words(words)
    everything = [hash_ngrams(hashes, n) for n in range(1, NGRAM_WORDS + 1)]
    places, counts = np.unique(
        np.concatenate(everything) >> np.uint64(64 - bits), return_counts=True
    )
    values = np.log1p(counts)
    norm = np.linalg.norm(values) or 1.0
    return places.astype(np.int64), (values / norm).astype(np.float32)


def train_linear_classifier(
    texts: Sequence[str], labels: Sequence[bool], *, bits: int = 18, penalty: float = 1e-5
) -> LinearClassifier:
    """Fit by L-BFGS: mean cross-entropy, both classes weighing the same, + penalty * |weights|^2.

    The result does not depend on any seed. Raises ValueError when a class has no text.
    """
    import torch

    positives = sum(map(bool, labels))
    if not 0 < positives < len(labels):
        raise ValueError(f"{positives} of {len(labels)} texts are positive: both kinds are needed")
    found = [features(text, bits) for text in texts]
    # With places one after another, a document is a bag of features: [documents] from offsets.
    offsets = torch.tensor(np.cumsum([0, *(places.size for places, _ in found[:-1])]))
    places = torch.from_numpy(np.concatenate([places for places, _ in found]))
    values = torch.from_numpy(np.concatenate([values for _, values in found]))
    target = torch.tensor([float(label) for label in labels])
    share = torch.where(target > 0, 0.5 / positives, 0.5 / (len(labels) - positives))
    weights = torch.zeros(1 << bits, 1, requires_grad=True)
    bias = torch.zeros((), requires_grad=True)
    optimizer = torch.optim.LBFGS([weights, bias], max_iter=100, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        logits = bias + torch.nn.functional.embedding_bag(
            places, weights, offsets, per_sample_weights=values, mode="sum"
        ).squeeze(1)
        errors = torch.nn.functional.binary_cross_entropy_with_logits(
            logits, target, share, reduction="sum"
        )
        total = errors + penalty * weights.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    return LinearClassifier(weights.detach().squeeze(1).numpy(), bias.item())
