"""A short run on its own answers, in a layout against one rank: token for token.

Prompts are random ids and an answer is worth the share of its even ids, so nothing but the seed
decides what is asked and earned. The engine, the experience and the steps are those of training, in
float32: what is drawn has to be the same all the same.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from equilibrium_mcore.certify.verdict import Verdict, worst_verdict
from equilibrium_mcore.config.objectives import PREFERENCES
from equilibrium_mcore.config.online import RolloutConfig
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.data.blend import Datasets
from equilibrium_mcore.data.chat.prompts import EncodedPrompt, PromptSamples
from equilibrium_mcore.files.errors import naming
from equilibrium_mcore.generation.interface import Rollout
from equilibrium_mcore.online.engine import own_engine
from equilibrium_mcore.online.experience import packed_for
from equilibrium_mcore.online.judge import Verdict as Judgement
from equilibrium_mcore.online.pair_estimate import packed_pairs
from equilibrium_mcore.online.pair_judge import PairJudge, by_score
from equilibrium_mcore.online.rollouts import Gathered
from equilibrium_mcore.online.setup import build_estimator, pair_estimator
from equilibrium_mcore.online.stream import OnlineStream
from equilibrium_mcore.parallel.launch import RankInfo
from equilibrium_mcore.training.setup import Run, setup, teardown
from equilibrium_mcore.training.step import train_step
from equilibrium_mcore.verification.pairwise import Compared

ROLLOUTS, PASSES = 2, 2
PROMPTS, SAMPLES, NEW_TOKENS = 4, 4, 8
WITHOUT_ANSWERS = ("gae", "teacher")
"""Advantages of another model, which a twin has not: not certified here."""
MISMATCH, ROUNDED, UNMOVED = 1e-4, 1e-3, 1e-7  # nats; relative; nats per token


class MadeUpPrompts(PromptSamples):
    """Prompts of random ids, of several lengths."""

    pad_id = 0

    def __init__(self, *, vocab_size: int, seed: int) -> None:
        draw = np.random.default_rng(seed)
        self.prompts = [
            EncodedPrompt(draw.integers(0, vocab_size, size=3 + n).astype(np.int32), n, "", "")
            for n in range(ROLLOUTS * PROMPTS)
        ]
        self.seed, self.stop_ids = seed, (vocab_size - 1,)


class MadeUpJudge:
    """Answers are worth the share of their even ids."""

    def __call__(
        self, prompts: Sequence[EncodedPrompt], rollouts: Sequence[Rollout]
    ) -> list[Judgement]:
        """See Judge."""
        values = [float((rollout.ids % 2 == 0).mean()) for rollout in rollouts]
        return [Judgement(value, "ok", {"even": value}, "") for value in values]


def made_up_preferences(
    prompts: Sequence[EncodedPrompt], rollouts: Sequence[Rollout]
) -> list[Compared]:
    """The answer with more even ids, by share, is preferred; see `online.pair_judge.Compare`."""
    values = [float((rollout.ids % 2 == 0).mean()) for rollout in rollouts]
    return [by_score(*both, margin=0.0) for both in zip(values[::2], values[1::2], strict=True)]


def rollouts_rank(
    rank_info: RankInfo,
    *,
    config: RunConfig,
    folder: Path,
    prepare: Callable[[], None] | None,
) -> None:
    """Make rollouts and train on them as this rank; what happened goes to `folder`. Collective."""
    if prepare is not None:
        prepare()
    judged = isinstance(config.objective, PREFERENCES)
    samples_each = 2 if judged else SAMPLES
    rollout = RolloutConfig(
        samples_per_prompt=samples_each, max_new_tokens=NEW_TOKENS, passes=PASSES
    )
    batch = {"global_batch_size": PROMPTS * samples_each, "micro_batch_size": 1}
    training = config.training.model_copy(update=batch)
    config = config.model_copy(update={"training": training})
    samples = MadeUpPrompts(vocab_size=config.model.vocab_size, seed=training.seed)
    run = setup(config, rank_info, datasets=Datasets(train=samples, validation=None, test=None))
    # Only now: a twin of pairs is of a stage that asks for no answers.
    run.config = run.config.model_copy(update={"rollout": rollout})
    drawn: list[np.ndarray] = []

    def seen(gathered: Gathered, step: int) -> None:
        drawn.extend(rollout.ids for group in gathered.asked for rollout in group.rollouts)

    stream = OnlineStream(
        run,
        engine=own_engine(run),
        judge=PairJudge(made_up_preferences) if judged else MadeUpJudge(),
        estimator=pair_estimator(run) if judged else build_estimator(run),
        packed_of=packed_pairs if judged else packed_for,
        seen=seen,
    )
    run.stream, run.stage_figures = stream, stream.figures
    before = _biases(run)
    outcomes = [train_step(run) for _ in range(ROLLOUTS * PASSES)]
    moved = [float((a - b).abs().max()) for a, b in zip(_biases(run), before, strict=True)]
    found = {
        "tokens": [ids.tolist() for ids in drawn],
        "figures": [dict(outcome.figures) for outcome in outcomes],
        "norms": [outcome.gradient_norm for outcome in outcomes],
        "bias": max(moved, default=0.0),
    }
    teardown(run)
    with naming(folder / f"rank_{rank_info.rank}.pt"):
        torch.save(found, folder / f"rank_{rank_info.rank}.pt")


def _biases(run: Run) -> list[torch.Tensor]:
    return [
        buffer.clone()
        for chunk in run.chunks
        for name, buffer in chunk.named_buffers()
        if name.endswith("expert_bias")
    ]


def traced_rollouts(
    config: RunConfig,
    run_ranks: Callable[[Callable[[RankInfo], None], int], None],
    folder: Path,
    *,
    world_size: int,
    prepare: Callable[[], None] | None,
) -> list[dict[str, Any]]:
    """What each rank of the layout of `config` saw."""
    folder.mkdir(parents=True, exist_ok=True)
    run_ranks(partial(rollouts_rank, config=config, folder=folder, prepare=prepare), world_size)
    return [torch.load(folder / f"rank_{rank}.pt") for rank in range(world_size)]


def compare_rollouts(found: Sequence[dict[str, Any]], reference: dict[str, Any]) -> list[Verdict]:
    """The ranks of a layout against one rank."""
    first = found[0]
    norms = {
        f"step {step}": _apart(norm, other)
        for step, (norm, other) in enumerate(
            zip(first["norms"], reference["norms"], strict=True), start=1
        )
    }
    apart = {f"step {n}": f["mismatch_max"] for n, f in enumerate(first["figures"], start=1)}
    biases = {f"rank {rank}": one["bias"] for rank, one in enumerate(found)}
    tokens = {
        f"rank {rank}": _unequal(one["tokens"], reference["tokens"])
        for rank, one in enumerate(found)
    }
    return [
        worst_verdict("rollouts: share of tokens that differ", tokens, 0.0),
        worst_verdict("rollouts: engine against training (nats)", apart, MISMATCH),
        *_ratios(first["figures"]),
        worst_verdict("rollouts: experts' bias stays", biases, 0.0),
        worst_verdict("rollouts: gradient norm of each update", norms, ROUNDED),
    ]


def _apart(found: float, expected: float) -> float:
    """Relative; a gradient is 0 where every ratio is out of its bounds."""
    return abs(found - expected) / expected if expected else float(found != 0)


def _ratios(figures: Sequence[dict[str, float]]) -> list[Verdict]:
    """Of a policy: whether ratios are to the one that drew. Pairs have no ratios."""
    if "kl_old" not in figures[0]:
        return []
    starts = range(0, ROLLOUTS * PASSES, PASSES)
    moved = {f"step {1 + n}": abs(figures[n]["kl_old"]) for n in starts}
    still = {f"step {2 + n}": float(not figures[1 + n]["kl_old"] > 0) for n in starts}
    return [
        worst_verdict("rollouts: first update is at the policy that drew", moved, UNMOVED),
        worst_verdict("rollouts: second update is off it", still, 0.0),
    ]


def _unequal(found: list[list[int]], expected: list[list[int]]) -> float:
    """The share of tokens that differ, or that one has and the other has not."""
    total = sum(max(len(a), len(b)) for a, b in zip(found, expected, strict=True))
    same = sum(
        x == y for a, b in zip(found, expected, strict=True) for x, y in zip(a, b, strict=False)
    )
    return 1 - same / total
