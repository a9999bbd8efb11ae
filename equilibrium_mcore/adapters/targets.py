"""Which linear layers get an adapter, and why the others get none."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from fnmatch import fnmatchcase
from typing import Literal

import torch

from equilibrium_mcore.adapters.names import EXPERT, WEIGHT
from equilibrium_mcore.config.adapters import LoraConfig
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.installation import command
from equilibrium_mcore.config.schema import ModelConfig
from equilibrium_mcore.models.parameters import build_on_meta
from equilibrium_mcore.optim.parameters import EMBEDDING, OUTPUT, layout_free_names

Split = Literal["column", "row", "duplicated"]

# megatron-core's classes, and those over Transformer Engine, by name: the latter may be absent. The
# first in a class's order of bases decides.
_SPLITS: dict[str, Split] = {
    "ColumnParallelLinear": "column",
    "TEColumnParallelLinear": "column",
    "RowParallelLinear": "row",
    "TERowParallelLinear": "row",
    "TELinear": "duplicated",
}


@dataclass(frozen=True)
class Linear:
    """A linear layer of this rank's model."""

    name: str  # the same in every layout, e.g. decoder.layers.3.mixer.in_proj
    module: torch.nn.Module
    split: Split  # what a tensor-parallel rank holds: rows, columns, or all

    @property
    def is_expert(self) -> bool:
        """Whether it belongs to one routed expert."""
        return EXPERT in self.name


@dataclass(frozen=True)
class Coverage:
    """A matrix of the whole model that tokens are multiplied with: adapted or not, and why."""

    name: str
    is_adapted: bool
    why: str


def linears_of(chunk: torch.nn.Module) -> list[Linear]:
    """The linear layers of a model chunk, in its order; tables, routers and the output are none."""
    names = {
        id(tensor): name
        for (name, _), (_, tensor) in zip(
            layout_free_names(chunk), chunk.named_parameters(), strict=True
        )
    }
    found = []
    for module in chunk.modules():
        split = next(
            (_SPLITS[c.__name__] for c in type(module).__mro__ if c.__name__ in _SPLITS), ""
        )
        weight = getattr(module, "weight", None)
        name = names.get(id(weight))
        if split and name is not None and name not in (EMBEDDING, OUTPUT):
            found.append(Linear(name.removesuffix(WEIGHT), module, split))
    return found


def is_target(name: str, settings: LoraConfig) -> bool:
    """Whether the linear layer of this layout-free name gets an adapter."""
    if EXPERT in name and not settings.experts:
        return False
    return any(fnmatchcase(name, pattern) for pattern in settings.targets)


def coverage(model: ModelConfig, settings: LoraConfig) -> list[Coverage]:
    """Every matrix of `model` with the reason why it has an adapter, or has none.

    Raises ConfigError for a target that names no linear layer, and where nothing is named.
    """
    chunk = build_on_meta(model)
    linears = {linear.name for linear in linears_of(chunk)}
    problems = list(_unmatched(linears, settings))
    if problems:
        raise ConfigError(problems)
    return [
        _covered(name.removesuffix(WEIGHT), linears, settings)
        for name, tensor in layout_free_names(chunk)
        if tensor.dim() == 2 and name.endswith(WEIGHT)
    ]


def _covered(name: str, linears: set[str], settings: LoraConfig) -> Coverage:
    if name not in linears:
        return Coverage(name, False, "no linear layer: tokens look up, or choose among, its rows")
    if EXPERT in name and not settings.experts:
        return Coverage(name, False, "of a routed expert: adapters.experts=true adapts them")
    for pattern in settings.targets:
        if fnmatchcase(name, pattern):
            return Coverage(name, True, f"adapters.targets: {pattern}")
    return Coverage(name, False, "no pattern of adapters.targets names it")


def _unmatched(linears: set[str], settings: LoraConfig) -> Iterator[str]:
    """Patterns that adapt nothing."""
    allowed = [name for name in linears if settings.experts or EXPERT not in name]
    for pattern in settings.targets or [""]:
        if any(fnmatchcase(name, pattern) for name in allowed):
            continue
        near = ", ".join(sorted(get_close_matches(pattern, allowed, n=2, cutoff=0.0)))
        text = f"adapters.targets: pattern {pattern!r} names no linear layer"
        if any(fnmatchcase(name, pattern) for name in linears):
            yield f"{text} but those of routed experts: set adapters.experts=true, or take it out"
        else:
            yield f"{text}; use * for any text, and the names that `{command('groups')}` prints, "
            f"without .weight, e.g. {near}"
