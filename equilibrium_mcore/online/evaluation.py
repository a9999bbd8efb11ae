"""Held-out prompts along a run: greedy accuracy, and pass@k of sampled answers.

Answers are read by `verification/second_reader.py`, not by the rewards' parser; where a truth is
tests, the tests judge.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.data.chat.prompts import EncodedPrompt, PromptSamples
from equilibrium_mcore.data.tokenizer import Tokenizer
from equilibrium_mcore.generation.interface import Engine, Prompt, Request, Rollout, Sampling
from equilibrium_mcore.models.modes import evaluating
from equilibrium_mcore.online.judge import Judge, text_of
from equilibrium_mcore.training.callbacks import LogCallback
from equilibrium_mcore.training.loop import Callback
from equilibrium_mcore.training.metrics import EvaluationRecord
from equilibrium_mcore.training.setup import Run
from equilibrium_mcore.training.step import StepOutcome
from equilibrium_mcore.verification.second_reader import is_right


class EvaluationCallback(Callback):
    """Writes an `evaluation` record every so many steps, before the first and after the last."""

    def __init__(self, config: RunConfig, log: LogCallback) -> None:
        self.every = config.evaluation.interval_steps
        self.log = log

    def on_start(self, run: Run) -> None:
        if self.every and run.progress.step == 0:
            self._evaluate(run)

    def on_step(self, run: Run, outcome: StepOutcome) -> None:
        if not outcome.stop_requested:  # whoever asked for the stop waits for the save
            self._evaluate(run)

    def _evaluate(self, run: Run) -> None:
        with self.log.pause():
            figures = evaluate(run, run.stream.engine, run.stream.judge)
            if self.log.writer is not None:
                self.log.writer.write(EvaluationRecord(step=run.progress.step, figures=figures))


def evaluate(run: Run, engine: Engine, judge: Judge) -> dict[str, float]:
    """Figures over the held-out prompts, the same ones every time. Collective.

    `accuracy`: greedy answers that are right; with sampled ones `sampled_accuracy`, of all of them,
    and `pass_at_K`, prompts of whose K answers one is right. `greedy_tokens`: mean length.
    """
    samples = run.datasets.validation
    assert isinstance(samples, PromptSamples)
    settings, rollout = run.config.evaluation, run.config.rollout
    prompts = samples.prompts[: settings.prompts]
    seed = hashlib.blake2b(f"evaluation/{run.config.training.seed}".encode(), digest_size=7)
    sampling = Sampling(
        seed=int.from_bytes(seed.digest(), "little"),
        max_new_tokens=rollout.max_new_tokens,
        stop_ids=samples.stop_ids,
        temperature=rollout.temperature,
        top_k=rollout.top_k,
        top_p=rollout.top_p,
    )
    with run.weights("evaluation") as chunks, evaluating(chunks):
        # Evaluated weights may be others than those of the step's rollouts: a version of their own.
        version = -1 - run.progress.step
        likeliest = replace(sampling, temperature=0.0)
        greedy = _answers(engine, prompts, likeliest, count=1, version=version)
        drawn = _answers(engine, prompts, sampling, count=settings.samples, version=version)
    right = _right(prompts, greedy, samples.tokenizer, judge)
    figures = {
        "accuracy": _mean(right),
        "greedy_tokens": _mean([len(rollout.ids) for rollout in greedy]),
    }
    if drawn:
        size = settings.samples
        repeated = [prompt for prompt in prompts for _ in range(size)]
        right = _right(repeated, drawn, samples.tokenizer, judge)
        passed = [any(right[start : start + size]) for start in range(0, len(right), size)]
        figures |= {"sampled_accuracy": _mean(right), f"pass_at_{size}": _mean(passed)}
    return figures


def _answers(
    engine: Engine,
    prompts: Sequence[EncodedPrompt],
    sampling: Sampling,
    *,
    count: int,
    version: int,
) -> list[Rollout]:
    requests = [
        Request(Prompt.of(prompt.ids), sample) for prompt in prompts for sample in range(count)
    ]
    return engine.generate(requests, sampling, version=version) if requests else []


def _right(
    prompts: Sequence[EncodedPrompt],
    rollouts: Sequence[Rollout],
    tokenizer: Tokenizer,
    judge: Judge,
) -> list[bool]:
    tested = [place for place, prompt in enumerate(prompts) if not _is_read(prompt.truth)]
    verdicts = judge([prompts[n] for n in tested], [rollouts[n] for n in tested]) if tested else []
    passed = {n: verdict.verdict == "ok" for n, verdict in zip(tested, verdicts, strict=True)}
    return [
        passed[n] if n in passed else is_right(text_of(tokenizer, rollout.ids), prompt.truth)
        for n, (prompt, rollout) in enumerate(zip(prompts, rollouts, strict=True))
    ]


def _is_read(truth: Any) -> bool:
    return isinstance(truth, str | int | float)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
