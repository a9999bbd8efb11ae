"""Settings of a judge, who says which of two answers to a prompt is the better one.

Stage `rlaif` learns from what it says; the alignment report counts wins by it.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import Field, field_validator

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.problems import parse
from equilibrium_mcore.config.section import (
    Fraction,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Section,
    UserPath,
    setting,
)
from equilibrium_mcore.config.section_text import section_from_text


class HttpJudgeConfig(Section):
    """A model that speaks OpenAI's chat protocol. It is asked twice, with the answers swapped."""

    type: Literal["http"] = setting("http", "which judge")
    url: str = setting(doc="the server, e.g. http://host:8000; /v1/chat/completions is added")
    model: str = setting(doc="the name that the server knows the model by")
    key_variable: str | None = setting(
        None, "environment variable that holds the server's key; null: none is sent"
    )
    criterion: str = setting(
        "Prefer the answer that is more correct, more helpful and less harmful. Length by itself "
        "is no merit.",
        "by what it judges; part of the question",
        min_length=1,
    )
    max_tokens: PositiveInt = setting(512, "longest reply; the verdict stands at its end")
    timeout_seconds: PositiveFloat = setting(120.0, "patience with one request")
    attempts: PositiveInt = setting(
        3, "requests for one reply, if they fail for the moment or time out"
    )
    pause_seconds: NonNegativeFloat = setting(1.0, "pause before the second one; then it doubles")
    requests_at_once: PositiveInt = setting(8, "requests under way at a time")
    max_error_share: Fraction = setting(
        0.02, "stop if more of the last pairs than this could not be judged"
    )
    error_window: PositiveInt = setting(
        100, "how many last pairs that share is of, if a batch has not more"
    )

    @field_validator("url")
    @classmethod
    def _is_http(cls, url: str) -> str:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"{url!r}: give it with http:// or https://")
        return url


class ModelJudgeConfig(Section):
    """A reward model on the ranks of the run: the answer with the larger score is the better."""

    type: Literal["reward_model"] = setting("reward_model", "which judge")
    weights: UserPath = setting(
        doc="output directory or checkpoint of a run of stage reward_model, of the same tokenizer"
    )
    tie_margin: NonNegativeFloat = setting(0.0, "scores that differ by no more than this are a tie")


JudgeConfig = Annotated[HttpJudgeConfig | ModelJudgeConfig, Field(discriminator="type")]
JUDGE_CLASSES: dict[str, type[Section]] = {
    kind.model_fields["type"].default: kind for kind in get_args(get_args(JudgeConfig)[0])
}


def parse_judge(text: str) -> HttpJudgeConfig | ModelJudgeConfig:
    """`type=http,url=...,model=...` as settings. Raises ConfigError for what is none."""
    example = "type=http,url=http://host:8000,model=NAME"
    values = section_from_text(text, kind="judge", example=example)
    kind = JUDGE_CLASSES.get(values.get("type", ""))
    if kind is None:
        raise ConfigError(
            f"judge {text!r}: type is {' or '.join(JUDGE_CLASSES)}; write e.g. {example}"
        )
    parsed = parse(kind, values)
    if isinstance(parsed, kind):
        return parsed
    raise ConfigError([problem.text for problem in parsed], source=f"judge {text!r}")


def reward_models(config: Any) -> Iterator[tuple[str, Path]]:
    """The reward models that a run loads: the setting that names each, and where it is."""
    if config.rewards is not None:
        for number, reward in enumerate(config.rewards.rewards):
            if reward.type == "reward_model":
                yield f"rewards.rewards.{number}.weights", reward.weights
    if isinstance(config.judge, ModelJudgeConfig):
        yield "judge.weights", config.judge.weights
