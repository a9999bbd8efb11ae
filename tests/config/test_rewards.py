"""Settings of rewards: what is read, what is said about what cannot be, and their reference."""

from __future__ import annotations

from pathlib import Path

import pytest

from equilibrium_mcore.config import describe
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.rewards import (
    REWARD_CLASSES,
    CodeTestsConfig,
    FormatConfig,
    LengthRewardConfig,
    MathAnswerConfig,
    ModelRewardConfig,
    PluginConfig,
    SandboxConfig,
    parse_rewards,
    reward_from_text,
    reward_name,
)
from equilibrium_mcore.config.yaml_io import parse_yaml

A_RUN = """
- {type: math_answer, weight: 1.0, units: optional}
- {type: code_tests, sandbox: {seconds: 2, memory_mb: 256}}
- {type: format, weight: 0.1}
- {type: length, soft_from: 400, max_length: 512}
- {type: plugin, path: "my_package.my_module:function", arguments: {factor: 2}}
- {type: reward_model, weights: /runs/scores}
"""


def test_rewards_of_a_run():
    config = parse_rewards(parse_yaml(A_RUN, source="test"))
    assert config.rewards == [
        MathAnswerConfig(units="optional"),
        CodeTestsConfig(sandbox=SandboxConfig(seconds=2, memory_mb=256)),
        FormatConfig(weight=0.1),
        LengthRewardConfig(soft_from=400, max_length=512),
        PluginConfig(path="my_package.my_module:function", arguments={"factor": 2}),
        ModelRewardConfig(weights=Path("/runs/scores")),
    ]
    assert [reward_name(reward) for reward in config.rewards] == list(REWARD_CLASSES)
    assert config.max_error_share == 0.02


@pytest.mark.parametrize("kind", REWARD_CLASSES)
def test_every_reward_is_documented_and_has_a_weight(kind):
    section = REWARD_CLASSES[kind]
    assert (
        section.__doc__ and section.__doc__.splitlines()[0].endswith(".") or ":" in section.__doc__
    )
    assert section.model_fields["weight"].default == 1.0
    assert all(
        field.description for name, field in section.model_fields.items() if name != "sandbox"
    )


PROBLEMS = {
    "[]": "rewards: needs at least 1 item",
    "[{type: maths}]": "rewards.0.type='maths': must be one of 'math_answer', ",
    "[{type: math_answer, unit: cm}]": "rewards.0.unit: unknown key; did you mean 'units'?",
    "[{type: math_answer, places: [box]}]": "rewards.0.places.0='box': must be one of 'boxed'",
    "[{type: length, max_length: 5, soft_from: 5}]": "soft_from=5 with max_length=5: it must be",
    "[{type: length}]": "rewards.0.max_length: missing",
    "[{type: format, tags: [<think>]}]": "write the name alone, e.g. think for <think>",
    "[{type: format, tags: [a, a]}]": "each may be named once",
    "[{type: plugin, path: my.module.function}]": "must be package.module:function",
    "[{type: code_tests, sandbox: {kind: none}}]": "rewards.0.sandbox.kind='none': must be one of",
    "[{type: code_tests, sandbox: {memory_mb: 0}}]": "rewards.0.sandbox.memory_mb=0: must be",
    "[{type: format}, {type: format}]": "2 rewards are named 'format': give each its own name",
}


@pytest.mark.parametrize(("values", "told"), PROBLEMS.items())
def test_problems_are_told(values, told):
    with pytest.raises(ConfigError) as wrong:
        parse_rewards(parse_yaml(values, source="test"))
    assert told in str(wrong.value)


def test_two_rewards_of_one_type_have_names():
    values = "[{type: format}, {type: format, name: final, tags: [final]}]"
    config = parse_rewards(parse_yaml(values, source="test"))
    assert [reward_name(reward) for reward in config.rewards] == ["format", "final"]


def test_a_reward_of_a_command_line():
    assert reward_from_text("type=format,tags=[a, b]") == {"type": "format", "tags": ["a", "b"]}
    with pytest.raises(ConfigError, match="reward 'format'.*type=math_answer"):
        reward_from_text("format")


def test_the_reference_is_up_to_date():
    """`python -m equilibrium_mcore.config.describe` writes it."""
    document = describe.REWARDS_DOCUMENT.read_text(encoding="utf-8")
    assert describe.up_to_date(document, describe.describe_rewards) == document
    assert all(f"### `{kind}`" in document for kind in REWARD_CLASSES)
