"""What ranks do in tests of generation, and the models that they do it with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.parallel.launch import RankInfo
from tests.support.runs import MODEL, tiny_run

VOCABULARY = 200  # of which every layout pads some more rows: the last of two ranks has them all
HYBRID = {
    **MODEL,
    "vocab_size": VOCABULARY,
    "vocab_size_multiple": 384,
    "moe": {**MODEL["moe"], "score_function": "sigmoid", "expert_bias": True},
}
GROUPED = {
    **HYBRID,
    "layer_pattern": "*-|*E",
    "mamba": None,
    "mla": None,
    "attention": {"num_heads": 4, "num_query_groups": 2, "head_dim": 16, "qkv_bias": True},
    "tie_embeddings": True,
}
LENGTHS = (1, 2, 9, 23, 6, 1, 14)
NEW_TOKENS, LONGEST = 12, 40
# Log-probabilities near -5: sums in another order, in float32. The issue allows 1e-4.
TOLERANCE = 1e-4


def config_of(
    folder: Path, model: dict, layout: dict, weights: Path | None = None, **changes: Any
) -> RunConfig:
    """The run; its data are made up, so those of the file are not read."""
    source = {"name": "made_up", "prefix": "unread", "weight": 1.0}
    tokenizer = {"type": "SentencePieceTokenizer", "model": "unread"}
    return tiny_run(
        {"name": "test", "tokenizer": tokenizer, "sources": [source], "split": "90,8,2"},
        folder,
        model=model,
        parallelism=layout,
        checkpoint={"initial_weights": weights and str(weights), "resume": "never"},
        **changes,
    )


def prompts(seed: int = 0) -> list[Any]:
    from equilibrium_mcore.generation.interface import Prompt

    rng = np.random.default_rng(seed)
    return [Prompt.of(rng.integers(0, VOCABULARY, length)) for length in LENGTHS]


def requests() -> list[Any]:
    """Two answers to each prompt."""
    from equilibrium_mcore.generation.interface import Request

    return [Request(prompt, sample) for prompt in prompts() for sample in range(2)]


def samplings() -> dict[str, Any]:
    from equilibrium_mcore.generation.interface import Sampling

    base = dict(seed=5, max_new_tokens=NEW_TOKENS, stop_ids=tuple(range(0, VOCABULARY, 16)))
    return {
        "plain": Sampling(**base),
        "cool": Sampling(**base, temperature=0.6),
        "greedy": Sampling(**base, temperature=0.0),
        "restricted": Sampling(**base, temperature=0.6, top_k=40, top_p=0.9),
    }


def answer(rank_info: RankInfo, config: RunConfig) -> dict[str, Any]:
    """Rollouts by sampling, and what the training forward thinks of those without a support."""
    from equilibrium_mcore.certify.tokens import made_up_datasets
    from equilibrium_mcore.generation.engine import OwnEngine
    from equilibrium_mcore.training.setup import setup, teardown

    run = setup(config, rank_info, datasets=made_up_datasets(config))
    engine = OwnEngine.of(run, rows_at_once=4, tokens_at_once=16)
    found, differences = {}, {}
    for name, sampling in samplings().items():
        rollouts = engine.generate(requests(), sampling)
        found[name] = [(r.ids.tolist(), r.logprobs.tolist(), r.finish) for r in rollouts]
        if name != "restricted":
            differences[name] = against_the_forward(run, rollouts, sampling.temperature or 1.0)
    modes = [chunk.training for chunk in run.chunks]
    teardown(run)
    return {"found": found, "differences": differences, "modes": modes}


def against_the_forward(run: Any, rollouts: list[Any], temperature: float) -> float:
    """The largest difference of a log-probability from that of the training forward."""
    from equilibrium_mcore.training.scoring import log_probabilities

    batch = batch_of(rollouts)
    values = log_probabilities(run, [batch], temperature=temperature)[0].cpu().numpy()
    worst = 0.0
    for row, rollout in enumerate(rollouts):
        first = len(rollout.request.prompt.ids) - 1
        scored = values[row, first : first + len(rollout.ids)]
        worst = max(worst, float(np.abs(scored - rollout.logprobs).max()))
    return worst


def batch_of(rollouts: list[Any]) -> dict[str, torch.Tensor]:
    """A row [LONGEST] for each, with whatever after its end."""
    tokens = torch.zeros(len(rollouts), LONGEST + 1, dtype=torch.long)
    for row, rollout in enumerate(rollouts):
        ids = np.concatenate([rollout.request.prompt.ids, rollout.ids]).astype(np.int64)
        tokens[row, : len(ids)] = torch.from_numpy(ids)
    positions = torch.arange(LONGEST).expand(len(rollouts), -1)
    return {"tokens": tokens[:, :-1], "labels": tokens[:, 1:], "position_ids": positions}


def save_rough(rank_info: RankInfo, config: RunConfig) -> None:
    """A checkpoint of weights of which none is 0 or 1, so that none of them hides a factor."""
    from equilibrium_mcore.certify.tokens import made_up_datasets
    from equilibrium_mcore.training.callbacks import LogCallback
    from equilibrium_mcore.training.saving import CheckpointCallback
    from equilibrium_mcore.training.setup import setup, teardown

    run = setup(config, rank_info, datasets=made_up_datasets(config))
    generator = torch.Generator().manual_seed(1)
    for parameter in run.optimizer.parameters:
        noise = torch.randn(parameter.model.shape, generator=generator)
        parameter.model.data.add_(noise, alpha=0.1)
    CheckpointCallback(config, LogCallback(config)).on_end(run, reason="stop")
    teardown(run)
