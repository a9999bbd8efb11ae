"""Shards: what a worker makes of a bounded run of rows, kept on disk until all are merged.

    000007-00002.bin    documents, one after the other: token ids, or JSONL lines
    000007-00002.npz    per document: bytes, tokens, hash, sampling value, fate; signatures
    000007-00002.json   counts, and the row at which the next shard begins

is the third shard of part 7. The .json is renamed into place last, so a shard with one is whole;
a killed run resumes after its last whole shard. Where shards are cut depends on the rows alone,
so the same shards come from any number of workers and after any kill.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from equilibrium_mcore.config.mixture import DatasetConfig, Kind
from equilibrium_mcore.corpus.encode import EncoderPlan, open_encoder
from equilibrium_mcore.corpus.filters.base import FilterChain, FilterOutcome
from equilibrium_mcore.corpus.filters.build import build_filters
from equilibrium_mcore.corpus.mixtures.documents import (
    TRUTH,
    Document,
    RowError,
    SkippedRowError,
    number_of,
    to_document,
)
from equilibrium_mcore.corpus.mixtures.parts import BadRowError, SourcePart
from equilibrium_mcore.corpus.mixtures.readers import rows_of
from equilibrium_mcore.data.tokenizer import load_tokenizer
from equilibrium_mcore.files.json_lines import json_line
from equilibrium_mcore.files.whole import whole_file, write_whole

SHARD_CHARACTERS = 16 << 20
SHARD_ROWS = 50_000
CHANGES_TURNS = ("pii_removal",)  # filters that are applied to every turn by itself
FORMAT_VERSION = 2  # raise it when the same rows would give other shards


@dataclass(frozen=True)
class WorkSpec:
    """All that a worker needs to make the shards of one dataset; plain values."""

    dataset: DatasetConfig
    kind: Kind
    encoder: EncoderPlan | None
    seed: int
    folder: Path
    skip_bad_rows: bool = False
    shard_rows: int = SHARD_ROWS
    shard_characters: int = SHARD_CHARACTERS


@dataclass
class ShardFacts:
    """Counts of a shard. `next_row` counts within the part."""

    next_row: int = 0
    last: bool = False
    rows: int = 0
    characters_in: int = 0
    empty: int = 0
    bad: int = 0
    first_bad: str = ""
    dropped: dict[str, int] = field(default_factory=dict)
    reasons: list[str] = field(default_factory=list)
    payload_sha256: str = ""


@dataclass(frozen=True)
class Shard:
    """A whole shard on disk."""

    folder: Path
    part: int
    number: int
    facts: ShardFacts

    @property
    def stem(self) -> Path:
        """Its path without an ending."""
        return shard_stem(self.folder, self.part, self.number)

    def arrays(self) -> dict[str, np.ndarray]:
        """Per entry: `sizes` (bytes), `lengths` (tokens), `hashes`, `values`, `fate`, `reached`;
        and `signatures_0`, ... of the filters across documents.

        `fate` is 0 for a document that stayed, else 1 + its index into `facts.reasons`: such
        entries have no bytes, and are here for their signatures alone.
        """
        with np.load(self.stem.with_suffix(".npz")) as file:
            return dict(file)

    def payload(self) -> np.ndarray:
        """The bytes of all documents, mapped."""
        path = self.stem.with_suffix(".bin")
        if path.stat().st_size == 0:
            return np.empty(0, np.uint8)
        return np.memmap(path, np.uint8, "r")


def shard_stem(folder: Path, part: int, number: int) -> Path:
    """Path of a shard without its ending."""
    return folder / f"{part:06d}-{number:05d}"


def read_shard(folder: Path, part: int, number: int) -> Shard | None:
    """The shard, if it is whole."""
    try:
        text = shard_stem(folder, part, number).with_suffix(".json").read_text(encoding="utf-8")
    except FileNotFoundError:
        return None
    return Shard(folder, part, number, ShardFacts(**json.loads(text)))


class ShardMaker:
    """Makes shards of one dataset; built once in each worker."""

    def __init__(self, spec: WorkSpec) -> None:
        self.spec = spec
        self.encoder = open_encoder(spec.encoder, threads=1) if spec.encoder else None
        tokenizer = load_tokenizer(spec.encoder.config) if spec.encoder else None
        self.chain: FilterChain = build_filters(spec.dataset.filters, tokenizer=tokenizer)
        self.turn_filters = [f for f in self.chain.filters if f.name in CHANGES_TURNS]

    def make(
        self, part_number: int, part: SourcePart, stopped: Callable[[], bool] = lambda: False
    ) -> Iterator[Shard]:
        """The shards of a part, in order: those that are whole already, then new ones.

        Ends early, without the shard under way, when `stopped()` says so.
        """
        number, start = 0, 0
        while (shard := read_shard(self.spec.folder, part_number, number)) is not None:
            yield shard
            if shard.facts.last:
                return
            number, start = number + 1, shard.facts.next_row
        draft = _Draft(self, start)
        for place, row in rows_of(self.spec.dataset, part, skip=start):
            if draft.full:
                yield draft.write(part_number, number, last=False)
                number, draft = number + 1, _Draft(self, draft.facts.next_row)
            if draft.facts.rows % 64 == 0 and stopped():
                return
            draft.add(place, row)
        yield draft.write(part_number, number, last=True)


class _Draft:
    """A shard that is being filled."""

    def __init__(self, maker: ShardMaker, start: int) -> None:
        self.maker, self.spec = maker, maker.spec
        self.facts = ShardFacts(next_row=start)
        self.dropped: Counter[str] = Counter()
        self.documents: list[Document] = []
        self.columns: dict[str, list] = {"hashes": [], "values": [], "fate": [], "reached": []}
        self.signatures: list[list[np.ndarray]] = []

    @property
    def full(self) -> bool:
        """Whether the next row belongs to the next shard."""
        return (
            self.facts.rows >= self.spec.shard_rows
            or self.facts.characters_in >= self.spec.shard_characters
        )

    def add(self, place: object, row: Any) -> None:
        """Take a row. Raises BadRowError unless bad rows are to be left out."""
        self.facts.rows += 1
        self.facts.next_row += 1
        dataset = self.spec.dataset
        try:
            if isinstance(row, BadRowError):
                raise row
            document = to_document(self.spec.kind, dataset, row)
            value = self._sampling_value(row)
        except (RowError, BadRowError) as error:
            self._note_bad(place, error)
            return
        except SkippedRowError as reason:
            self.dropped[f"row: {reason}"] += 1
            return
        self.facts.characters_in += len(document.text)
        if not document.text.strip():
            self.facts.empty += 1
            return
        outcome = self.maker.chain.process(document.text, row)
        if outcome.dropped is not None:
            reason = f"{self.maker.chain.filters[outcome.stage].name}: {outcome.dropped.reason}"
            if not outcome.signatures:
                self.dropped[reason] += 1
                return
            self._enter(outcome, self._reason(reason), value)
            return
        if not outcome.text.strip():
            self.facts.empty += 1
            return
        self._enter(outcome, 0, value)
        self.documents.append(self._changed(document, outcome.text))

    def write(self, part: int, number: int, *, last: bool) -> Shard:
        """Encode, and write the files whole; the counts come last."""
        stem = shard_stem(self.spec.folder, part, number)
        payload, sizes, lengths = self._encode()
        fate = np.array(self.columns["fate"], np.uint16)
        arrays = {
            "hashes": np.array(self.columns["hashes"], np.uint64),
            "values": np.array(self.columns["values"], np.float64),
            "fate": fate,
            "reached": np.array(self.columns["reached"], np.uint8),
            "sizes": np.zeros(fate.size, np.int64),
            "lengths": np.zeros(fate.size, np.int32),
        }
        arrays["sizes"][fate == 0] = sizes
        arrays["lengths"][fate == 0] = lengths
        for place, rows in enumerate(self.signatures):
            arrays[f"signatures_{place}"] = np.stack(rows)
        self.facts.last, self.facts.dropped = last, dict(self.dropped)
        self.facts.payload_sha256 = hashlib.sha256(payload).hexdigest()
        write_whole(stem.with_suffix(".bin"), payload)
        with whole_file(stem.with_suffix(".npz"), "wb") as stream:
            np.savez(stream, **arrays)
        write_whole(stem.with_suffix(".json"), json.dumps(asdict(self.facts)))
        return Shard(self.spec.folder, part, number, self.facts)

    def _sampling_value(self, row: Any) -> float:
        sampling = self.spec.dataset.sampling
        if sampling.method == "uniform":
            return 0.0
        value = number_of(row, str(sampling.field))
        if sampling.method == "weighted":
            if value < 0 or math.isinf(value):
                raise RowError(f"field {sampling.field!r} holds {value:g}; a weight is at least 0")
            if value == 0:
                raise SkippedRowError("weight 0")
        return value

    def _note_bad(self, place: object, error: Exception) -> None:
        if not self.spec.skip_bad_rows:
            raise BadRowError(
                f"{self.spec.dataset.name}: {place}: {error}. Repair the row or the "
                f"mixture's settings, or leave such rows out with --skip-bad-rows"
            )
        self.facts.bad += 1
        self.facts.first_bad = self.facts.first_bad or f"{place}: {error}"

    def _reason(self, reason: str) -> int:
        if reason not in self.facts.reasons:
            self.facts.reasons.append(reason)
        return 1 + self.facts.reasons.index(reason)

    def _enter(self, outcome: FilterOutcome, fate: int, value: float) -> None:
        self.columns["hashes"].append(document_hash(outcome.text, self.spec.seed))
        self.columns["values"].append(value)
        self.columns["fate"].append(fate)
        self.columns["reached"].append(len(outcome.signatures))
        for place, signature in enumerate(outcome.signatures):
            if place == len(self.signatures):
                self.signatures.append([])
            self.signatures[place].append(signature)

    def _changed(self, document: Document, text: str) -> Document:
        if document.record is None or text == document.text:
            return Document(text, document.record)
        record = {}
        for key, turns in document.record.items():
            if key == TRUTH:
                record[key] = turns
                continue
            record[key] = []
            for turn in turns:
                content = turn["content"]
                for part in self.maker.turn_filters:
                    content = part.apply(content, {})
                record[key].append({**turn, "content": content})
        return Document(text, record)

    def _encode(self) -> tuple[bytes, np.ndarray, np.ndarray]:
        """Payload, and per document its bytes and its tokens (1 for a record)."""
        encoder = self.maker.encoder
        if self.spec.kind != "text":
            lines = [json_line(document.record) for document in self.documents]
            sizes = np.array([len(line) for line in lines], np.int64)
            return b"".join(lines), sizes, np.ones(len(lines), np.int32)
        assert encoder is not None
        if not self.documents:
            return b"", np.empty(0, np.int64), np.empty(0, np.int32)
        ids, counts = encoder.encode([document.text for document in self.documents])
        ends = np.cumsum(counts)
        with_eod = np.insert(ids, ends, encoder.eod).astype(encoder.dtype, copy=False)
        lengths = counts + 1
        return with_eod.tobytes(), lengths * encoder.dtype.itemsize, lengths.astype(np.int32)


def document_hash(text: str, seed: int) -> int:
    """64 bits of a document and the seed: what decides validation and weighted sampling."""
    state = hashlib.blake2b(text.encode(), digest_size=8, key=str(seed).encode())
    return int.from_bytes(state.digest(), "little")
