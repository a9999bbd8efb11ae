"""Trains a classifier of documents from two JSONL files, and measures it on what was held out."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from equilibrium_mcore.corpus.filters.linear_classifier import (
    LinearClassifier,
    train_linear_classifier,
)
from equilibrium_mcore.corpus.filters.model_file import check_output
from equilibrium_mcore.corpus.filters.ngram_hashes import hash_text
from equilibrium_mcore.data.jsonl import read_texts

THRESHOLDS = (0.3, 0.5, 0.7)


@dataclass(frozen=True)
class ClassifierSummary:
    """Sizes, and what was measured on held-out documents.

    `kept` has, by min_score, the shares of the positive and of the negative documents that stay.
    """

    path: Path
    positives: int
    negatives: int
    held_out: int
    accuracy: float
    baseline: float
    kept: dict[float, tuple[float, float]]
    seconds: float


def train_quality_classifier(
    *,
    positive: Sequence[Path],
    negative: Sequence[Path],
    output: Path,
    text_field: str = "text",
    bits: int = 18,
    held_out_share: float = 0.1,
    max_documents: int = 100_000,
    seed: int = 1234,
    overwrite: bool = False,
) -> ClassifierSummary:
    """Train, measure on `held_out_share` of the documents, write `output`.

    `max_documents` of each kind are drawn. `baseline` is the accuracy of always saying the more
    frequent kind. Raises FileNotFoundError, FileExistsError (`check_output`), and ValueError for
    bad lines, another ending than .safetensors, fewer than 10 documents of a kind, or one text on
    both sides.
    """
    started = time.perf_counter()
    check_output(output, inputs=[*positive, *negative], overwrite=overwrite)
    if not 0 < held_out_share < 1:
        raise ValueError(f"--held-out-share {held_out_share}: must be between 0 and 1")
    if not 8 <= bits <= 26:
        raise ValueError(f"--bits {bits}: must be 8 to 26")
    generator = random.Random(seed)
    kinds = {
        "positive": _draw(positive, text_field, max_documents, generator),
        "negative": _draw(negative, text_field, max_documents, generator),
    }
    for name, texts in kinds.items():
        if len(texts) < 10:
            raise ValueError(f"--{name}: {len(texts)} different documents; at least 10 are needed")
    both = set(kinds["positive"]) & set(kinds["negative"])
    if both:
        raise ValueError(
            f"{len(both)} texts are positive and negative at once, e.g. {min(both)[:60]!r}: leave "
            "them out of one side"
        )
    training: list[tuple[str, bool]] = []
    held_out: list[tuple[str, bool]] = []
    for name, texts in kinds.items():
        size = max(1, round(held_out_share * len(texts)))
        held_out += [(text, name == "positive") for text in texts[:size]]
        training += [(text, name == "positive") for text in texts[size:]]
    model = train_linear_classifier(*zip(*training, strict=True), bits=bits)
    accuracy, kept = _measure(model, held_out)
    model.save(output, positives=len(kinds["positive"]), negatives=len(kinds["negative"]))
    share = sum(label for _, label in held_out) / len(held_out)
    return ClassifierSummary(
        path=output,
        positives=len(kinds["positive"]),
        negatives=len(kinds["negative"]),
        held_out=len(held_out),
        accuracy=accuracy,
        baseline=max(share, 1 - share),
        kept=kept,
        seconds=time.perf_counter() - started,
    )


def _draw(paths: Sequence[Path], field: str, limit: int, generator: random.Random) -> list[str]:
    """Up to `limit` different texts, drawn evenly from all of them (reservoir), shuffled."""
    drawn: list[str] = []
    texts = (text for path in paths for text in read_texts(path, [field]) if text.strip())
    seen: set[int] = set()
    for text in texts:
        if hash_text(text) in seen:  # so that no document is trained on and held out at once
            continue
        seen.add(hash_text(text))
        if len(drawn) < limit:
            drawn.append(text)
        elif (place := generator.randrange(len(seen))) < limit:
            drawn[place] = text
    generator.shuffle(drawn)
    return drawn


def _measure(
    model: LinearClassifier, documents: Sequence[tuple[str, bool]]
) -> tuple[float, dict[float, tuple[float, float]]]:
    scores = [(model.score(text), label) for text, label in documents]
    accuracy = sum((score >= 0.5) == label for score, label in scores) / len(scores)
    kept = {}
    for threshold in THRESHOLDS:
        sides = [[s >= threshold for s, label in scores if label is side] for side in (True, False)]
        kept[threshold] = (sum(sides[0]) / len(sides[0]), sum(sides[1]) / len(sides[1]))
    return accuracy, kept
