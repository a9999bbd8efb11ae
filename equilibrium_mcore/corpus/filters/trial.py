"""Tries filters on a sample of a JSONL file: what each would drop, change, and cost."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from equilibrium_mcore.config.filters import FilterConfig
from equilibrium_mcore.corpus.filters.base import (
    CorpusFilter,
    DocumentFilter,
    Dropped,
    apply_or_sign,
)
from equilibrium_mcore.corpus.filters.build import build_filters
from equilibrium_mcore.data.jsonl import read_objects
from equilibrium_mcore.data.tokenizer import Tokenizer


@dataclass
class Reason:
    """Documents that went for one reason; `examples` are the first ones' beginnings."""

    documents: int = 0
    examples: list[str] = field(default_factory=list)


@dataclass
class FilterStage:
    """What one filter did. Seconds are of a processor; characters are of documents that stayed."""

    type: str
    settings: dict[str, Any]
    reached: int = 0
    reasons: dict[str, Reason] = field(default_factory=dict)
    changed: int = 0
    characters_removed: int = 0
    seconds: float = 0.0

    @property
    def dropped(self) -> int:
        """Documents that this filter dropped."""
        return sum(reason.documents for reason in self.reasons.values())

    @property
    def kept(self) -> int:
        """Documents that were passed on."""
        return self.reached - self.dropped

    @property
    def milliseconds_per_document(self) -> float:
        """Mean over the documents that reached the filter."""
        return 1000 * self.seconds / max(self.reached, 1)


@dataclass
class Trial:
    """A sample of `path`, and what each filter did with it, in order."""

    path: Path
    documents_in_file: int
    sampled: int
    characters: int
    stages: list[FilterStage]
    kept: int
    characters_kept: int
    notes: list[str] = field(default_factory=list)

    @property
    def looks_across_a_sample(self) -> bool:
        """Whether duplicates were looked for in a part of the file only."""
        partial = self.sampled < self.documents_in_file
        return partial and any(stage.type == "deduplication" for stage in self.stages)


def try_filters(
    path: Path,
    configs: Sequence[FilterConfig],
    *,
    sample: int = 1000,
    seed: int = 1234,
    text_field: str = "text",
    tokenizer: Tokenizer | None = None,
    examples: int = 2,
    example_characters: int = 100,
) -> Trial:
    """Apply `configs` to `sample` documents drawn evenly (0: all), in reading order.

    Raises ConfigError for filters that cannot be built, FileNotFoundError, and ValueError for a bad
    line or no document.
    """
    chain = build_filters(configs, tokenizer=tokenizer)
    total, records = draw_records(path, sample, seed=seed, text_field=text_field)
    enabled = [config for config in configs if config.enabled]
    going = [(record[text_field], record) for record in records]
    characters = sum(len(text) for text, _ in going)
    stages = []
    for config, part in zip(enabled, chain.filters, strict=True):
        stage = FilterStage(config.type, _chosen(config))
        going = _run_stage(part, going, stage, examples, example_characters)
        stages.append(stage)
    return Trial(
        path=path,
        documents_in_file=total,
        sampled=len(records),
        characters=characters,
        stages=stages,
        kept=len(going),
        characters_kept=sum(len(text) for text, _ in going),
        notes=chain.notes(),
    )


def draw_records(
    path: Path, sample: int, *, seed: int, text_field: str
) -> tuple[int, list[dict[str, Any]]]:
    """How many documents the file has, and `sample` of them (0: all) in reading order."""
    generator = random.Random(seed)
    drawn: list[tuple[int, dict[str, Any]]] = []
    count = 0
    for number, record in read_objects(path):
        if not isinstance(record.get(text_field), str):
            raise ValueError(
                f"{path}, line {number}: no text under {text_field!r}; it has "
                f"{', '.join(map(repr, record)) or 'no keys'}; name the right one by --text-field"
            )
        count += 1
        if not sample or len(drawn) < sample:
            drawn.append((count, record))
        elif (place := generator.randrange(count)) < sample:
            drawn[place] = (count, record)
    if not drawn:
        raise ValueError(f"{path}: holds no document")
    drawn.sort(key=lambda entry: entry[0])
    return count, [record for _, record in drawn]


def _run_stage(
    part: DocumentFilter | CorpusFilter,
    documents: list[tuple[str, dict[str, Any]]],
    stage: FilterStage,
    examples: int,
    example_characters: int,
) -> list[tuple[str, dict[str, Any]]]:
    """Documents that one filter keeps; `stage` is filled in."""
    going = []
    index = part.start() if isinstance(part, CorpusFilter) else None
    for text, record in documents:
        started = time.process_time()
        result = apply_or_sign(part, text, record)
        if index is not None and isinstance(result, np.ndarray):
            reason = index.decide(result)
            result = text if reason is None else Dropped(reason)
        stage.seconds += time.process_time() - started
        stage.reached += 1
        if isinstance(result, Dropped):
            entry = stage.reasons.setdefault(result.reason, Reason())
            entry.documents += 1
            if len(entry.examples) < examples:
                entry.examples.append(
                    " ".join(text[: 2 * example_characters].split())[:example_characters]
                )
            continue
        stage.changed += result != text
        stage.characters_removed += len(text) - len(result)
        going.append((result, record))
    return going


def _chosen(config: FilterConfig) -> dict[str, Any]:
    """The settings that were given, as plain values."""
    return config.model_dump(mode="json", exclude={"type", "enabled"}, exclude_defaults=True)
