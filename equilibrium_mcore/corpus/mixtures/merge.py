"""Shards to datasets: what is a duplicate, what is taken, which stage, what is held out.

`choose` passes once over the shards as they are made and keeps one bit per document. `outputs_of`
and `write_output` then pass over the shards again; memory stays flat. All that is decided here is
decided in reading order, in one process.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from equilibrium_mcore.config.mixture import DatasetConfig
from equilibrium_mcore.config.mixture_rules import stages_of
from equilibrium_mcore.corpus.filters.base import CorpusFilter, FilterChain, SeenIndex
from equilibrium_mcore.corpus.mixtures.selection import (
    Cut,
    CutReader,
    find_cut,
    ordered,
    scrambled,
    weighted_keys,
)
from equilibrium_mcore.corpus.mixtures.shards import Shard, WorkSpec, read_shard
from equilibrium_mcore.data.sources import split_documents

VALIDATION, WEIGHTED = 1, 2  # purposes of a document's hash


@dataclass
class Chosen:
    """The documents of one dataset that stay, one bit each, and the counts on the way.

    `tokens` counts examples in posttrain phases.
    """

    spec: WorkSpec
    shards: list[tuple[int, int]] = field(default_factory=list)
    bits: list[np.ndarray] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    dropped: Counter[str] = field(default_factory=Counter)
    first_bad: str = ""
    documents: int = 0
    tokens: int = 0

    def passes(self) -> Iterator[tuple[Shard, dict[str, np.ndarray], np.ndarray]]:
        """(shard, arrays, chosen [entries]) in reading order."""
        for (part, number), packed in zip(self.shards, self.bits, strict=True):
            shard = read_shard(self.spec.folder, part, number)
            assert shard is not None
            arrays = shard.arrays()
            yield shard, arrays, np.unpackbits(packed, count=arrays["fate"].size).astype(bool)


class SharedIndexes:
    """What filters across documents have seen: one index for all datasets with equal settings."""

    def __init__(self) -> None:
        self._indexes: dict[str, SeenIndex] = {}

    def of(self, dataset: DatasetConfig, chain: FilterChain) -> list[tuple[str, SeenIndex]]:
        """(name, index) of the dataset's filters across documents, in their order."""
        across = [part for part in chain.filters if isinstance(part, CorpusFilter)]
        keys = [
            config.model_dump_json()
            for config in dataset.filters
            if config.enabled and config.type == "deduplication"
        ]
        assert len(keys) == len(across)
        for key, part in zip(keys, across, strict=True):
            if key not in self._indexes:
                self._indexes[key] = part.start()
        return [(part.name, self._indexes[key]) for key, part in zip(keys, across, strict=True)]


def choose(
    spec: WorkSpec,
    shards: Iterable[Shard],
    indexes: list[tuple[str, SeenIndex]],
    *,
    target: int | None,
    max_rows: int | None = None,
    progress: Callable[[int], None] = lambda tokens: None,
) -> Chosen:
    """Go over the shards in order and decide which documents stay.

    `target`: tokens to take, or None for all. Uniform sampling stops reading when it has them;
    weighted sampling reads all and then takes the likely ones; a curriculum takes them as uniform
    sampling does. `max_rows`: stop after the shard that reaches so many rows.
    """
    chosen = Chosen(spec)
    method = spec.dataset.sampling.method
    limit = target if method != "weighted" else None
    for shard in shards:
        before = chosen.tokens
        _take_shard(chosen, shard, indexes, limit)
        progress(chosen.tokens - before)
        enough_rows = max_rows is not None and chosen.counts["rows"] >= max_rows
        if enough_rows or (limit is not None and chosen.tokens >= limit):
            break
    if method == "weighted" and target is not None and chosen.tokens > target:
        _take_weighted(chosen, target)
    return chosen


