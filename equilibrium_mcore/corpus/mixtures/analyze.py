"""A mixture before it is prepared, or a prepared folder: expected against actual, as values."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from equilibrium_mcore.config.data import DataConfig, TokenizerConfig
from equilibrium_mcore.config.mixture import MixtureConfig
from equilibrium_mcore.config.problems import parse
from equilibrium_mcore.config.yaml_io import read_mapping
from equilibrium_mcore.corpus.mixtures.manifest import (
    MixtureManifest,
    SourceFacts,
    read_mixture_manifest,
)
from equilibrium_mcore.corpus.mixtures.plan import make_plan
from equilibrium_mcore.corpus.mixtures.statistics import (
    DuplicateCounter,
    Lengths,
    Tokens,
    indexed_documents,
    indexed_lengths,
    jsonl_lines,
    lengths_of,
    token_statistics,
)
from equilibrium_mcore.data.tokenizer import load_tokenizer


@dataclass(frozen=True)
class SourceAnalysis:
    """One dataset. Shares are of 1; what is not known before preparation is None.

    expected_share: by the mixture, tempered. training_share: by the weights of blend.yaml, which
    is what a run draws by. prepared_share: of the training tokens that lie on disk. epochs: how
    often each of them is seen when the run trains on all of the mixture's tokens.
    """

    name: str
    expected_share: float
    expected_tokens: float | None
    estimated_tokens: int | None
    max_epochs: float
    training_share: float | None = None
    prepared_share: float | None = None
    train_tokens: int | None = None
    validation_tokens: int | None = None
    epochs: float | None = None
    rows: int | None = None
    documents: int | None = None
    not_needed: int | None = None
    dropped: dict[str, int] = field(default_factory=dict)
    lengths: Lengths | None = None
    tokens: Tokens | None = None
    top_tokens: list[tuple[str, float]] = field(default_factory=list)
    duplicates: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class MixtureAnalysis:
    """All datasets. `unit` is tokens, or examples in posttrain phases."""

    name: str
    phase: str
    unit: str
    prepared: bool
    total: int | None
    sequence_length: int
    sources: list[SourceAnalysis]
    notes: list[str] = field(default_factory=list)

    def values(self) -> dict[str, Any]:
        """As plain values, for JSON."""
        return asdict(self)


def expected(mixture: MixtureConfig) -> MixtureAnalysis:
    """What the mixture's file alone says; reads no data."""
    plan = make_plan(mixture)
    sources = [
        SourceAnalysis(
            name=source.dataset.name,
            expected_share=source.share,
            expected_tokens=source.needed,
            estimated_tokens=source.dataset.estimated_tokens,
            max_epochs=source.dataset.max_epochs,
            epochs=(
                source.needed / source.dataset.estimated_tokens
                if source.needed and source.dataset.estimated_tokens
                else None
            ),
        )
        for source in plan.sources
    ]
    return MixtureAnalysis(
        name=mixture.name,
        phase=mixture.metadata.phase,
        unit="tokens" if mixture.kind == "text" else "examples",
        prepared=False,
        total=plan.total,
        sequence_length=mixture.metadata.max_seq_length,
        sources=sources,
        notes=["not prepared yet: epochs are by estimated_tokens, before any filter"],
    )


def analyze(folder: Path, *, say: Callable[[str], None] = lambda text: None) -> MixtureAnalysis:
    """What lies in a prepared folder, beside what the mixture asked for.

    Raises FileNotFoundError and ValueError when the folder is not whole.
    """
    manifest = read_mixture_manifest(folder)
    metadata = manifest.mixture["metadata"]
    text = manifest.kind == "text"
    weights = _blend_weights(folder, manifest)
    train_total = sum(source.train_tokens for source in manifest.datasets)
    duplicates, sources = DuplicateCounter(), []
    for source in manifest.datasets:
        say(f"reading {source.name}")
        looked = _look(folder, manifest, source, duplicates, metadata["max_seq_length"])
        share = weights.get(source.name)
        total = metadata["total_tokens"] if text else metadata["total_examples"]
        sources.append(
            SourceAnalysis(
                name=source.name,
                expected_share=source.share,
                expected_tokens=source.needed_tokens,
                estimated_tokens=_dataset(manifest, source.name)["estimated_tokens"],
                max_epochs=source.max_epochs,
                training_share=share,
                prepared_share=source.train_tokens / train_total if train_total else None,
                train_tokens=source.train_tokens,
                validation_tokens=source.validation_tokens,
                epochs=(
                    share * total / source.train_tokens
                    if share and total and source.train_tokens
                    else None
                ),
                rows=source.rows,
                documents=source.documents,
                not_needed=source.not_needed,
                dropped=_dropped(source),
                **looked,
            )
        )
    return MixtureAnalysis(
        name=manifest.name,
        phase=manifest.phase,
        unit="tokens" if text else "examples",
        prepared=True,
        total=metadata["total_tokens"] if text else metadata["total_examples"],
        sequence_length=metadata["max_seq_length"],
        sources=sources,
        notes=_notes(manifest, sources),
    )


