"""What a run can be: a stage sets defaults of the other sections, and what they must hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from equilibrium_mcore.config.objectives import PREFERENCES, SCORED, KtoConfig
from equilibrium_mcore.config.references import merge
from equilibrium_mcore.config.rule_kit import RuleTable, Subject

DEFAULT_STAGE = "pretrain"
_REQUIRED = {"model", "data", "training"}


class StageSettings(NamedTuple):
    """A stage, as far as settings go.

    `defaults` are laid under what a run file says. `data` is the kind that it takes, and `or_data`
    another; `data_folder` is where in `configs/data` its mixtures are.
    """

    meaning: str
    data: str
    data_folder: str
    defaults: Mapping[str, Any]
    needs_weights: bool = False
    template: str | None = None  # the stage whose experiment template it shares
    or_data: str | None = None

    @property
    def takes(self) -> tuple[str, ...]:
        """The kinds of data that it takes."""
        return (self.data,) if self.or_data is None else (self.data, self.or_data)


def _on_pairs(
    objective: str, meaning: str, *, unpaired: bool = False, **more: Any
) -> StageSettings:
    data = {"type": "preferences", **({"unpaired": True} if unpaired else {})}
    return StageSettings(
        meaning,
        data="preferences",
        data_folder="posttrain/dpo",
        defaults={"objective": {"type": objective}, "data": data, **more},
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
    "distill": StageSettings(
        "learning from a larger model's distribution, on text or conversations",
        data="indexed",
        data_folder="pretrain",
        defaults={"objective": {"type": "distillation"}},
        or_data="conversations",
    ),
    "dpo": _on_pairs("dpo", "direct preference optimisation, on pairs of answers"),
    "ipo": _on_pairs("ipo", "identity preference optimisation, on pairs"),
    "simpo": _on_pairs("simpo", "preferences by log p per token, without a reference"),
    "orpo": _on_pairs("orpo", "fine-tuning and an odds ratio of pairs, without a reference"),
    "kto": _on_pairs("kto", "on single answers, each desirable or not", unpaired=True),
    "reward_model": _on_pairs(
        "reward_model",
        "a score for answers, by a scalar head, from pairs",
        model={"head": "scalar"},
    ),
    "rlaif": StageSettings(
        "a judge's preferences between two of the model's own answers, learned by DPO, online",
        data="prompts",
        data_folder="posttrain/rlaif",
        defaults={
            "objective": {"type": "dpo"},
            "data": {"type": "prompts", "truth": None},
            "rollout": {"samples_per_prompt": 2},
        },
        needs_weights=True,
    ),
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
    if config.data.type not in settings.takes:
        fit = [name for name, stage in STAGES.items() if config.data.type in stage.takes]
        yield (
            f"data.type={config.data.type!r} with stage={config.stage!r}, which trains on "
            f"{' or '.join(settings.takes)}: name such data, or set stage to {' or '.join(fit)}"
        )


@rule("objective", "data")
def an_objective_has_its_data(subject: Subject) -> Iterator[str]:
    config = subject.config
    if config.data.type == "prompts":  # `online_rules.py` speaks
        return
    found = _form(config.data)
    wanted = "texts"
    if isinstance(config.objective, PREFERENCES):
        wanted = "pairs of answers"
    elif isinstance(config.objective, KtoConfig):
        wanted = "single answers"
    if found != wanted:
        yield (
            f"objective.type={config.objective.type!r} with data.type={config.data.type!r}, of "
            f"{found}: it needs {wanted}: {_WAY_TO[wanted]}"
        )


_WAY_TO = {
    "texts": "name other data, or an objective of pairs (dpo, ipo, simpo, orpo, reward_model)",
    "pairs of answers": "name data of type preferences, with unpaired: false",
    "single answers": "name data of type preferences, and set data.unpaired: true",
}


def _form(data: Any) -> str:
    """What an example of the data is."""
    if data.type != "preferences":
        return "texts"
    return "single answers" if data.unpaired else "pairs of answers"


@rule("objective", "training")
def kto_needs_several_answers(subject: Subject) -> Iterator[str]:
    config = subject.config
    if isinstance(config.objective, KtoConfig) and config.training.global_batch_size == 1:
        yield (
            "training.global_batch_size=1 with objective.type='kto', which compares each answer "
            "with the mean of mismatched ones over the global batch: set 2 or more, better 32"
        )


@rule("objective", "model", "parallelism")
def an_objective_has_its_head(subject: Subject) -> Iterator[str]:
    config = subject.config
    wanted = "scalar" if isinstance(config.objective, SCORED) else "output"
    if config.model.head not in (wanted, "both"):
        yield (
            f"model.head={config.model.head!r} with objective.type={config.objective.type!r}, "
            f"which needs {wanted!r}: set model.head: {wanted}"
        )
    elif config.model.head == "both" and config.parallelism.overlap_grad_reduce:
        yield (
            f"model.head='both' with objective.type={config.objective.type!r}, which trains one of "
            "two heads, and parallelism.overlap_grad_reduce=true, which waits for the gradient of "
            f"the other: set model.head: {wanted}, or overlap_grad_reduce: false"
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
