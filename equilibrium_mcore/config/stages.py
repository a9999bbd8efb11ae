"""What a run can be: a stage sets defaults of the other sections, and what they must hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from equilibrium_mcore.config.objectives import PREFERENCES
from equilibrium_mcore.config.references import merge
from equilibrium_mcore.config.rule_kit import RuleTable, Subject

DEFAULT_STAGE = "pretrain"
_REQUIRED = {"model", "data", "training"}


class StageSettings(NamedTuple):
    """A stage, as far as settings go.

    `defaults` are laid under what a run file says. `data` is the kind that it takes;
    `data_folder` is where in `configs/data` its mixtures are.
    """

    meaning: str
    data: str
    data_folder: str
    defaults: Mapping[str, Any]
    needs_weights: bool = False
    template: str | None = None  # the stage whose experiment template it shares


def _on_pairs(objective: str, meaning: str) -> StageSettings:
    return StageSettings(
        meaning,
        data="preferences",
        data_folder="posttrain/dpo",
        defaults={"objective": {"type": objective}, "data": {"type": "preferences"}},
        needs_weights=objective != "orpo",  # which fine-tunes as well
        template=None if objective == "dpo" else "dpo",
    )


def _online(preset: str, meaning: str, **defaults: Any) -> StageSettings:
    return StageSettings(
        meaning,
        data="prompts",
        data_folder="posttrain/grpo",
        defaults={
            "objective": {"type": "policy", "preset": preset},
            "data": {"type": "prompts"},
            **defaults,
        },
        needs_weights=True,
        template=None if preset == "grpo" else "grpo",
    )


STAGES: dict[str, StageSettings] = {
    "pretrain": StageSettings(
        "from random weights, on text",
        data="indexed",
        data_folder="pretrain",
        defaults={},
    ),
    "midtrain": StageSettings(
        "from weights, on other text, while the rate falls (a WSD tail)",
        data="indexed",
        data_folder="midtrain",
        defaults={"optimizer": {"schedule": {"kind": "wsd"}}, "data": {"packing": "documents"}},
        needs_weights=True,
    ),
    "sft": StageSettings(
        "supervised fine-tuning, on what the assistant says in conversations",
        data="conversations",
        data_folder="posttrain/sft",
        defaults={"objective": {"type": "sft"}, "data": {"type": "conversations"}},
    ),
    "lora": StageSettings(
        "as sft, by adapters beside frozen weights",
        data="conversations",
        data_folder="posttrain/sft",
        defaults={
            "objective": {"type": "sft"},
            "data": {"type": "conversations"},
            "adapters": {},
        },
        needs_weights=True,
        template="sft",
    ),
    "dpo": _on_pairs("dpo", "direct preference optimisation, on pairs of answers"),
    "ipo": _on_pairs("ipo", "identity preference optimisation, on pairs"),
    "simpo": _on_pairs("simpo", "preferences by log p per token, without a reference"),
    "orpo": _on_pairs("orpo", "fine-tuning and an odds ratio of pairs, without a reference"),
    "grpo": _online("grpo", "policy gradient against the mean of a prompt's answers, online"),
    "ppo": _online(
        "ppo",
        "policy gradient against a critic's values, online",
        rollout={"samples_per_prompt": 1},
    ),
    "opd": _online(
        "opd",
        "distillation on the model's own answers: towards a teacher's log p, online",
        rollout={"samples_per_prompt": 1},
    ),
    "spo": _online(
        "spo",
        "policy gradient against what was earned before, online",
        rollout={"samples_per_prompt": 1},
    ),
}

MEANINGS = "; ".join(f"{name}: {stage.meaning}" for name, stage in STAGES.items())

STAGE_RULES = RuleTable()
rule = STAGE_RULES.rule


def with_stage_defaults(values: Mapping[str, Any]) -> dict[str, Any]:
    """`values` over the defaults of their stage; an unknown stage is left for the schema.

    Sections that every run must have stay missing where they are.
    """
    settings = STAGES.get(str(values.get("stage", DEFAULT_STAGE)))
    if settings is None:
        return dict(values)
    there = {key: value for key, value in values.items() if value is not None}
    laid = {
        key: section
        for key, section in settings.defaults.items()
        if (key in there or key not in _REQUIRED) and not _of_another_type(section, there.get(key))
    }
    return {**values, **merge(laid, there)}


def _of_another_type(section: Any, given: Any) -> bool:
    """Whether what is given is of another kind, for which a section's defaults mean nothing."""
    named = given.get("type") if isinstance(given, Mapping) else None
    return named is not None and "type" in section and named != section["type"]


@rule("stage", "data")
def a_stage_has_its_data(subject: Subject) -> Iterator[str]:
    config, settings = subject.config, STAGES[subject.config.stage]
    if config.data.type != settings.data:
        fit = [name for name, stage in STAGES.items() if stage.data == config.data.type]
        yield (
            f"data.type={config.data.type!r} with stage={config.stage!r}, which trains on "
            f"{settings.data}: name such data, or set stage to {' or '.join(fit)}"
        )


@rule("objective", "data")
def an_objective_has_its_data(subject: Subject) -> Iterator[str]:
    config = subject.config
    of_pairs = isinstance(config.objective, PREFERENCES)
    if of_pairs != (config.data.type == "preferences"):
        if config.data.type == "prompts":  # `online_rules.py` speaks
            return
        needs = (
            "pairs of answers: name data of type preferences"
            if of_pairs
            else ("texts: name other data, or an objective of pairs (dpo, ipo, simpo, orpo)")
        )
        yield (
            f"objective.type={config.objective.type!r} with data.type={config.data.type!r}: it "
            f"needs {needs}"
        )


@rule("stage", "checkpoint")
def a_stage_starts_from_weights(subject: Subject) -> Iterator[str]:
    config = subject.config
    if STAGES[config.stage].needs_weights and config.checkpoint.initial_weights is None:
        yield (
            f"stage={config.stage!r} continues a model: set checkpoint.initial_weights to a run's "
            "output directory or one of its checkpoints, or set stage: pretrain to train from "
            "scratch"
        )
