"""Both models asked, and everything that is measured of their answers without a judge."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from equilibrium_mcore.alignment.exported import ExportedModel
from equilibrium_mcore.alignment.models import (
    Answered,
    Asking,
    Model,
    RewardModel,
    RunModel,
    one_process,
)
from equilibrium_mcore.alignment.prompts import AskedPrompt
from equilibrium_mcore.alignment.refusals import manner_of
from equilibrium_mcore.alignment.rows import Row

Say = Callable[[str], object]


@dataclass(frozen=True)
class Measured:
    """All rows, and in words why there is no KL."""

    rows: list[Row]
    no_kl: str | None


def measure(
    before: Path,
    after: Path,
    prompts: Sequence[AskedPrompt],
    asking: Asking,
    *,
    reward_model: Path | None = None,
    say: Say = lambda text: None,
) -> Measured:
    """Ask both models, on this process. Both are in memory at a time, and the reward model.

    Raises ConfigError, FileNotFoundError, ValueError and DamagedCheckpointError for models that
    cannot be asked.
    """
    with one_process() as groups:
        models = [open_model(path, groups) for path in (before, after)]
        scorer = None if reward_model is None else RewardModel(reward_model, groups)
        answers = []
        for model in models:
            say(f"{model.name}: answering {len(prompts)} prompts")
            answers.append(model.answers(prompts, asking))
        rows = [_row(p, b, a) for p, b, a in zip(prompts, *answers, strict=True)]
        no_kl = models[1].reads_as(models[0])
        for row, prompt, answered in zip(rows, prompts, answers[1], strict=True):
            if no_kl is None:
                row.kl = divergence(models[1], models[0], answered)
            if scorer is not None:
                row.before_score = scorer.score(prompt, row.before)
                row.after_score = scorer.score(prompt, row.after)
    return Measured(rows, no_kl)


def open_model(path: Path, groups: Any) -> Model:
    """An exported folder, or a run's checkpoint."""
    return ExportedModel(path) if (path / "config.json").is_file() else RunModel(path, groups)


def divergence(model: Model, start: Model, answered: Answered) -> float:
    """The mean of KL(model || start) in nats over the tokens of an answer of `model`'s."""
    ours, theirs = model.log_probabilities(answered), start.log_probabilities(answered)
    size = min(ours.shape[-1], theirs.shape[-1])
    ours, theirs = ours[:, :size].double(), theirs[:, :size].double()
    of_tokens = torch.where(ours > -torch.inf, ours.exp() * (ours - theirs), 0.0).sum(-1)
    return float(of_tokens.mean())


def _row(prompt: AskedPrompt, before: Answered, after: Answered) -> Row:
    return Row(
        prompt=prompt.text,
        kind=prompt.kind,
        before=before.text,
        after=after.text,
        before_manner=manner_of(before.text),
        after_manner=manner_of(after.text),
        before_finished=before.finished,
        after_finished=after.finished,
        tokens=len(after.ids) - after.start,
    )
