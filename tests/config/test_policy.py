"""Settings of the policy gradient: presets, what is laid over them, what does not fit together."""

from __future__ import annotations

import pytest

from equilibrium_mcore.config.policy import PRESETS, PolicyConfig


def read(**values: object) -> PolicyConfig:
    return PolicyConfig.model_validate(values)


def test_a_preset_is_defaults_and_what_is_set_is_laid_over_it():
    config = read(preset="dapo", kl={"coefficient": 0.01})
    assert (config.clip_low, config.clip_high, config.reduction) == (0.2, 0.28, "token_mean")
    assert (config.kl.coefficient, config.kl.estimator, config.kl.place) == (0.01, "k1", "reward")
    assert read() == read(preset="grpo")
    assert read(preset="ppo").critic is not None and read(preset="ppo").needs_reference
    assert not read(preset="dapo").needs_reference


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_that_is_written_out_is_the_same(name):
    config = read(preset=name)
    assert read(**config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"preset": "grp"}, "preset"),
        ({"reduction": "constant_length"}, "needs constant_length"),
        ({"advantage": "gae", "scale": "batch"}, "set critic"),
        ({"critic": {}}, "set critic: null"),
        ({"truncated": "bootstrap"}, "critic's values"),
        ({"advantage": "batch"}, "scale to batch or none"),
        ({"clip_low": 1.0}, "below 1"),
        ({"preset": "gspo", "surrogate": "cispo"}, "ratio: token"),
        ({"mismatch": {"low": 3.0}}, "low=3 must be below high=2"),
        ({"kl": {"coefficient": 0.0, "controller": "adaptive"}}, "stays 0"),
        ({"tracker": {"low": 1.0}}, "high=1 must be above low=1"),
        ({"tracker": {"keep_least": 0.99}}, "at most keep_most=0.96"),
    ],
)
def test_what_does_not_fit_together_is_told(values, said):
    with pytest.raises(ValueError, match=said):
        read(**values)