def _take_shard(
    chosen: Chosen, shard: Shard, indexes: list[tuple[str, SeenIndex]], limit: int | None
) -> None:
    facts, arrays = shard.facts, shard.arrays()
    for name in ("rows", "characters_in", "empty", "bad"):
        chosen.counts[name] += getattr(facts, name)
    chosen.first_bad = chosen.first_bad or facts.first_bad
    chosen.dropped.update(facts.dropped)
    room = None if limit is None else limit - chosen.tokens
    if indexes:
        keep, reached = _decide_one_by_one(chosen, shard, arrays, indexes, room)
    else:
        keep = np.ones(arrays["fate"].size, bool)
        reached = keep.size
        if room is not None:
            sums = np.cumsum(arrays["lengths"], dtype=np.int64)
            reached = min(keep.size, int(np.searchsorted(sums, room)) + 1)
            keep[reached:] = False
    chosen.counts["not_needed"] += keep.size - reached
    chosen.shards.append((shard.part, shard.number))
    chosen.bits.append(np.packbits(keep))
    chosen.documents += int(keep.sum())
    chosen.tokens += int(arrays["lengths"][keep].sum(dtype=np.int64))


def _decide_one_by_one(
    chosen: Chosen,
    shard: Shard,
    arrays: dict[str, np.ndarray],
    indexes: list[tuple[str, SeenIndex]],
    room: int | None,
) -> tuple[np.ndarray, int]:
    """Ask the indexes; stops when `room` tokens are kept, so that none is seen for nothing."""
    keep = np.zeros(arrays["fate"].size, bool)
    stored = (arrays.get(f"signatures_{place}") for place in range(len(indexes)))
    rows = [iter(signatures) for signatures in stored if signatures is not None]
    kept_tokens = 0
    for entry, (fate, reached) in enumerate(zip(arrays["fate"], arrays["reached"], strict=True)):
        signatures = [next(rows[k]) for k in range(reached)]
        reason = None
        for (name, index), signature in zip(indexes, signatures, strict=False):
            found = index.decide(signature)
            if found is not None:
                reason = f"{name}: {found}"
                break
        if reason is None and fate:
            reason = shard.facts.reasons[fate - 1]
        if reason is not None:
            chosen.dropped[reason] += 1
            continue
        keep[entry] = True
        kept_tokens += int(arrays["lengths"][entry])
        if room is not None and kept_tokens >= room:
            return keep, entry + 1
    return keep, keep.size


def _take_weighted(chosen: Chosen, target: int) -> None:
    def keyed() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for _, arrays, kept in chosen.passes():
            yield (
                weighted_keys(arrays["hashes"][kept], arrays["values"][kept]),
                arrays["lengths"][kept],
            )

    reader = CutReader(find_cut(keyed, target))
    bits, documents, tokens = [], 0, 0
    for (_, _, kept), (keys, lengths) in zip(chosen.passes(), keyed(), strict=True):
        taken = reader.take(keys, lengths)
        kept[kept] = taken
        bits.append(np.packbits(kept))
        documents += int(taken.sum())
        tokens += int(lengths[taken].sum(dtype=np.int64))
    chosen.counts["not_needed"] += chosen.documents - documents
    chosen.bits, chosen.documents, chosen.tokens = bits, documents, tokens


# ---------------------------------------------------------------------------- stages and splits


@dataclass(frozen=True)
class Output:
    """One dataset to write: all of a source, or one stage of its curriculum (from 1)."""

    stage: int | None
    documents: int
    tokens: int
    validation_documents: int
    low: float | None = None
    high: float | None = None


