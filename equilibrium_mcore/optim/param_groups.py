"""Which optimizer updates which parameter of a run, and why, without a run."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.files.tables import terminal_table
from equilibrium_mcore.models.parameters import build_on_meta
from equilibrium_mcore.optim.frozen import frozen_beside_adapters, frozen_names
from equilibrium_mcore.optim.parameters import layout_free_names
from equilibrium_mcore.optim.parts import part_shapes
from equilibrium_mcore.optim.treatment import Treatment, check_overrides_match, treatment_of


@dataclass(frozen=True)
class ParameterRow:
    """One parameter of the whole model; no treatment where it is frozen."""

    name: str
    shape: tuple[int, ...]
    treatment: Treatment | None
    why_frozen: str = "training.frozen"

    @property
    def parts(self) -> list[str]:
        """Maps that a matrix optimizer treats by themselves, e.g. `gate 320x1536`."""
        if self.treatment is None or not self.treatment.is_matrix:
            return []
        parts = self.treatment.parts
        if parts is None:
            return ["x".join(map(str, self.shape))]
        shapes = part_shapes(self.shape, parts)
        return [
            f"{name} {rows}x{columns}"
            for name, (rows, columns) in zip(parts.names, shapes, strict=True)
        ]

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        facts = {"name": self.name, "shape": list(self.shape), "frozen": self.treatment is None}
        if self.treatment is None:
            return {**facts, "why": self.why_frozen}
        values = asdict(self.treatment)
        values.pop("parts")
        return {**facts, "parts": self.parts, **values}


def parameter_rows(config: RunConfig) -> list[ParameterRow]:
    """Every parameter of the run's model, in the model's order.

    `accelerator.install()` must have run before this module is imported. Raises ConfigError where
    an override decides nothing, or gives a matrix optimizer what is no matrix, and for
    `training.frozen` that names nothing or everything.
    """
    optimizer = config.optimizer
    frozen = frozen_names(config.model, config.training.frozen)
    if config.adapters is not None:
        frozen = frozen_beside_adapters(config.model)
    rows = [
        ParameterRow(
            name,
            tuple(tensor.shape),
            None
            if name in frozen
            else treatment_of(name, tensor.shape, model=config.model, optimizer=optimizer),
        )
        for name, tensor in layout_free_names(build_on_meta(config.model))
    ]
    trained = [row for row in rows if row.treatment is not None]
    decided = [row.treatment.override for row in trained]
    counts = [decided.count(override.pattern) for override in optimizer.overrides]
    if config.adapters is None:
        check_overrides_match(optimizer.overrides, counts, [row.name for row in trained])
    return rows


def as_text(rows: list[ParameterRow]) -> str:
    """One line for all layers' (and experts') parameters that are treated alike, then a summary."""
    groups: dict[tuple, list[ParameterRow]] = defaultdict(list)
    for row in rows:
        name = re.sub(r"\.(layers|local_experts)\.\d+", r".\1.*", row.name)
        groups[name, row.shape, row.treatment, row.why_frozen].append(row)
    cells = []
    for (name, shape, t, why), members in groups.items():
        size = "x".join(map(str, shape))
        if t is None:
            dashes = ["-"] * 5
            cells.append((name, str(len(members)), size, *dashes, why))
            continue
        rates = f"{t.learning_rate:g}", f"{t.weight_decay:g}"
        parts = ", ".join(members[0].parts) or "-"
        cells.append((name, str(len(members)), size, t.kind, t.optimizer, *rates, parts, t.why))
    head = ("parameter", "number", "shape", "kind", "optimizer", "rate", "decay", "parts", "why")
    return "\n".join([terminal_table(head, cells), "", *_summary(rows)])


def _updated_by(row: ParameterRow) -> str:
    return "frozen" if row.treatment is None else row.treatment.optimizer


def _summary(rows: list[ParameterRow]) -> list[str]:
    total = sum(prod(row.shape) for row in rows)
    lines = []
    for name in sorted({_updated_by(row) for row in rows}):
        chosen = [row for row in rows if _updated_by(row) == name]
        elements = sum(prod(row.shape) for row in chosen)
        matrices = sum(len(row.parts) for row in chosen)
        line = f"{name}: {len(chosen):,} parameters, {elements:,} elements ({elements / total:.1%})"
        lines.append(line + (f", {matrices:,} matrices by themselves" if matrices else ""))
    return lines
