"""Made-up tokens: the same for every layout, from nothing but a seed."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.data.blend import Datasets
from equilibrium_mcore.data.samples import Samples
from equilibrium_mcore.data.stream import Batch
from equilibrium_mcore.objectives.reduction import document_numbers
from equilibrium_mcore.training.distillation import TEACHER, OfTokens, Slice
from equilibrium_mcore.training.pairs import REFERENCE
from equilibrium_mcore.training.policy_objective import ADVANTAGES, CORRECTIONS, OLD
from equilibrium_mcore.training.scores import MARGIN
from equilibrium_mcore.training.setup import Run
from equilibrium_mcore.training.single_answers import DESIRABLE, KL


class MadeUpTokens(Samples):
    """Sample i: a random walk over the vocabulary, so that there is something to learn.

    With `document_multiple` a sample is cut into documents whose lengths are multiples of it. With
    `answers` runs of tokens count and those between them do not, as in a conversation. With `pairs`
    the documents are chosen and rejected answers in turn, each after a prompt that does not count.
    """

    def __init__(
        self,
        *,
        samples: int,
        sequence_length: int,
        vocab_size: int,
        seed: int,
        document_multiple: int | None = None,
        answers: bool = False,
        pairs: bool = False,
    ) -> None:
        self._samples, self._length = samples, sequence_length
        self._vocabulary, self._seed = vocab_size, seed
        self._multiple, self._answers, self._pairs = document_multiple, answers, pairs

    def __len__(self) -> int:
        return self._samples

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """tokens, labels, position_ids (int64) and loss_mask (float32), each (sequence,)."""
        generator = torch.Generator().manual_seed(self._seed * 1_000_003 + index)
        steps = torch.randint(1, 12, (self._length + 1,), generator=generator)
        start = torch.randint(self._vocabulary, (1,), generator=generator)
        walk = (start + steps.cumsum(0)) % self._vocabulary
        mask = torch.ones(self._length)
        # Some positions do not count, as in fine-tuning: ranks then hold unequal numbers of tokens.
        mask[: index % 7] = 0.0
        if self._answers:
            turns = torch.randint(0, 8, (self._length,), generator=generator) == 0
            mask *= (turns.cumsum(0) + index) % 2
        positions = torch.arange(self._length)
        starts = self._document_starts(generator)
        if self._pairs:
            return self._of_pairs(walk, starts if len(starts) % 2 else starts[:-1])
        for start in starts:
            positions[start:] = torch.arange(self._length - start)
            mask[start - 1] = 0.0  # its label belongs to the next document
        return {
            "tokens": walk[:-1],
            "labels": walk[1:],
            "position_ids": positions,
            "loss_mask": mask,
        }

    def _of_pairs(self, walk: Tensor, starts: list[int]) -> dict[str, Tensor]:
        """The sample as `PreferenceDataset` gives it; as many pairs as the documents make."""
        starts = starts or [self._length // self._multiple // 2 * self._multiple]
        positions, mask = torch.empty(self._length, dtype=torch.int64), torch.ones(self._length)
        answer = torch.zeros(self._length, dtype=torch.int64)
        ends = [*starts, self._length]
        for number, (start, end) in enumerate(zip([0, *starts], ends, strict=True), start=1):
            positions[start:end] = torch.arange(end - start)
            mask[start : start + (end - start) // 3] = 0.0
            mask[end - 1] = 0.0  # its label belongs to the next document
            answer[start:end] = number
        return {
            "tokens": walk[:-1],
            "labels": walk[1:],
            "position_ids": positions,
            "loss_mask": mask,
            "answer": answer * (mask > 0),
            MARGIN: answer.double() % 5 / 4,
            DESIRABLE: (answer % 3 > 0).float(),
        }

    def _document_starts(self, generator: torch.Generator) -> list[int]:
        """Where a document begins after another one: up to three places, or none."""
        if self._multiple is None:
            return []
        places = torch.randperm(self._length // self._multiple, generator=generator)[:3]
        return sorted(int(place) * self._multiple for place in places if place > 0)


def made_up_reference(run: Run, batches: list[Batch]) -> None:
    """log p of each label by a reference that is made up, too, and KTO's z: a `Run.prepare`."""
    for batch in batches:
        if DESIRABLE in batch:
            batch[KL] = torch.full(batch["labels"].shape, 0.25, dtype=torch.float64)
        batch[REFERENCE] = -((batch["labels"] * 7 + batch["position_ids"]) % 23 + 1).double() / 8


class MadeUpTeacher:
    """Logits of a teacher that is made up: of each token's own, for any slice of the vocabulary."""

    def of(self, batch: Batch, rows: Slice) -> OfTokens:
        """See `training.distillation.Said`."""
        ids = torch.arange(rows.first, rows.first + rows.width)
        token = (batch["labels"] * 7 + batch["position_ids"] * 3).flatten()

        def logits(tokens: slice) -> Tensor:
            return (token[tokens, None] + ids * (1 + token[tokens, None] % 5)) % 23 / 4.0

        return logits


def made_up_teacher(run: Run, batches: list[Batch]) -> None:
    """What a made-up teacher says of each batch: a `Run.prepare`."""
    for batch in batches:
        batch[TEACHER] = MadeUpTeacher()


def made_up_experience(run: Run, batches: list[Batch]) -> None:
    """Advantages and log p of a policy that drew the tokens, made up, too: a `Run.prepare`.

    The old log p lie round those of an untrained policy, so that some ratios are in the bounds.
    """
    made_up_reference(run, batches)
    about = -math.log(run.config.model.vocab_size)
    for batch in batches:
        labels, positions = batch["labels"], batch["position_ids"]
        numbers = document_numbers(positions)
        batch[OLD] = about + ((labels * 5 + positions * 3) % 17 - 8).double() / 40
        batch[REFERENCE] = about + ((labels * 7 + positions) % 23 - 11).double() / 20
        of_answers = ((numbers - numbers[:, :1]) * 7 + labels[:, :1]) % 5 - 2
        batch[ADVANTAGES] = of_answers.double() + (positions % 3).double() / 8
        batch[CORRECTIONS] = 1 + ((labels + positions) % 7 - 3).double() / 16


def made_up_datasets(config: RunConfig) -> Datasets:
    """Training data for the whole of a run, and for one step more."""
    training = config.training
    tokens = MadeUpTokens(
        samples=(training.steps + 1) * training.global_batch_size,
        sequence_length=training.sequence_length,
        vocab_size=config.model.vocab_size,
        seed=training.seed,
        document_multiple=(
            config.data.document_multiple if config.data.packing == "documents" else None
        ),
        answers=config.data.type == "conversations" or config.objective.type == "policy",
        pairs=config.data.type == "preferences",
    )
    return Datasets(train=tokens, validation=None, test=None)