# --------------------------------------------------------------------------------- the inside


def _look(
    folder: Path,
    manifest: MixtureManifest,
    source: SourceFacts,
    duplicates: DuplicateCounter,
    sequence_length: int,
) -> dict[str, Any]:
    prefixes = [folder / output.prefix for output in source.outputs]
    if manifest.kind != "text":
        paths = [
            Path(f"{prefix}.{split}.jsonl")
            for prefix in prefixes
            for split in ("train", "validation")
        ]
        sizes = (np.array([len(line.decode())]) for line in jsonl_lines(paths))
        return {
            "lengths": lengths_of(sizes, sequence_length=sequence_length),
            "duplicates": duplicates.count(source.name, jsonl_lines(paths)),
        }
    facts = manifest.tokenizer or {}
    blocks = (block for prefix in prefixes for block in indexed_lengths(prefix))
    tokens = token_statistics(prefixes, vocab_size=facts["vocab_size"])
    documents = (document for prefix in prefixes for document in indexed_documents(prefix))
    return {
        "lengths": lengths_of(blocks, sequence_length=sequence_length),
        "tokens": tokens,
        "top_tokens": _decoded(tokens, manifest),
        "duplicates": duplicates.count(source.name, documents),
    }


def _decoded(tokens: Tokens, manifest: MixtureManifest) -> list[tuple[str, float]]:
    """The most frequent tokens as text, as far as the tokenizer is still there."""
    config = parse(TokenizerConfig, manifest.mixture["tokenizer"])
    if isinstance(config, list):
        return []
    try:
        tokenizer = load_tokenizer(config)
    except (OSError, ValueError):
        return []
    return [
        ("<end of document>" if place == tokenizer.eod else repr(tokenizer.decode([place])), share)
        for place, share in tokens.top[:10]
    ]


def _blend_weights(folder: Path, manifest: MixtureManifest) -> dict[str, float]:
    """Share of each dataset by the blend as it lies there, perhaps changed by hand."""
    for name in manifest.blends[:1] if manifest.kind == "text" else ():
        blend = parse(DataConfig, read_mapping(folder / name))
        if isinstance(blend, list):
            raise ValueError(f"{folder / name}: " + "; ".join(p.text for p in blend))
        total = sum(source.weight for source in blend.sources)
        weights = {source.prefix.name: source.weight / total for source in blend.sources}
        # Sources that somebody took out of the blend have no share.
        return {
            source.name: weights.get(Path(source.outputs[0].prefix).name, 0.0)
            for source in manifest.datasets
        }
    return {}


def _dataset(manifest: MixtureManifest, name: str) -> dict[str, Any]:
    return next(d for d in manifest.mixture["datasets"] if d["name"] == name)


def _dropped(source: SourceFacts) -> dict[str, int]:
    named = {"empty": source.empty, "bad rows": source.bad, **source.dropped}
    return {reason: count for reason, count in named.items() if count}


def _notes(manifest: MixtureManifest, sources: list[SourceAnalysis]) -> list[str]:
    notes = []
    if manifest.sample_rows:
        notes.append(
            f"a trial of about {manifest.sample_rows:,} rows of each dataset: epochs and shares on "
            f"disk say nothing of the whole"
        )
    for source in sources:
        if source.epochs and source.epochs > source.max_epochs and not manifest.sample_rows:
            notes.append(
                f"{source.name}: {source.epochs:.2f} epochs, and max_epochs is "
                f"{source.max_epochs:g}: the blend was changed since it was prepared"
            )
        weight = source.training_share
        if weight is not None and abs(weight - source.expected_share) > 1e-6:
            notes.append(
                f"{source.name}: the blend's share is {weight:.4f}, the mixture's "
                f"{source.expected_share:.4f}"
            )
        if source.duplicates.get("within", 0) + source.duplicates.get("across", 0):
            notes.append(
                f"{source.name}: {source.duplicates['within']:,} documents repeat one of its own, "
                f"{source.duplicates['across']:,} one of an earlier dataset (of "
                f"{source.duplicates['looked_at']:,} looked at): see the filter deduplication"
            )
    return notes
