"""Made-up tokens: the same for every layout, from nothing but a seed."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset

from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.data.blend import Datasets


class MadeUpTokens(Dataset):
    """Sample i: a random walk over the vocabulary, so that there is something to learn."""

    def __init__(self, *, samples: int, sequence_length: int, vocab_size: int, seed: int) -> None:
        self._samples, self._length = samples, sequence_length
        self._vocabulary, self._seed = vocab_size, seed

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
        return {
            "tokens": walk[:-1],
            "labels": walk[1:],
            "position_ids": torch.arange(self._length),
            "loss_mask": mask,
        }


def made_up_datasets(config: RunConfig) -> Datasets:
    """Training data for the whole of a run."""
    training = config.training
    tokens = MadeUpTokens(
        samples=training.steps * training.global_batch_size,
        sequence_length=training.sequence_length,
        vocab_size=config.model.vocab_size,
        seed=training.seed,
    )
    return Datasets(train=tokens, validation=None, test=None)
