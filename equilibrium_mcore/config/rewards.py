"""Settings of rewards, one class per `type`; as tables in docs/reference/rewards.md.

What a text is worth is the weighted sum of its rewards. `parse_rewards` reads plain values.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, model_validator

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.problems import parse
from equilibrium_mcore.config.section import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    UserPath,
    setting,
)
from equilibrium_mcore.config.section_text import section_from_text

AnswerPlace = Literal["boxed", "tag", "hash", "phrase", "last_number", "whole"]

_NAME = "its name in results; null: the type. Two rewards of one type need different names"
_WEIGHT = "factor of its value in the sum; negative is a penalty, 0 only records it"
_SECONDS = "CPU time for one text; then its worker is killed and the verdict is timeout"
_CLOCK = "time on the clock for one text, for what waits instead of computing"


class MathAnswerConfig(Section):
    """1 where the text's final answer equals the true one, else 0."""

    type: Literal["math_answer"] = setting("math_answer", "which reward")
    name: str | None = setting(None, _NAME, min_length=1)
    weight: float = setting(1.0, _WEIGHT)
    places: list[AnswerPlace] = setting(
        ["boxed", "tag", "hash", "phrase"],
        "where the answer may stand, the first that occurs counts: the last `\\boxed{}`, the last "
        "`<answer></answer>`, after the last `####`, after the last `answer is` or `Answer:`; "
        "last_number takes any last number, whole takes the whole text",
        min_length=1,
    )
    tag: str = setting("answer", "the name of the tag", min_length=1)
    after: str | None = setting(
        None, "only what follows the last of this is looked at, e.g. `</think>`; null: all"
    )
    relative_tolerance: NonNegativeFloat = setting(
        0.0, "numbers may differ by this share of the true one; 0: exact"
    )
    absolute_tolerance: NonNegativeFloat = setting(0.0, "numbers may differ by this; 0: exact")
    units: Literal["required", "optional", "ignored"] = setting(
        "required",
        "required: the unit of the truth, or one that converts to it, and none where it has none; "
        "optional: one side may lack it; ignored: numbers alone",
    )
    percent: Literal["value", "either"] = setting(
        "value", "value: 50% is 0.5; either: it may also be 50"
    )
    decimal_comma: bool = setting(
        False, "true: 1.234,5 is what 1,234.5 is otherwise, in texts of the truth as well"
    )
    unevaluated: bool = setting(
        False, "true: an answer 12*7 may be right where the truth is 84; else it is wrong"
    )
    latex: Literal["auto", "math_verify", "own"] = setting(
        "auto",
        "who compares expressions that are no plain values: math-verify (extra `verification`); "
        "own: our parser, for which they are unparsed; auto: the first if it is installed",
    )
    seconds: PositiveFloat = setting(5.0, _SECONDS)
    wall_seconds: PositiveFloat = setting(30.0, _CLOCK)


class SandboxConfig(Section):
    """Where code of a text runs: without network, as another user, within these limits."""

    kind: Literal["auto", "bubblewrap", "namespaces"] = setting(
        "auto", "bubblewrap: needs `bwrap`; namespaces: the kernel's alone; auto: what works here"
    )
    seconds: PositiveFloat = setting(5.0, "CPU time of a process for one test")
    wall_seconds: PositiveFloat = setting(20.0, "time on the clock for one test")
    memory_mb: PositiveInt = setting(512, "address space of a process, and memory of all together")
    processes: PositiveInt = setting(16, "processes and threads at a time")
    output_kb: PositiveInt = setting(64, "output of one test; more ends it")
    files_mb: PositiveInt = setting(16, "files in /tmp, the only folder that can be written")
    libraries: list[UserPath] = setting(
        [], "folders that the code may import from beside the standard library, read-only"
    )


class CodeTestsConfig(Section):
    """Runs the code of a text against unit tests in a sandbox."""

    type: Literal["code_tests"] = setting("code_tests", "which reward")
    name: str | None = setting(None, _NAME, min_length=1)
    weight: float = setting(1.0, _WEIGHT)
    credit: Literal["all", "share"] = setting(
        "all", "all: 1 if every test passes, else 0; share: the share of tests that pass"
    )
    fence: Literal["required", "optional"] = setting(
        "required",
        "required: the code is the last fenced block, unparsed without one; optional: without one "
        "the whole text is code",
    )
    after: str | None = setting(None, "only what follows the last of this is looked at; null: all")
    prelude: str = setting("", "code that runs before the text's, e.g. `from typing import *`")
    relative_tolerance: NonNegativeFloat = setting(1e-9, "of floating-point results")
    sandbox: SandboxConfig = setting(SandboxConfig())


