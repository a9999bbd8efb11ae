"""Faults of generation, planted like those of `faults.py`."""

from __future__ import annotations


def another_seed_in_sampling_on_one_rank() -> None:
    """Each rank draws by itself, as with a generator that is seeded per rank."""
    import torch

    from equilibrium_mcore.generation import engine

    right = engine.row_seeds
    engine.row_seeds = lambda requests, sampling: (
        right(requests, sampling) + torch.distributed.get_rank()
    )


def decoding_forgets_the_latest_input_of_the_convolution() -> None:
    """What prompts leave for the first step is off by one token: wrong in every layout."""
    from equilibrium_mcore.models.decode.mamba import DecodingMamba

    right = DecodingMamba._prompts

    def broken(self, xBC, dt, kept, work):
        y = right(self, xBC, dt, kept, work)
        kept["window"][:, -1] = 0.0
        return y

    DecodingMamba._prompts = broken
