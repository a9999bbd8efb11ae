"""The optimizer of a twin: the run's, without what would hide a fault of a layout."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from equilibrium_mcore.config.optimizers import ByOptimizer
from equilibrium_mcore.config.pattern import ByKind, layers_of
from equilibrium_mcore.config.schema import ModelConfig, RunConfig


def shrink_optimizer(config: RunConfig, twin: dict) -> dict:
    """The optimizer's section for the twin, whose model's section is `twin`."""
    values = config.optimizer.model_dump(mode="json")
    values["schedule"] = {"kind": "constant"}
    for name, settings in TWIN_OPTIMIZERS.items():
        values[name].update(settings(config, twin))
    values["overrides"] = _shrink_overrides(config, twin["layer_pattern"])
    return values


def _soap_twin(config: RunConfig, twin: dict) -> dict[str, Any]:
    settings: dict[str, Any] = {"basis_interval_steps": 2}  # renewed within the few steps
    if config.optimizer.soap.max_dimension < longest_side(config.model):
        settings["max_dimension"] = twin["hidden_size"]  # sides beyond it are there too
    return settings


def _sharp_products(config: RunConfig, twin: dict) -> dict[str, Any]:
    """Products in bfloat16 would hide a fault below their rounding."""
    return {"matmul_precision": "highest"}


TWIN_OPTIMIZERS: ByOptimizer[Callable[[RunConfig, dict], dict[str, Any]]] = {
    "muon": _sharp_products,
    "soap": _soap_twin,
    "cosmos": _sharp_products,
    "adamw": lambda config, twin: {},
}
"""What an optimizer's section changes in small, from the run and the twin's model."""


def longest_side(model: ModelConfig) -> int:
    """Rows or columns of the model's longest weight matrix between two features, about."""
    sides = (
        side(getattr(model, kind))
        for kind, side in LONGEST_SIDES.items()
        if getattr(model, kind) is not None
    )
    return max([model.hidden_size, *sides])


LONGEST_SIDES: ByKind[Callable[[Any], int]] = {
    "mamba": lambda mamba: 2 * mamba.num_heads * mamba.head_dim,
    "mla": lambda mla: mla.num_heads * (mla.qk_nope_head_dim + mla.v_head_dim),
    "attention": lambda attention: attention.num_heads * attention.head_dim,
    "mlp": lambda mlp: mlp.ffn_hidden_size,
    "moe": lambda moe: max(moe.expert_ffn_hidden_size, moe.shared_ffn_hidden_size),
}
"""The longest side of a kind's matrices, from its section."""


def _shrink_overrides(config: RunConfig, pattern: str) -> list[dict]:
    """Overrides by the twin's names: a layer's is that of its first layer of the same kind.

    Of several for one place only the first is kept, which decides there.
    """
    layers, small = layers_of(config.model.layer_pattern), layers_of(pattern)
    experts = config.model.moe.num_experts if config.model.moe else 1

    def layer(match: re.Match) -> str:
        number = int(match.group(1))
        return f".layers.{small.index(layers[number])}." if number < len(layers) else match.group()

    kept: dict[str, dict] = {}
    for override in config.optimizer.overrides:
        values = override.model_dump(mode="json")
        name = re.sub(r"\.layers\.(\d+)\.", layer, override.pattern)
        if experts > 1:
            name = re.sub(r"\.local_experts\.\d+\.", ".local_experts.0.", name)
        kept.setdefault(name, values | {"pattern": name})
    return list(kept.values())
