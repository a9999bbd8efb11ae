"""Tokens that the engine draws in a layout: those of one rank, as the training forward sees them.

Drawn from the weights that every layout loads, before any step. A token depends on the layout only
through rounding, of which float64 leaves next to none.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch

from equilibrium_mcore.certify.verdict import Verdict, worst_verdict
from equilibrium_mcore.generation.engine import OwnEngine
from equilibrium_mcore.generation.interface import Prompt, Request, Rollout, Sampling
from equilibrium_mcore.training.scoring import log_probabilities
from equilibrium_mcore.training.setup import Run

PROMPTS, NEW_TOKENS, TEMPERATURE = (1, 3, 5, 8), 6, 0.8
# Log-probabilities of answers are float32, of 24 bits.
FLOAT32 = 1e-6


def generated(run: Run) -> dict[str, Any]:
    """Made-up prompts answered: ids and log-probabilities of each, by the engine and by training's
    forward, as plain values. Collective; nothing of the run changes.
    """
    config = run.config
    random = np.random.default_rng(config.training.seed)
    size = config.model.vocab_size
    requests = [Request(Prompt.of(random.integers(0, size, length))) for length in PROMPTS]
    sampling = Sampling(config.training.seed, NEW_TOKENS, stop_ids=(), temperature=TEMPERATURE)
    rollouts = OwnEngine.of(run, rows_at_once=2).generate(requests, sampling)
    values = log_probabilities(run, [_batch(run, rollouts)], temperature=TEMPERATURE)[0].cpu()
    forward = [
        row[length - 1 : length - 1 + NEW_TOKENS].tolist()
        for row, length in zip(values, PROMPTS, strict=True)
    ]
    return {
        "ids": [rollout.ids.tolist() for rollout in rollouts],
        "logprobs": [rollout.logprobs.tolist() for rollout in rollouts],
        "forward": forward,
    }


def _batch(run: Run, rollouts: list[Rollout]) -> dict[str, torch.Tensor]:
    """A sequence for each, of the run's length, with token 0 after its end."""
    length = run.config.training.sequence_length
    tokens = torch.zeros(len(rollouts), length + 1, dtype=torch.long)
    for row, rollout in enumerate(rollouts):
        ids = np.concatenate([rollout.request.prompt.ids, rollout.ids]).astype(np.int64)
        tokens[row, : len(ids)] = torch.from_numpy(ids)
    positions = torch.arange(length).expand(len(rollouts), -1)
    return {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "position_ids": positions}


def compare_generated(layout: dict[str, Any], reference: dict[str, Any]) -> list[Verdict]:
    """The layout's answers against one rank's, and against the layout's training forward."""
    tokens, forward = {}, {}
    for number, (found, expected) in enumerate(zip(layout["ids"], reference["ids"], strict=True)):
        apart = sum(one != other for one, other in zip(found, expected, strict=True))
        tokens[f"answer {number}"] = apart / len(expected)
    for number, (found, expected) in enumerate(
        zip(layout["logprobs"], layout["forward"], strict=True)
    ):
        forward[f"answer {number}"] = max(map(_relative, found, expected))
    return [
        worst_verdict("generated tokens", tokens, 0.0),
        worst_verdict("generated tokens' log-probabilities in training", forward, FLOAT32),
    ]


def _relative(found: float, expected: float) -> float:
    return abs(found - expected) / max(abs(expected), 1.0) if math.isfinite(found) else math.inf
