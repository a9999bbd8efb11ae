"""Adapters folded into the weights beside them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from megatron.core.process_groups_config import ProcessGroupCollection

from equilibrium_mcore.adapters.lora import (
    adapters_of,
    attach_adapters,
    detach_adapters,
    put_back,
)
from equilibrium_mcore.config.schema import RunConfig


@contextmanager
def adapters_of_weights(
    chunks: list[torch.nn.Module], saved: RunConfig, *, groups: ProcessGroupCollection
) -> Iterator[None]:
    """Inside, the chunks are as the weights of the run `saved` are loaded: with its adapters alone.

    After it those are folded into the weights, and the chunks' own adapters, as they were, stand
    beside the sum.
    """
    own = [detach_adapters(chunk) for chunk in chunks]
    if saved.adapters is not None:
        for chunk in chunks:
            attach_adapters(
                chunk, saved.adapters, model=saved.model, groups=groups, seed=saved.training.seed
            )
    yield
    for chunk, adapters in zip(chunks, own, strict=True):
        fold(chunk)
        detach_adapters(chunk)
        put_back(chunk, adapters)


@torch.no_grad()
def fold(chunk: torch.nn.Module) -> None:
    """Add each adapter's product to its layer's weight, in float32 or wider, rounded once."""
    for adapter, weight in ((a, a.linear.weight) for a in adapters_of(chunk).values()):
        wide = torch.promote_types(weight.dtype, torch.float32)
        weight.data.copy_(weight.data.to(wide) + adapter.product_here(wide))
