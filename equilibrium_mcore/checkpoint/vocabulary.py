"""A model with more tokens than the weights it starts from: what the new rows are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.distributed import ProcessGroup

from equilibrium_mcore.config.schema import ModelConfig
from equilibrium_mcore.optim.parameters import EMBEDDING, OUTPUT


@torch.no_grad()
def fill_new_rows(
    chunks: Sequence[torch.nn.Module],
    *,
    saved: ModelConfig,
    wanted: ModelConfig,
    groups: ProcessGroupCollection,
) -> None:
    """Give the rows of tokens that `saved` had not the mean of the old tokens' rows. Collective.

    The embedding and the output layer, each by its own mean. A padding row stays what it was while
    no token takes it. Does nothing for as many tokens as before. The rows of old tokens were loaded
    before: megatron-core leaves 0 where the saved table ends.
    """
    if wanted.vocab_size == saved.vocab_size:
        return
    for chunk in chunks:
        for name, table in chunk.named_parameters():
            if name.removeprefix("module.") in (EMBEDDING, OUTPUT):
                _fill(table, saved=saved, wanted=wanted, group=groups.tp)


def _fill(table: Tensor, *, saved: ModelConfig, wanted: ModelConfig, group: ProcessGroup) -> None:
    """`table`: this rank's rows of the whole table, [padded_vocab_size / TP, hidden_size]."""
    first = group.rank() * table.shape[0]
    tokens = torch.arange(first, first + table.shape[0], device=table.device)
    old = tokens < saved.vocab_size
    new = ~old & ((tokens < wanted.vocab_size) | (tokens >= saved.padded_vocab_size))
    # Wide, since each layout sums in an order of its own.
    mean = table[old].sum(dim=0, dtype=torch.float64)
    torch.distributed.all_reduce(mean, group=group)
    table[new] = (mean / saved.vocab_size).to(table.dtype)