class FormatConfig(Section):
    """1 where each tag stands once, in this order, and nothing stands outside of them; else 0."""

    type: Literal["format"] = setting("format", "which reward")
    name: str | None = setting(None, _NAME, min_length=1)
    weight: float = setting(1.0, _WEIGHT)
    tags: list[str] = setting(["think", "answer"], "names of the tags, in order", min_length=1)
    first_is_open: bool = setting(False, "true: the prompt ends with the first opening tag")
    text_outside: bool = setting(False, "true: text may stand outside of the tags")

    @model_validator(mode="after")
    def _names(self) -> FormatConfig:
        for tag in self.tags:
            if not re.fullmatch(r"[A-Za-z_][\w.-]*", tag):
                raise ValueError(f"tags has {tag!r}: write the name alone, e.g. think for <think>")
        if len(set(self.tags)) < len(self.tags):
            raise ValueError(f"tags={self.tags}: each may be named once")
        return self


class LengthRewardConfig(Section):
    """0 up to a length, then a penalty: DAPO's linear one (arXiv 2503.14476, eq. 13), or a step."""

    type: Literal["length"] = setting("length", "which reward")
    name: str | None = setting(None, _NAME, min_length=1)
    weight: float = setting(1.0, _WEIGHT)
    unit: Literal["tokens", "characters", "words"] = setting(
        "tokens", "what is counted; tokens are those that the model produced"
    )
    max_length: PositiveInt = setting(
        doc="from here on (soft), or beyond it (step), the value is -1"
    )
    soft_from: NonNegativeInt | None = setting(
        None, "from here the value falls linearly, to -1 at max_length; null: a step beyond it"
    )

    @model_validator(mode="after")
    def _order(self) -> LengthRewardConfig:
        if self.soft_from is not None and self.soft_from >= self.max_length:
            raise ValueError(
                f"soft_from={self.soft_from} with max_length={self.max_length}: it must be less; "
                "leave it out for a step at max_length"
            )
        return self


class PluginConfig(Section):
    """A function of yours: `def reward(*, prompt, text, truth, **arguments) -> float`."""

    type: Literal["plugin"] = setting("plugin", "which reward")
    name: str | None = setting(None, _NAME, min_length=1)
    weight: float = setting(1.0, _WEIGHT)
    path: str = setting(doc="package.module:function; it must be importable where the run starts")
    arguments: dict[str, Any] = setting({}, "further keyword arguments; plain values")
    seconds: PositiveFloat = setting(30.0, _SECONDS)
    wall_seconds: PositiveFloat = setting(60.0, _CLOCK)

    @model_validator(mode="after")
    def _form(self) -> PluginConfig:
        if not re.fullmatch(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*", self.path):
            raise ValueError(
                f"path={self.path!r}: must be package.module:function, e.g. my_rewards.poems:rhymes"
            )
        return self


class ModelRewardConfig(Section):
    """The score of a reward model at the last token of an answer, by the ranks of the run."""

    type: Literal["reward_model"] = setting("reward_model", "which reward")
    name: str | None = setting(None, _NAME, min_length=1)
    weight: float = setting(1.0, _WEIGHT)
    weights: UserPath = setting(
        doc="output directory or checkpoint of a run of stage reward_model, of the same tokenizer"
    )
    bound: PositiveFloat | None = setting(
        None, "scores are cut to this size, so that no single one rules a batch; null: as they are"
    )


RewardConfig = Annotated[
    MathAnswerConfig
    | CodeTestsConfig
    | FormatConfig
    | LengthRewardConfig
    | PluginConfig
    | ModelRewardConfig,
    Field(discriminator="type"),
]
ON_RANKS = ("reward_model",)
"""Rewards that are found by the ranks of a run, and not by a worker process."""

REWARD_CLASSES: dict[str, type[Section]] = {
    kind.model_fields["type"].default: kind for kind in get_args(get_args(RewardConfig)[0])
}


class RewardsConfig(Section):
    """What a text is worth, and when too much went wrong while finding out."""

    rewards: list[RewardConfig] = setting(
        doc="rewards; their weighted values are added", min_length=1
    )
    reward_workers: PositiveInt | None = setting(
        None, "processes that judge texts; null: one a core that this process may use"
    )
    max_error_share: Fraction = setting(
        0.02, "stop if more of the last texts than this had an error: a verifier is broken"
    )
    error_window: PositiveInt = setting(
        100, "how many last texts that share is of, if a batch has not more"
    )

    @model_validator(mode="after")
    def _names(self) -> RewardsConfig:
        names = [reward_name(reward) for reward in self.rewards]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(
                    f"{names.count(name)} rewards are named {name!r}: give each its own name: ..."
                )
        return self


def reward_name(config: Any) -> str:
    """The name of a reward in results."""
    return config.name or config.type


def parse_rewards(values: Any, *, source: object = None) -> RewardsConfig:
    """The rewards in `values`: a list of them, or a mapping with `rewards` and the rest.

    Raises ConfigError with every problem.
    """
    parsed = parse(RewardsConfig, values if isinstance(values, dict) else {"rewards": values})
    if isinstance(parsed, RewardsConfig):
        return parsed
    raise ConfigError([problem.text for problem in parsed], source=source)


def reward_from_text(text: str) -> dict[str, Any]:
    """`type=math_answer,units=optional` as plain values; raises ConfigError for what is none."""
    return section_from_text(text, kind="reward", example="type=math_answer,units=optional")
