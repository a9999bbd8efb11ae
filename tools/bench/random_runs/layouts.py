"""A random layout of few ranks, by short names, and the same as a run's own settings."""

from __future__ import annotations

import math
import random
from typing import Any

from equilibrium_mcore.certify.twin import parse_layout
from equilibrium_mcore.config.layout import DIMENSIONS
from equilibrium_mcore.config.schema import ParallelismConfig

MAX_RANKS = 4
NAMES = (*(row.short for row in DIMENSIONS.values() if row.short != "vpp"), "dp")
DENSE = (*(row.short for row in DIMENSIONS.values() if row.splits_model), "dp")
EXPERTS = [row.short for row in DIMENSIONS.values() if row.splits_experts]


def random_layout(rng: random.Random) -> dict[str, int]:
    """Sizes by short name, on 2 to MAX_RANKS ranks."""
    while True:
        sizes = {name: rng.choice((1, 1, 2)) for name in NAMES}
        if rng.random() < 0.15:
            sizes[rng.choice(tuple(sizes))] = 4
        if sizes["pp"] > 1:
            sizes["vpp"] = rng.choice((1, 1, 2))
        dense = math.prod(sizes[name] for name in DENSE)
        experts = math.prod(sizes[name] for name in EXPERTS)
        small = dense < MAX_RANKS and rng.random() < 0.5  # rather more ranks than fewer
        if 1 < dense <= MAX_RANKS and dense % experts == 0 and not small:
            break
    layout = {name: size for name, size in sizes.items() if size > 1}
    if layout.get("tp", 1) > 1 and rng.random() < 0.2:
        layout["sp"] = 0
    return layout


def own_layout(text: str, parallelism: dict[str, Any]) -> dict[str, Any]:
    """The layout as the run's own, so that the rules see it with the run's sizes too."""
    layout = parse_layout(text, base=ParallelismConfig(**parallelism))
    return {**ParallelismConfig().model_dump(), **layout.settings, "world_size": layout.world_size}
