"""The models that a run has beside its own: are they there, do they fit, and which are they?

Asked without building one: `--check`. A start asks again on its way.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from equilibrium_mcore.checkpoint.choose import find_weights
from equilibrium_mcore.checkpoint.opened import inspect
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.judges import reward_models
from equilibrium_mcore.config.objectives import REFERENCED
from equilibrium_mcore.config.policy import PolicyConfig
from equilibrium_mcore.config.schema import ModelConfig, RunConfig
from equilibrium_mcore.training.frozen_settings import (
    check_reward_model,
    check_same_tokenizer,
    settings_of_frozen,
)
from equilibrium_mcore.training.target_files import check_stored_targets

Say = Callable[[str], object]
Ask = Callable[[Callable[[], Any]], Any]
"""What a question returns; None where it raised ConfigError, whose problems are kept."""


def check_roles(
    config: RunConfig, *, absent: list[Path], ask: Ask, say: Say
) -> dict[str, ModelConfig]:
    """Models by what they are in the run. Those that are `absent` on this host are left out.

    Problems are kept by `ask`; `say` gets what could not be compared.
    """
    roles = {"policy": config.model, **_reference(config)}
    for role, question in _questions(config, absent, say):
        model = ask(question)
        if model is not None:
            roles[role] = model
    return roles


def models_beside(config: RunConfig) -> dict[str, Path]:
    """Weights of other models that the run loads, by the setting that names them; reward models
    apart."""
    objective = config.objective
    found = {"objective.teacher": getattr(objective, "teacher", None)}
    if isinstance(objective, PolicyConfig) and objective.critic is not None:
        found["objective.critic.initial_weights"] = objective.critic.initial_weights
    return {key: path for key, path in found.items() if path is not None}


def _questions(
    config: RunConfig, absent: list[Path], say: Say
) -> Iterator[tuple[str, Callable[[], ModelConfig | None]]]:
    """For each role, what to ask."""
    objective = config.objective
    if getattr(objective, "targets", None) not in (None, *absent):
        yield "targets", partial(check_stored_targets, config)
    elif getattr(objective, "teacher", None) not in (None, *absent):
        yield "teacher", partial(_teacher, config, say)
    if isinstance(objective, PolicyConfig) and objective.critic is not None:
        yield "critic", partial(_critic, config, objective.critic.initial_weights, absent)
    for key, weights in reward_models(config):
        if weights not in absent:
            yield key, partial(_reward_model, config, key, weights)


def _teacher(config: RunConfig, say: Say) -> ModelConfig:
    opened = inspect(
        find_weights(config.objective.teacher, key="objective.teacher"), needs_state=False
    )
    wanted, _ = settings_of_frozen(opened, config=config)
    if (unknown := check_same_tokenizer(opened, config)) is not None:
        say(unknown)
    return wanted.model


def _critic(config: RunConfig, weights: Path | None, absent: list[Path]) -> ModelConfig:
    """Of the policy's shape, whatever it starts from."""
    if weights is not None and weights not in absent:
        key = "objective.critic.initial_weights"
        size = inspect(find_weights(weights, key=key), needs_state=False).config.model.vocab_size
        if size != config.model.vocab_size:
            raise ConfigError(
                f"{key}={weights}: its model.vocab_size={size}, and the run's is "
                f"{config.model.vocab_size}: both must read the same tokens"
            )
    return config.model.model_copy(update={"head": "scalar"})


def _reward_model(config: RunConfig, key: str, weights: Path) -> ModelConfig:
    opened = inspect(find_weights(weights, key=key), needs_state=False)
    check_reward_model(opened, config, key=key)
    return settings_of_frozen(opened, config=config)[0].model


def _reference(config: RunConfig) -> dict[str, ModelConfig]:
    """The frozen copy of the run's own weights that some objectives compare with."""
    referenced = isinstance(config.objective, REFERENCED)
    referenced |= isinstance(config.objective, PolicyConfig) and config.objective.needs_reference
    copied = referenced and config.adapters is None
    return {"reference": config.model} if copied else {}
