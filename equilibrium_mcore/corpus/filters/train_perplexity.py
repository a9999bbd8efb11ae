"""Trains a perplexity model from JSONL, and says what limits mean on text that was held out."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from equilibrium_mcore.corpus.filters.character_ngrams import train_character_ngrams
from equilibrium_mcore.corpus.filters.model_file import check_output
from equilibrium_mcore.data.jsonl import read_texts

HELD_OUT_EVERY = 20  # one document of so many is kept for the quantiles
QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99)


@dataclass(frozen=True)
class PerplexitySummary:
    """What was trained, and the perplexities of held-out documents by quantile."""

    path: Path
    documents: int
    characters: int
    ngrams: int
    held_out: int
    quantiles: dict[float, float]
    seconds: float


def train_perplexity_model(
    *,
    inputs: Sequence[Path],
    output: Path,
    order: int = 5,
    text_field: str = "text",
    max_characters: int = 50_000_000,
    overwrite: bool = False,
) -> PerplexitySummary:
    """Train on the first `max_characters` of the inputs' texts and write `output`.

    Raises FileNotFoundError, FileExistsError (`check_output`), and ValueError for bad lines, no
    text, or an ending other than .safetensors.
    """
    started = time.perf_counter()
    check_output(output, inputs=inputs, overwrite=overwrite)
    held_out: list[str] = []
    seen = [0, 0]  # documents, characters

    def training() -> Iterator[str]:
        for path in inputs:
            for text in read_texts(path, [text_field]):
                if seen[1] >= max_characters:
                    return
                seen[0] += 1
                if seen[0] % HELD_OUT_EVERY == 0:
                    held_out.append(text)
                    continue
                seen[1] += len(text)
                yield text

    model = train_character_ngrams(training(), order=order)
    model.save(output, documents=seen[0] - len(held_out), characters=seen[1])
    values = [model.perplexity(text) for text in held_out if text.strip()]
    found = np.quantile(values, QUANTILES).tolist() if values else []
    return PerplexitySummary(
        path=output,
        documents=seen[0] - len(held_out),
        characters=seen[1],
        ngrams=sum(level.grams.size for level in model.levels),
        held_out=len(values),
        quantiles=dict(zip(QUANTILES, found, strict=False)),
        seconds=time.perf_counter() - started,
    )
