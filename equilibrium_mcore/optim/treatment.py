"""What happens to one parameter: the table's row, with the run's overrides on top."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.installation import command
from equilibrium_mcore.config.optimizers import (
    OPTIMIZERS,
    REST,
    OptimizerConfig,
    OverrideConfig,
)
from equilibrium_mcore.config.schema import ModelConfig
from equilibrium_mcore.optim.parts import Parts
from equilibrium_mcore.optim.table import rule_for

# AdamW decays only tables whose scale nothing else holds, and matrices where it updates them.
DECAYED_KINDS = ("embedding", "output", "router", "matrix")


@dataclass(frozen=True)
class Treatment:
    """How a parameter is updated, and why."""

    kind: str  # of optim.table
    optimizer: str  # a row of config.optimizers
    learning_rate: float  # peak
    weight_decay: float
    parts: Parts | None  # maps that a matrix optimizer treats one by one; None for a single one
    why: str
    override: str | None = None  # the pattern that changed the table's choice

    @property
    def is_matrix(self) -> bool:
        """Whether an optimizer of whole matrices updates it."""
        return OPTIMIZERS[self.optimizer].takes_matrices


def treatment_of(
    name: str, shape: Sequence[int], *, model: ModelConfig, optimizer: OptimizerConfig
) -> Treatment:
    """The treatment of parameter `name` (its layout-free name).

    Raises KeyError where the table has no row, ConfigError where an override gives a matrix
    optimizer something that is no matrix.
    """
    rule = rule_for(name, model)
    override = _override_for(name, optimizer.overrides)
    chosen = optimizer.matrices if rule.kind == "matrix" else REST
    parts = rule.parts(model) if rule.parts else None
    why = rule.why
    if override is not None:
        chosen = override.optimizer or chosen
        parts = None if override.split is False else parts
        why = f"optimizer.overrides: {override.pattern}"
    if OPTIMIZERS[chosen].takes_matrices and len(shape) != 2:
        raise ConfigError(
            f"optimizer.overrides: {override.pattern!r} gives {name} to {chosen}, which "
            f"updates matrices, but its shape is {tuple(shape)}: use optimizer: {REST}, or a "
            "narrower pattern"
        )
    rate, decay = _rate_and_decay(chosen, rule.kind, optimizer)
    if override is not None:
        rate = override.learning_rate or rate
        decay = decay if override.weight_decay is None else override.weight_decay
    pattern = override.pattern if override is not None else None
    return Treatment(rule.kind, chosen, rate, decay, parts, why, pattern)


def _override_for(name: str, overrides: Iterable[OverrideConfig]) -> OverrideConfig | None:
    return next((o for o in overrides if fnmatchcase(name, o.pattern)), None)


def _rate_and_decay(chosen: str, kind: str, optimizer: OptimizerConfig) -> tuple[float, float]:
    if chosen != REST:
        section = getattr(optimizer, chosen)
        return section.learning_rate, section.weight_decay
    adamw = optimizer.adamw
    rate = adamw.learning_rates.get(kind, adamw.learning_rate)
    return rate, adamw.weight_decay if kind in DECAYED_KINDS else 0.0


def check_overrides_match(
    overrides: Sequence[OverrideConfig], counts: Sequence[int], names: Sequence[str]
) -> None:
    """Raise ConfigError for every override that decides nothing.

    Args:
        counts: how many parameters of the whole model each override decided.
        names: parameters that this rank knows, for a hint.
    """
    problems = []
    for override, count in zip(overrides, counts, strict=True):
        if count == 0:
            near = get_close_matches(override.pattern, names, n=1, cutoff=0.0)
            hint = f", e.g. {near[0]}" if near else ""
            problems.append(
                f"optimizer.overrides: pattern {override.pattern!r} decides no parameter (none has "
                "such a name, an earlier pattern takes them all, or training.frozen does): use * "
                f"for any text and the names that `{command('groups')}` prints{hint}"
            )
    if problems:
        raise ConfigError(problems)
