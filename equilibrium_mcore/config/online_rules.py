"""What runs on their own answers need of the other settings."""

from __future__ import annotations

from collections.abc import Iterator

from equilibrium_mcore.config.objectives import ON_OWN_ANSWERS
from equilibrium_mcore.config.online import EvaluationConfig, RolloutConfig
from equilibrium_mcore.config.pattern import count_kinds
from equilibrium_mcore.config.policy import PolicyConfig
from equilibrium_mcore.config.rule_kit import RuleTable, Subject
from equilibrium_mcore.config.stages import STAGES

ONLINE_RULES = RuleTable()
rule = ONLINE_RULES.rule
JUDGED = "rlaif"
"""The stage that learns from a judge's preferences."""
WITHOUT_REWARDS = ("teacher",)
"""Advantages that no reward is part of."""


def is_online(subject: Subject) -> bool:
    """Whether the run learns from its own answers."""
    return STAGES[subject.config.stage].data == "prompts"


@rule("stage", "objective")
def an_online_stage_has_a_policy(subject: Subject) -> Iterator[str]:
    """The other way round is asked where a run starts: made-up answers certify a policy."""
    config = subject.config
    judged = config.stage == JUDGED
    if is_online(subject) and not judged and not isinstance(config.objective, PolicyConfig):
        yield (
            f"objective.type={config.objective.type!r} with stage={config.stage!r}, which learns "
            "from its own answers: set objective.type: policy"
        )


@rule("stage", "objective", "rewards")
def answers_are_worth_something(subject: Subject) -> Iterator[str]:
    config = subject.config
    if not is_online(subject):
        if config.rewards is not None:
            yield f"rewards with stage={config.stage!r}, which asks for no answers: leave them out"
        return
    if config.stage == JUDGED:  # `a_judge_says_which_answer_is_better`
        return
    wanted = getattr(config.objective, "advantage", None) not in WITHOUT_REWARDS
    if wanted and config.rewards is None:
        yield (
            "rewards: missing; answers are learned from by what they are worth: name some, e.g. "
            "rewards: [{type: math_answer}] (docs/reference/rewards.md)"
        )


@rule("stage", "objective")
def a_teacher_is_named(subject: Subject) -> Iterator[str]:
    objective = subject.config.objective
    if not is_online(subject) or not isinstance(objective, PolicyConfig):
        return
    if objective.advantage == "teacher" and objective.teacher is None:
        yield (
            "objective.advantage='teacher' without objective.teacher: set it to the output "
            "directory of the model that is to be followed"
        )


@rule("data", "rewards")
def rewards_have_their_truths(subject: Subject) -> Iterator[str]:
    config = subject.config
    if config.rewards is None or getattr(config.data, "truth", "") is not None:
        return
    asking = [r.type for r in config.rewards.rewards if r.type in ("math_answer", "code_tests")]
    if asking:
        yield (
            f"rewards of type {' and '.join(asking)} with data.truth=null: they judge an answer by "
            "a truth; name its key in data.truth, or choose rewards without one"
        )


@rule("stage", "objective", "rewards", "judge")
def a_judge_says_which_answer_is_better(subject: Subject) -> Iterator[str]:
    config = subject.config
    if config.stage != JUDGED:
        if config.judge is not None:
            yield (
                f"judge with stage={config.stage!r}, which learns from no judge: leave it out, or "
                "set stage: rlaif"
            )
        return
    if config.judge is None:
        yield (
            "judge: missing; pairs of answers are learned from by what it prefers: e.g. judge: "
            "{type: http, url: 'http://host:8000', model: NAME}, or {type: reward_model, weights: "
            "RUN}"
        )
    if config.rewards is not None:
        yield "rewards with stage='rlaif', which learns from what a judge prefers: leave them out"
    if not isinstance(config.objective, ON_OWN_ANSWERS):
        yield (
            f"objective.type={config.objective.type!r} with stage='rlaif', which learns from pairs "
            "of its own answers: set it to dpo, ipo or simpo"
        )
    elif getattr(config.objective, "reference", "live") != "live":
        yield (
            "objective.reference='stored' with stage='rlaif', whose answers are not there before: "
            "set objective.reference: live"
        )


@rule("stage", "rollout", "evaluation")
def pairs_are_two_answers(subject: Subject) -> Iterator[str]:
    config = subject.config
    if config.stage != JUDGED:
        return
    if config.rollout.samples_per_prompt != 2:
        yield (
            f"rollout.samples_per_prompt={config.rollout.samples_per_prompt} with stage='rlaif': "
            "the judge compares two answers to a prompt; set it to 2"
        )
    if config.evaluation.interval_steps:
        yield (
            f"evaluation.interval_steps={config.evaluation.interval_steps} with stage='rlaif', "
            "whose answers have no truth: set it to 0, and compare checkpoints with "
            "tools/alignment_report.py"
        )


@rule("stage", "objective", "rollout", "evaluation")
def rollouts_are_for_policies(subject: Subject) -> Iterator[str]:
    config = subject.config
    if is_online(subject) or isinstance(config.objective, PolicyConfig):
        return
    for name, default in (("rollout", RolloutConfig()), ("evaluation", EvaluationConfig())):
        if getattr(config, name) != default:
            yield (
                f"{name} with stage={config.stage!r}, which asks for no answers: leave it "
                "out, or set stage to one that does, e.g. grpo"
            )


