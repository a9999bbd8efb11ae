"""Faults of runs on their own answers, planted in a rank one at a time; see `faults.py`."""

from __future__ import annotations


def expert_bias_moves() -> None:
    """The rule is passed over: the bias follows the tokens, between an answer and its update."""
    from equilibrium_mcore.training import setup

    build = setup.build_transformer_config

    def broken(*arguments, **named):
        config = build(*arguments, **named)
        config.moe_router_bias_update_rate = 1e-3
        return config

    setup.build_transformer_config = broken


def old_log_probabilities_after_the_update() -> None:
    """Taken again for every update, so that all ratios are 1 and nothing is ever clipped."""
    from equilibrium_mcore.online.experience import packed_for, scored
    from equilibrium_mcore.online.stream import OnlineStream
    from equilibrium_mcore.training.policy_objective import OLD
    from equilibrium_mcore.training.scoring import log_probabilities

    whole = OnlineStream._minibatch

    def broken(self):
        answers = whole(self)
        run, packed = self._run, packed_for(self._run, answers)
        old = scored(run, packed, lambda batches: log_probabilities(run, batches))
        return [a.with_values(**{OLD: values}) for a, values in zip(answers, old, strict=True)]

    OnlineStream._minibatch = broken


def one_rank_has_another_seed() -> None:
    """Tensor ranks draw their slices of the noise from different seeds."""
    import torch

    from equilibrium_mcore.generation import engine

    right = engine.row_seeds
    engine.row_seeds = lambda requests, sampling: (
        right(requests, sampling) + torch.distributed.get_rank()
    )
