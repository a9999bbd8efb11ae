"""Whether the state that is about to be saved is finite: one pass over it, on its device."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from equilibrium_mcore.checkpoint.together import on_every_rank
from equilibrium_mcore.optim.optimizer import HybridOptimizer

NAMED = 3  # how many tensors the error names


@torch.no_grad()
def check_finite(
    chunks: list[torch.nn.Module], optimizer: HybridOptimizer, *, step: int, kept: Callable[[], str]
) -> None:
    """Raise FloatingPointError on every rank where any weight or state is not finite. Collective.

    `kept` says, for the message, what is there to continue from.
    """
    found = on_every_rank(lambda: _not_finite(_state(chunks, optimizer)))
    bad = [f"{name} (rank {rank})" for rank, names in enumerate(found) for name in names]
    if bad:
        more = f", and {len(bad) - NAMED} more" if len(bad) > NAMED else ""
        raise FloatingPointError(
            f"step {step}: {', '.join(bad[:NAMED])}{more}: not finite, so no checkpoint was "
            f"written. {kept()} Resume with a lower learning rate or a longer warmup, or look at "
            "the data of the last steps"
        )


def _not_finite(state: Iterator[tuple[str, Tensor]]) -> list[str]:
    """Names of tensors with a NaN or an infinity. One wait for the device."""
    names, ends = [], []
    for name, tensor in state:
        if tensor.is_floating_point() and tensor.itemsize > 1 and tensor.numel():
            # A NaN is both the least and the greatest; no copy of the tensor is made.
            names.append(name)
            ends.append(torch.stack(torch.aminmax(tensor.detach())).double())
    if not ends:
        return []
    finite = torch.stack(ends).isfinite().all(dim=1).tolist()
    return [name for name, is_finite in zip(names, finite, strict=True) if not is_finite]


def _state(
    chunks: list[torch.nn.Module], optimizer: HybridOptimizer
) -> Iterator[tuple[str, Tensor]]:
    for parameter in optimizer.parameters:
        yield parameter.name, parameter.model
        if parameter.is_owned:
            for key, value in optimizer.state_of(parameter).items():
                yield f"optimizer.{key}.{parameter.name}", value
            for key, value in optimizer.whole_state_of(parameter).items():
                yield f"optimizer.{key}.{parameter.name}", value
    for chunk in chunks:
        yield from chunk.named_buffers()
