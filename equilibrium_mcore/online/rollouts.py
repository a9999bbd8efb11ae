"""Prompts to scored answers: what is asked of the engine, and which answers are kept."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from equilibrium_mcore.config.online import RolloutConfig
from equilibrium_mcore.data.chat.prompts import EncodedPrompt, PromptSamples
from equilibrium_mcore.generation.interface import Engine, Prompt, Request, Rollout, Sampling
from equilibrium_mcore.online.judge import Verdict


@dataclass(frozen=True)
class Group:
    """The answers to one prompt, with their verdicts."""

    number: int
    """Which prompt of the run, counted over all epochs."""
    prompt: EncodedPrompt
    rollouts: list[Rollout]
    verdicts: list[Verdict]

    @property
    def is_dead(self) -> bool:
        """Whether all answers that could be judged are worth the same: nothing to learn."""
        rewards = {v.reward for v in self.verdicts if v.verdict != "error"}
        return len(self.verdicts) > 1 and len(rewards) <= 1


@dataclass(frozen=True)
class Gathered:
    """A rollout: groups that are trained on, and what it took to have them."""

    groups: list[Group]
    asked: list[Group]
    """All groups, with those that were replaced."""
    prompts_taken: int


JudgeOf = Callable[[Sequence[EncodedPrompt], Sequence[Rollout]], list[Verdict]]


def sampling_of(
    config: RolloutConfig, stop_ids: Sequence[int], *, seed: int, rollout: int
) -> Sampling:
    """How the rollout of this number is sampled: noise of its own, which a resume repeats."""
    digest = hashlib.blake2b(f"rollout/{seed}/{rollout}".encode(), digest_size=8).digest()
    return Sampling(
        seed=int.from_bytes(digest, "little") >> 1,
        max_new_tokens=config.max_new_tokens,
        stop_ids=tuple(stop_ids),
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
    )


def gather(
    *,
    prompts: PromptSamples,
    first: int,
    count: int,
    config: RolloutConfig,
    engine: Engine,
    sampling: Sampling,
    version: int,
    judge: JudgeOf,
) -> Gathered:
    """`count` groups from the prompt of number `first` on. Collective.

    Dead groups are replaced by those of further prompts, up to `config.resample` times; after that
    the last ones asked stay, so that a step has its size.
    """
    asked: list[Group] = []
    alive: list[Group] = []
    taken = 0
    seen: Counter[int] = Counter()
    for _ in range(config.resample + 1):
        wanted = count - len(alive)
        numbers = range(first + taken, first + taken + wanted)
        new = _groups(prompts, numbers, config, engine, sampling, version, judge, seen)
        taken += wanted
        asked += new
        alive += [group for group in new if not group.is_dead]
        if len(alive) == count:
            break
    dead = [group for group in asked if group.is_dead]
    kept = {group.number for group in alive}
    kept |= {group.number for group in dead[len(dead) - (count - len(alive)) :]}
    return Gathered([group for group in asked if group.number in kept], asked, taken)


def _groups(
    prompts: PromptSamples,
    numbers: Sequence[int],
    config: RolloutConfig,
    engine: Engine,
    sampling: Sampling,
    version: int,
    judge: JudgeOf,
    seen: Counter[int],
) -> list[Group]:
    size = config.samples_per_prompt
    rows = [prompts[number] for number in numbers]
    requests: list[Request] = []
    for row in rows:
        prompt = Prompt.of(row.ids)
        # Noise hangs on the prompt's ids: where they come twice, the second answers are others.
        before = seen[prompt.key] * size
        seen[prompt.key] += 1
        requests += [Request(prompt, before + sample) for sample in range(size)]
    rollouts = engine.generate(requests, sampling, version=version)
    repeated = [row for row in rows for _ in range(size)]
    verdicts = judge(repeated, rollouts)
    return [
        Group(number, row, rollouts[start : start + size], verdicts[start : start + size])
        for number, row, start in zip(numbers, rows, range(0, len(rollouts), size), strict=True)
    ]
