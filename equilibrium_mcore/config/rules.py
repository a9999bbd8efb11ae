"""All rules that tie several settings together, as one table, and the functions that run it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from equilibrium_mcore.config.adapter_rules import ADAPTER_RULES
from equilibrium_mcore.config.distillation_rules import DISTILLATION_RULES
from equilibrium_mcore.config.fused_rules import FUSED_RULES
from equilibrium_mcore.config.http_engine_rules import HTTP_ENGINE_RULES
from equilibrium_mcore.config.layout_rules import LAYOUT_RULES
from equilibrium_mcore.config.model_rules import MODEL_RULES
from equilibrium_mcore.config.online_rules import ONLINE_RULES
from equilibrium_mcore.config.rule_kit import Host, Rule, Subject
from equilibrium_mcore.config.schema import ModelConfig, RunConfig
from equilibrium_mcore.config.sizes import SIZE_RULES
from equilibrium_mcore.config.stages import STAGE_RULES
from equilibrium_mcore.config.training_rules import TRAINING_RULES

RULES: list[Rule] = [
    *MODEL_RULES,
    *LAYOUT_RULES,
    *SIZE_RULES,
    *TRAINING_RULES,
    *FUSED_RULES,
    *STAGE_RULES,
    *DISTILLATION_RULES,
    *ADAPTER_RULES,
    *ONLINE_RULES,
    *HTTP_ENGINE_RULES,
]

__all__ = ["RULES", "Host", "check", "check_model", "check_sections"]


def check(
    config: RunConfig, *, world_size: int | None = None, host: Host | None = None
) -> list[str]:
    """Every broken rule, in words; empty when the run can start.

    `world_size` is what a launcher started (None: see `layout.resolve_world_size`). Rules about
    the machine are asked only when `host` is given.
    """
    sections = {name: getattr(config, name) for name in RunConfig.model_fields}
    return check_sections(sections, world_size=world_size, host=host)


def check_model(model: ModelConfig) -> list[str]:
    """Every broken rule of a model by itself."""
    return check_sections({"model": model})


def check_sections(
    sections: Mapping[str, Any], *, world_size: int | None = None, host: Host | None = None
) -> list[str]:
    """Broken rules among the sections that are there; a rule that needs another is skipped."""
    subject = Subject(RunConfig.model_construct(**sections), world_size, host)
    there = sections.keys()
    return [problem for rule in RULES if rule.needs <= there for problem in rule.function(subject)]
