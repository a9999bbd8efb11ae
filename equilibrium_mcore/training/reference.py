"""What the weights that a run started from think of its batches: the reference."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from equilibrium_mcore.adapters.lora import detach_adapters, put_back
from equilibrium_mcore.data.stream import Batch
from equilibrium_mcore.training.frozen import load_frozen
from equilibrium_mcore.training.pairs import REFERENCE
from equilibrium_mcore.training.scoring import log_probabilities
from equilibrium_mcore.training.setup import Run

Prepare = Callable[[Run, list[Batch]], None]


class Reference:
    """Puts the reference's log p of each label into batches.

    A run with adapters is its own reference without them. Any other loads a frozen copy of
    `checkpoint.initial_weights`, whose memory is that of the weights. Made together by all ranks,
    at a resume too.
    """

    def __init__(self, run: Run) -> None:
        config = run.config
        self._frozen: list[torch.nn.Module] | None = None
        if config.adapters is None:
            weights = config.checkpoint.initial_weights
            self._frozen = load_frozen(weights, config=config, groups=run.groups)

    def __call__(self, run: Run, batches: list[Batch]) -> None:
        """Fill `reference` [B, S] of every batch. Collective."""
        for batch, values in zip(batches, self.scores(run, batches), strict=True):
            batch[REFERENCE] = values.cpu()  # cut and sent with the others

    def scores(self, run: Run, batches: list[Batch]) -> list[Tensor]:
        """log p of every label, [B, S] of each batch. Collective."""
        # As the loss has it, in which rows that only pad the vocabulary have a share: both sides of
        # a ratio must be of one distribution.
        return self.log_probabilities(run, batches, padded_vocabulary=True)

    def log_probabilities(
        self,
        run: Run,
        batches: list[Batch],
        *,
        temperature: float = 1.0,
        padded_vocabulary: bool = False,
    ) -> list[Tensor]:
        """As `training.scoring.log_probabilities`, of the reference. Collective."""
        settings = {"temperature": temperature, "padded_vocabulary": padded_vocabulary}
        if self._frozen is not None:
            return log_probabilities(run, batches, chunks=self._frozen, **settings)
        with adapters_off(run.chunks):
            return log_probabilities(run, batches, **settings)


@contextmanager
def adapters_off(chunks: list[torch.nn.Module]) -> Iterator[None]:
    """Inside, the chunks are the frozen model that their adapters stand beside."""
    bare = [getattr(chunk, "module", chunk) for chunk in chunks]
    taken = [detach_adapters(chunk) for chunk in bare]
    try:
        yield
    finally:
        for chunk, adapters in zip(bare, taken, strict=True):
            put_back(chunk, adapters)
