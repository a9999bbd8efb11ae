"""What a run with adapters trains, and why every other matrix has none; without a run."""

from __future__ import annotations

from dataclasses import replace

from equilibrium_mcore.adapters.names import ADAPTER, WEIGHT
from equilibrium_mcore.adapters.targets import coverage
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.optim.param_groups import ParameterRow
from equilibrium_mcore.optim.treatment import treatment_of


def with_adapters(rows: list[ParameterRow], config: RunConfig) -> list[ParameterRow]:
    """The rows of the frozen model with the factors of its adapters, and why a matrix has none.

    Rows of a run without adapters are given back as they are.

    Raises ConfigError for a target that names no linear layer.
    """
    if config.adapters is None:
        return rows
    covered = {entry.name: entry for entry in coverage(config.model, config.adapters)}
    found = []
    for row in rows:
        entry = covered.get(row.name.removesuffix(WEIGHT))
        if entry is None:
            found.append(replace(row, why_frozen="adapters: no matrix"))
            continue
        found.append(replace(row, why_frozen=entry.why))
        if entry.is_adapted:
            found += _factors(entry.name, row.shape, config)
    return found


def _factors(name: str, shape: tuple[int, ...], config: RunConfig) -> list[ParameterRow]:
    outputs, inputs = shape
    rank = config.adapters.rank
    return [
        ParameterRow(
            factor, size, treatment_of(factor, size, model=config.model, optimizer=config.optimizer)
        )
        for factor, size in (
            (f"{name}.{ADAPTER}.A", (rank, inputs)),
            (f"{name}.{ADAPTER}.B", (outputs, rank)),
        )
    ]
