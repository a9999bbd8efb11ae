"""The states of all random generators of a rank: python's, numpy's, torch's, megatron-core's."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy
import torch
from megatron.core.tensor_parallel.random import convert_cuda_rng_state, get_cuda_rng_tracker


def random_states() -> dict[str, Any]:
    """What `set_random_states` takes back."""
    return {
        "python": random.getstate(),
        "numpy": numpy.random.get_state(),
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        # As plain tensors also where CUDA graphs hold generators.
        "trackers": {
            name: convert_cuda_rng_state(state)
            for name, state in get_cuda_rng_tracker().get_states().items()
        },
    }


def set_random_states(states: dict[str, Any]) -> None:
    """Go on with the numbers that came next when `random_states` was called."""
    random.setstate(states["python"])
    numpy.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    torch.cuda.set_rng_state(states["device"])
    tracker = get_cuda_rng_tracker()
    tracker.set_states(
        {
            name: convert_cuda_rng_state(state, to_graphable=tracker.use_cudagraphable_rng)
            for name, state in states["trackers"].items()
        }
    )


@contextlib.contextmanager
def kept_random_states() -> Iterator[None]:
    """Random numbers drawn inside are not missing after it."""
    states = random_states()
    try:
        yield
    finally:
        set_random_states(states)
