"""What is told of the models beside a policy, before anything starts."""

from __future__ import annotations

import pytest

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.training.ready import check_ready, models_beside
from tests.stages.online_support import online_run, prompts_section


def test_a_teacher_or_a_critic_that_is_not_there_is_told(data, tmp_path):
    prompts = prompts_section(data, tmp_path)
    cases = {
        "objective.teacher": {"preset": "opd", "teacher": str(tmp_path / "none")},
        "objective.critic.initial_weights": {
            "preset": "ppo",
            "critic": {"initial_weights": str(tmp_path / "none")},
        },
    }
    for key, objective in cases.items():
        stage = objective["preset"]
        rewards = {"rewards": None} if stage == "opd" else {}
        config = online_run(
            prompts,
            tmp_path / "weights",
            tmp_path / "out",
            stage=stage,
            objective=objective,
            rollout={"samples_per_prompt": 1},
            **rewards,
        )
        assert list(models_beside(config)) == [key]
        with pytest.raises(ConfigError, match=f"{key}=.*none: there is no checkpoint"):
            check_ready(config)