class CurriculumStages:
    """The stage, from 0, of each document that stays; -1 for the others."""

    def __init__(self, chosen: Chosen) -> None:
        self.chosen = chosen
        self.sampling = chosen.spec.dataset.sampling
        self.count = stages_of(chosen.spec.dataset)
        self._cuts: list[Cut | None] = []
        if self.count > 1 and not self.sampling.boundaries:
            targets = [chosen.tokens * k // self.count for k in range(1, self.count)]
            self._cuts = [find_cut(self._keyed, target) for target in targets]

    def passes(self) -> Iterator[tuple[Shard, dict[str, np.ndarray], np.ndarray]]:
        """(shard, arrays, stage [entries]) in reading order."""
        readers = [CutReader(cut) for cut in self._cuts]
        for shard, arrays, kept in self.chosen.passes():
            stage = np.full(kept.size, -1, np.int16)
            values, lengths = arrays["values"][kept], arrays["lengths"][kept]
            if self.sampling.boundaries and self.count > 1:
                place = np.searchsorted(self.sampling.boundaries, values, side="left")
                last = self.count - 1
                stage[kept] = last - place if self.sampling.hardest_first else place
            else:
                keys = self._key(values)
                behind = [~reader.take(keys, lengths) for reader in readers]
                stage[kept] = np.sum(behind, axis=0, dtype=np.int16) if behind else 0
            yield shard, arrays, stage

    def _keyed(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for _, arrays, kept in self.chosen.passes():
            yield self._key(arrays["values"][kept]), arrays["lengths"][kept]

    def _key(self, values: np.ndarray) -> np.ndarray:
        return ordered(values, descending=self.sampling.hardest_first)


def outputs_of(stages: CurriculumStages, split: str) -> list[Output]:
    """The datasets to write of one source, with their sizes.

    Raises ValueError for a stage that has no document.
    """
    facts = [
        {"documents": 0, "tokens": 0, "low": np.inf, "high": -np.inf} for _ in range(stages.count)
    ]
    for _, arrays, stage in stages.passes():
        for number, fact in enumerate(facts):
            inside = stage == number
            if inside.any():
                fact["documents"] += int(inside.sum())
                fact["tokens"] += int(arrays["lengths"][inside].sum(dtype=np.int64))
                fact["low"] = min(fact["low"], float(arrays["values"][inside].min()))
                fact["high"] = max(fact["high"], float(arrays["values"][inside].max()))
    outputs = []
    for number, fact in enumerate(facts):
        dataset = stages.chosen.spec.dataset
        if not fact["documents"]:
            raise ValueError(
                f"{dataset.name}: "
                + (
                    f"stage {number + 1} of {stages.count} has no document; lower "
                    f"sampling.stages or change sampling.boundaries"
                    if stages.count > 1
                    else "no document stays: see what the filters drop with --sample 1000"
                )
            )
        begin, end = split_documents(split, fact["documents"])[1]
        curriculum = stages.count > 1
        outputs.append(
            Output(
                stage=number + 1 if curriculum else None,
                documents=fact["documents"],
                tokens=fact["tokens"],
                validation_documents=end - begin,
                low=fact["low"] if curriculum else None,
                high=fact["high"] if curriculum else None,
            )
        )
    return outputs


def write_output(
    stages: CurriculumStages, output: Output, add: Callable[[bytes, np.ndarray, bool], Any]
) -> dict[str, Any]:
    """Hand an output's documents to `add(payload, lengths, held_out)`, those held out last.

    Held out are the `validation_documents` with the smallest keys. Returns token counts and the
    hashes of what was written.
    """
    number = (output.stage or 1) - 1

    def keyed() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for _, arrays, stage in stages.passes():
            hashes = arrays["hashes"][stage == number]
            yield scrambled(hashes, VALIDATION), np.ones(hashes.size, np.int64)

    cut = find_cut(keyed, output.validation_documents)
    payload_hash, document_hash = hashlib.sha256(), hashlib.sha256()
    tokens = {False: 0, True: 0}
    for held_out in (False, True):
        reader = CutReader(cut)
        for shard, arrays, stage in stages.passes():
            inside = stage == number
            hashes = arrays["hashes"][inside]
            held = reader.take(scrambled(hashes, VALIDATION), np.ones(hashes.size, np.int64))
            inside[inside] = held == held_out
            if not inside.any():
                continue
            payload = _bytes_of(shard, arrays["sizes"], inside)
            lengths = arrays["lengths"][inside]
            add(payload, lengths, held_out)
            payload_hash.update(payload)
            document_hash.update(arrays["hashes"][inside].astype("<u8").tobytes())
            tokens[held_out] += int(lengths.sum(dtype=np.int64))
    return {
        "train_tokens": tokens[False],
        "validation_tokens": tokens[True],
        "payload_sha256": payload_hash.hexdigest(),
        "documents_sha256": document_hash.hexdigest(),
    }


def _bytes_of(shard: Shard, sizes: np.ndarray, wanted: np.ndarray) -> bytes:
    """The payload of the wanted entries; runs of neighbours are copied at once."""
    payload = shard.payload()
    ends = np.cumsum(sizes)
    edges = np.flatnonzero(np.diff(np.concatenate([[0], wanted.view(np.int8), [0]])))
    pieces = [
        payload[ends[first] - sizes[first] : ends[last - 1]]
        for first, last in zip(edges[::2], edges[1::2], strict=True)
    ]
    return b"".join(piece.tobytes() for piece in pieces)
