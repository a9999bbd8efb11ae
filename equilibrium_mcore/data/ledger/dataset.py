"""Samples of a blend in the ledger's order, as a dataset for torch's loader."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from equilibrium_mcore.config.data import DataConfig
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.data.indexed_files import IndexHeader
from equilibrium_mcore.data.ledger.lanes import padded
from equilibrium_mcore.data.ledger.ledger import Ledger, SamplePlan
from equilibrium_mcore.data.ledger.source import SourceDocuments
from equilibrium_mcore.data.open_files import OpenFiles
from equilibrium_mcore.data.samples import PlannedSamples
from equilibrium_mcore.files.errors import FileContentError

Packing = Literal["stream", "documents"]


class LedgerDataset(PlannedSamples):
    """Samples of the run by number, or by the plan that a ledger made."""

    cursor_name = "ledger"

    def __init__(
        self,
        sources: Sequence[SourceDocuments],
        weights: Sequence[float],
        *,
        sequence_length: int,
        samples: int,
        vocab_size: int,
        packing: Packing = "stream",
        document_multiple: int = 1,
        state: dict[str, Any] | None = None,
        first_sample: int = 0,
    ) -> None:
        """`state` is a ledger's at sample `first_sample`; `samples` is how many the run takes.

        `document_multiple` is 1 unless `packing` is documents.
        """
        self.sources = list(sources)
        self.sequence_length, self.packing = sequence_length, packing
        self._vocab_size = vocab_size
        ledger = Ledger(
            sources,
            weights,
            sequence_length=sequence_length,
            document_multiple=document_multiple,
            state=state,
        )
        super().__init__(ledger, samples=samples, first_sample=first_sample)

    def __getitem__(self, item: int | SamplePlan) -> dict[str, Tensor]:
        """int64 `tokens`, `labels`, `position_ids` and float32 `loss_mask`, each [sequence_length].

        `dataset_id` is the source's place in the blend. Raises ValueError for damaged files and
        for an id beyond the model's vocabulary.
        """
        return self._sample(self.plan_of(item))

    def _sample(self, plan: SamplePlan) -> dict[str, Tensor]:
        source = self.sources[plan.source]
        length = self.sequence_length
        tokens, mask = np.empty(length + 1, np.int64), np.ones(length, np.float32)
        positions = np.arange(length, dtype=np.int64)
        filled = 0
        for span in plan.spans:
            end = filled + span.tokens
            tokens[filled:end] = source.read(span)
            if self.packing == "documents":
                padded_end = filled + padded(span.tokens, self._start.document_multiple)
                tokens[end:padded_end] = tokens[end - 1]
                positions[filled:padded_end] -= filled
                mask[end - 1 : padded_end] = 0.0  # labels that are not this document's
                end = padded_end
            filled = end
        tokens[length] = source.read(plan.label)[0]
        last = plan.spans[-1]
        if plan.label[:2] == (last.document, last.offset + last.tokens):
            mask[-1] = 1.0
        if tokens.max() >= self._vocab_size or tokens.min() < 0:
            self._refuse_ids(plan)
        whole = torch.from_numpy(tokens)
        return {
            "tokens": whole[:-1].clone(),
            "labels": whole[1:].clone(),
            "position_ids": torch.from_numpy(positions),
            "loss_mask": torch.from_numpy(mask),
            "dataset_id": torch.tensor(plan.source),
        }

    def _refuse_ids(self, plan: SamplePlan) -> None:
        source = self.sources[plan.source]
        for span in (*plan.spans, plan.label):
            ids = source.read(span)
            wrong = ids[(ids < 0) | (ids >= self._vocab_size)]
            if wrong.size:
                raise FileContentError(
                    f"{source.prefix}: document {span.document} holds the token id {wrong[0]}, but "
                    f"the model's vocabulary has {self._vocab_size:,} tokens: set model.vocab_size "
                    "higher, or preprocess the text with the run's tokenizer"
                )


def build_ledger_dataset(
    data: DataConfig,
    part: str,
    headers: dict[str, IndexHeader],
    *,
    sequence_length: int,
    samples: int,
    seed: int,
    vocab_size: int,
    state: dict[str, Any] | None = None,
    first_sample: int = 0,
) -> LedgerDataset:
    """The split `part` of the blend; `headers` are those of its checked sources, by name.

    Raises ConfigError where a source's data is not that of `state`, and where the run would go
    through a source's training documents more often than its `max_epochs`.
    """
    files = OpenFiles()
    sources = [
        SourceDocuments(
            source, headers[source.name], split=data.split, part=part, seed=seed, files=files
        )
        for source in data.sources
    ]
    dataset = LedgerDataset(
        sources,
        [source.weight for source in data.sources],
        sequence_length=sequence_length,
        samples=samples,
        vocab_size=vocab_size,
        packing=data.packing,
        document_multiple=data.padding_multiple,
        state=state,
        first_sample=first_sample,
    )
    if part == "train":
        problems = _too_many_epochs(data, dataset)
        if problems:
            raise ConfigError(problems, source=f"data {data.name!r}")
    return dataset


def _too_many_epochs(data: DataConfig, dataset: LedgerDataset) -> list[str]:
    ledger = dataset.cursor_at(dataset.first_sample)
    left = len(dataset) - dataset.first_sample
    problems = []
    for place, wanted in enumerate(data.sources):
        if wanted.max_epochs is None or left <= 0:
            continue
        source, taken = ledger.sources[place], ledger.taken[place]
        share = float(ledger.weights[place])
        coming = left * dataset.sequence_length * share
        epochs = (taken + coming) / source.tokens
        if epochs <= wanted.max_epochs * (1 + 1e-9):
            continue
        enough = max(0, int((wanted.max_epochs * source.tokens - taken) / coming * left))
        before = f"{taken:,} tokens taken so far + " if taken else ""
        problems.append(
            f"data source {wanted.name!r} would be read {epochs:.2f} times, and max_epochs is "
            f"{wanted.max_epochs:g}: {before}{left:,} sequences (steps x global_batch_size) x "
            f"{dataset.sequence_length:,} tokens x share {share:.4g} = {taken + coming:,.0f} "
            f"tokens wanted, {source.tokens:,} there. Train on at most {enough:,} sequences, "
            "lower its weight, add text, or raise data.sources.N.max_epochs"
        )
    return problems