@rule("stage", "training", "rollout")
def groups_are_whole(subject: Subject) -> Iterator[str]:
    if not is_online(subject):
        return
    training, size = subject.config.training, subject.config.rollout.samples_per_prompt
    if training.global_batch_size % size:
        below = training.global_batch_size // size * size
        fit = f"{below} or {below + size}" if below else str(size)
        yield (
            f"training.global_batch_size={training.global_batch_size} answers a step are no "
            f"multiple of rollout.samples_per_prompt={size}: use {fit}"
        )


@rule("stage", "objective", "rollout")
def advantages_have_their_groups(subject: Subject) -> Iterator[str]:
    objective, rollout = subject.config.objective, subject.config.rollout
    if not is_online(subject) or not isinstance(objective, PolicyConfig):
        return
    if objective.advantage in ("group", "leave_one_out") and rollout.samples_per_prompt == 1:
        yield (
            f"rollout.samples_per_prompt=1 with objective.advantage={objective.advantage!r}: the "
            "other answers to a prompt are the baseline; use at least 2, or another advantage"
        )
    if rollout.resample and rollout.samples_per_prompt == 1:
        yield "rollout.resample with samples_per_prompt=1: a single answer is no group; set it to 0"


@rule("stage", "rollout")
def there_is_a_choice(subject: Subject) -> Iterator[str]:
    """The probability of the only token that can be drawn is 1, and has no gradient."""
    if is_online(subject) and subject.config.rollout.top_k == 1:
        yield (
            "rollout.top_k=1 leaves nothing to learn: every token would be the likeliest, of "
            "probability 1; use 0 for no bound, or at least 2"
        )


@rule("stage", "training", "rollout")
def an_answer_fits(subject: Subject) -> Iterator[str]:
    if not is_online(subject):
        return
    length, most = subject.config.training.sequence_length, subject.config.rollout.max_new_tokens
    if subject.config.stage == JUDGED and 2 * (most + 1) > length:
        yield (
            f"rollout.max_new_tokens={most} with training.sequence_length={length}: both answers "
            "of a pair lie in one sequence, each with its prompt; use at most "
            f"{max(length // 2 - 1, 1)}, less the longest prompt"
        )
    elif most >= length:
        yield (
            f"rollout.max_new_tokens={most} with training.sequence_length={length}: a prompt and "
            f"its answer lie in one sequence; use at most {length - 1}, less the longest prompt"
        )


@rule("stage", "model")
def the_router_follows_the_reward(subject: Subject) -> Iterator[str]:
    """A bias that moved would make old and new log-probabilities those of two models."""
    moe = subject.config.model.moe
    if not is_online(subject) or "moe" not in count_kinds(subject.config.model.layer_pattern):
        return
    if moe.load_balancing != "none" and moe.aux_loss_coefficient > 0:
        yield (
            f"model.moe.load_balancing={moe.load_balancing!r} with a policy: a balancing loss "
            "would pull the router whatever answers are worth; set model.moe.load_balancing: none"
        )
    if moe.z_loss_coefficient > 0:
        yield (
            f"model.moe.z_loss_coefficient={moe.z_loss_coefficient:g} with a policy: it would pull "
            "the router whatever answers are worth; set it to 0"
        )
    if moe.expert_bias and moe.expert_bias_update_rate > 0:
        yield (
            f"model.moe.expert_bias_update_rate={moe.expert_bias_update_rate:g} with a policy: the "
            "bias would move between an answer and the update on it; set it to 0"
        )


@rule("stage", "training")
def nothing_counts_positions_in_the_data(subject: Subject) -> Iterator[str]:
    """What names samples by their place in a file."""
    if not is_online(subject):
        return
    training = subject.config.training
    if training.validation_interval_steps:
        yield (
            f"training.validation_interval_steps={training.validation_interval_steps} with a "
            "policy, whose loss on given text says nothing: set it to 0, and "
            "evaluation.interval_steps to how often held-out prompts are answered"
        )
    if training.left_out:
        yield "training.left_out with a policy: its samples are answers; leave it empty"
    if training.anomalies is not None and training.anomalies.policy == "rollback":
        yield (
            "training.anomalies.policy='rollback' with a policy: the samples that it leaves out "
            "are positions in data, and answers have none; use skip or stop"
        )


@rule("stage", "evaluation", "data")
def an_evaluation_has_prompts(subject: Subject) -> Iterator[str]:
    config = subject.config
    if not is_online(subject) or config.data.type != "prompts":
        return
    if config.evaluation.interval_steps and config.data.truth is None:
        yield (
            f"evaluation.interval_steps={config.evaluation.interval_steps} with data.truth=null: "
            "held-out answers are judged by a truth; name its key in data.truth, or set "
            "evaluation.interval_steps to 0"
        )
    if config.evaluation.interval_steps and not any(s.validation for s in config.data.sources):
        yield (
            f"evaluation.interval_steps={config.evaluation.interval_steps} and no source has "
            "`validation`: name held-out prompts in data.sources.*.validation, or set it to 0"
        )
