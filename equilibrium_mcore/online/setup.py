"""From a run that is set up to one that learns from its own answers."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.objectives import REFERENCED
from equilibrium_mcore.config.policy import PolicyConfig
from equilibrium_mcore.config.rewards import ModelRewardConfig
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.data.chat.prompts import PromptSamples
from equilibrium_mcore.generation.interface import Engine
from equilibrium_mcore.online.critic import Critic
from equilibrium_mcore.online.critic_estimate import CriticEstimator
from equilibrium_mcore.online.estimate import Estimator, Reference, RewardEstimator
from equilibrium_mcore.online.evaluation import EvaluationCallback
from equilibrium_mcore.online.experience import packed_for
from equilibrium_mcore.online.judge import Judge, Unjudged
from equilibrium_mcore.online.model_reward import ModelReward
from equilibrium_mcore.online.pair_estimate import PairEstimator, packed_pairs
from equilibrium_mcore.online.pair_judge import PairJudge, compare_of
from equilibrium_mcore.online.report import SamplesFile
from equilibrium_mcore.online.rollouts import Gathered
from equilibrium_mcore.online.stream import OnlineStream, PackedOf
from equilibrium_mcore.online.teacher_estimate import TeacherEstimator
from equilibrium_mcore.processes.console import say
from equilibrium_mcore.training import reference
from equilibrium_mcore.training.callbacks import LogCallback
from equilibrium_mcore.training.frozen import load_frozen
from equilibrium_mcore.training.loop import Callback
from equilibrium_mcore.training.scoring import log_probabilities
from equilibrium_mcore.training.setup import Run


def go_online(run: Run, engine: Engine) -> None:
    """Give the run a stream of its own answers. Collective.

    Raises ConfigError for rewards and judges that cannot work here, a missing reference, and a
    checkpoint of other prompts.
    """
    samples = run.datasets.train
    assert isinstance(samples, PromptSamples)
    judge, estimator, packed_of = _judging(run, samples)
    files: list[SamplesFile] = []
    if run.is_first_rank:
        for note in judge.notes:
            say(note)
        files.append(
            SamplesFile(
                Path(run.config.output_directory),
                samples.tokenizer,
                shown=run.config.rollout.shown,
                after_step=run.progress.step,
            )
        )

    def seen(gathered: Gathered, step: int) -> None:
        for file in files:
            file(gathered, step)

    def at_end() -> None:
        for closing in (judge, *files):
            closing.close()

    run.stream.close()
    stream = OnlineStream(
        run,
        engine=engine,
        judge=judge,
        estimator=estimator,
        packed_of=packed_of,
        seen=seen,
        at_end=at_end,
    )
    of_updates = run.stage_figures
    run.stream, run.stage_figures = stream, lambda: {**stream.figures(), **of_updates()}


class Judging(NamedTuple):
    """What answers are worth, what is made of that, and how answers lie in sequences."""

    judge: Judge | Unjudged | PairJudge
    estimator: Estimator
    packed_of: PackedOf


def _judging(run: Run, samples: PromptSamples) -> Judging:
    """By the settings of the run. Collective."""
    if run.config.judge is not None:
        judge = PairJudge(compare_of(run, samples.tokenizer))
        return Judging(judge, pair_estimator(run), packed_pairs)
    if run.config.rewards is None:
        return Judging(Unjudged(), build_estimator(run), packed_for)
    rewards = Judge(
        run.config.rewards,
        samples.tokenizer,
        first_rank=run.is_first_rank,
        rank_rewards=[
            ModelReward(run, reward, key=f"rewards.rewards.{number}.weights")
            for number, reward in enumerate(run.config.rewards.rewards)
            if isinstance(reward, ModelRewardConfig)
        ],
    )
    return Judging(rewards, build_estimator(run), packed_for)


def pair_estimator(run: Run) -> PairEstimator:
    """What makes experience of pairs, for an objective of `training/pairs.py`. Collective."""
    model: Reference | None = None
    if isinstance(run.config.objective, REFERENCED):
        model = _scores(run)
    return PairEstimator(temperature=run.config.rollout.temperature, reference=model)


def _scores(run: Run) -> Reference:
    """log p by what the run started from, of the distribution that the objective's losses are."""
    if run.config.checkpoint.initial_weights is None:
        raise ConfigError(
            f"objective.type={run.config.objective.type!r} without checkpoint.initial_weights: "
            "they are the reference"
        )
    return reference.Reference(run).scores


def build_estimator(run: Run) -> Estimator:
    """What makes experience of answers, by the objective's settings. Collective."""
    settings = run.config.objective
    assert isinstance(settings, PolicyConfig)
    temperature = run.config.rollout.temperature
    given = {"temperature": temperature, "reference": _reference(run, settings, temperature)}
    if settings.advantage == "gae":
        return CriticEstimator(settings, critic=_critic(run, settings), **given)
    if settings.advantage == "teacher":
        return TeacherEstimator(settings, teacher=_teacher(run, settings, temperature), **given)
    return RewardEstimator(settings, **given)


def _critic(run: Run, settings: PolicyConfig) -> Critic:
    """A critic that learns from each step's batches before the policy does. Collective."""
    assert settings.critic is not None
    critic = Critic(run, settings.critic)
    done: dict[str, float] = {}
    run.prepare = lambda run, batches: done.update(critic.update(batches))
    run.holds = critic.holds
    run.stage_figures = lambda: done
    return critic


def _teacher(run: Run, settings: PolicyConfig, temperature: float) -> Reference:
    if settings.teacher is None:
        raise ConfigError(
            "objective.advantage='teacher' without objective.teacher: set it to the output "
            "directory of the model that is to be followed"
        )
    chunks = load_frozen(settings.teacher, config=run.config, groups=run.groups)
    return lambda run, batches: log_probabilities(
        run, batches, chunks=chunks, temperature=temperature
    )


def _reference(run: Run, settings: PolicyConfig, temperature: float) -> Reference | None:
    if not settings.needs_reference:
        return None
    if run.config.checkpoint.initial_weights is None:
        raise ConfigError(
            f"objective.kl.coefficient={settings.kl.coefficient:g} without "
            "checkpoint.initial_weights: they are the reference"
        )
    model = reference.Reference(run)
    return lambda run, batches: model.log_probabilities(run, batches, temperature=temperature)


def online_callbacks(config: RunConfig, log: LogCallback) -> list[Callback]:
    """The callbacks of a run on its own answers."""
    return [EvaluationCallback(config, log)]
