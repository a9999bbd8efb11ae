"""The optimizer by itself: float64 updates from given gradients, which no layout may change.

In float32 two layouts differ in the gradients' rounding, and some optimizers amplify it. Here all
layouts are given the same gradients, so that only a fault of the optimizer is left to differ.
"""

from __future__ import annotations

from pathlib import Path

import torch

from equilibrium_mcore.certify.whole import pieces_of
from equilibrium_mcore.checkpoint.pieces import TensorShard
from equilibrium_mcore.checkpoint.sharded import load_weights
from equilibrium_mcore.optim.optimizer import HybridOptimizer
from equilibrium_mcore.training.setup import Run

# Gradients are made from the weights of a checkpoint, value by value: it is megatron-core's
# checkpointing that lays those out over the ranks, not the code under test. A multiple's fraction
# is as good as random, and exact, so that every layout gets the same bits. SOAP's first step only
# makes its bases.
MULTIPLES = (997.0, 1409.0, 2003.0, 2801.0)
# About the size of real gradients. Where one is 0, SOAP divides its rounding by epsilon: of
# gradients near 1 that would be 1e-8 of an update.
SCALE = 2.0**-16


def update_from_given_gradients(run: Run, weights: Path) -> list[TensorShard]:
    """This rank's part of every parameter's whole change over `MULTIPLES`, in float64. Collective.

    Replaces the run's weights and optimizer, which are of no use afterwards.
    """
    load_weights(weights, config=run.config, chunks=run.chunks, groups=run.groups, fold=False)
    optimizer = HybridOptimizer(run.chunks, run.groups, run.config, main_dtype=torch.float64)
    run.optimizer = optimizer
    starts = [parameter.model.detach().clone() for parameter in optimizer.parameters]
    for multiple in MULTIPLES:
        for parameter, start in zip(optimizer.parameters, starts, strict=True):
            parameter.gradient.copy_(SCALE * (torch.frac(start * multiple) + start))
        optimizer.step()
    changes = {
        parameter.name: parameter.main.detach() - start.to(torch.float64)
        for parameter, start in zip(optimizer.parameters, starts, strict=True)
        if parameter.is_owned
    }
    return pieces_of(run, changes)
