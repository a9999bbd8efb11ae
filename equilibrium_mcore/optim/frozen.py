"""Parameters that do not train, by `training.frozen`: the same ones in every layout."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

import torch

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.installation import command
from equilibrium_mcore.config.schema import ModelConfig, RunConfig
from equilibrium_mcore.models.heads import SCALAR_HEAD_WEIGHT
from equilibrium_mcore.models.parameters import build_on_meta
from equilibrium_mcore.optim.parameters import EMBEDDING, OUTPUT, layout_free_names

BIAS = "expert_bias"  # of the router: a buffer, which no gradient moves


def frozen_names(model: ModelConfig, patterns: Sequence[str]) -> frozenset[str]:
    """Layout-free names of the parameters of `model` that the patterns name; no rank is asked.

    Raises ConfigError for a pattern that names none, where nothing is left to train, and for what
    some backend could not train beside what is frozen: a matrix's bias, other experts of a layer.
    """
    if not patterns:
        return frozenset()
    names = [name for name, _ in layout_free_names(build_on_meta(model))]
    frozen = frozenset(n for n in names if any(fnmatchcase(n, p) for p in patterns))
    problems = [
        *(_unmatched(p, names) for p in patterns if not any(fnmatchcase(n, p) for n in names)),
        *_biases_beside_frozen_matrices(names, frozen),
        *_experts_apart(names, frozen),
    ]
    if len(frozen) == len(names):
        problems.append(
            f"training.frozen={list(patterns)} names all {len(names):,} parameters, and nothing is "
            "left to train: take out a pattern, or narrow one"
        )
    if problems:
        raise ConfigError(problems)
    return frozen


def frozen_beside_adapters(model: ModelConfig) -> frozenset[str]:
    """Layout-free names of all parameters of `model` but a scalar head's, which is new."""
    names = {name for name, _ in layout_free_names(build_on_meta(model))}
    return frozenset(names - {SCALAR_HEAD_WEIGHT})


def check_optimizer_state(saved: RunConfig, wanted: RunConfig, *, checkpoint: str) -> None:
    """Raise ConfigError where a parameter is to train whose optimizer state was not saved.

    More may be frozen than before: what is saved of them beside the weights is not read.
    """
    thawed = frozen_names(saved.model, saved.training.frozen) - frozen_names(
        wanted.model, wanted.training.frozen
    )
    if thawed:
        raise ConfigError(
            f"training.frozen={wanted.training.frozen} lets {len(thawed):,} parameters train that "
            f"the checkpoint's {saved.training.frozen} held, e.g. {min(thawed)}: it has no "
            "optimizer state for them. Put the patterns back, or start a new run in another "
            f"output_directory with checkpoint.initial_weights={checkpoint}",
            source=f"resuming from {checkpoint}",
        )


def freeze(
    module: torch.nn.Module, frozen: frozenset[str], *, model: ModelConfig, recomputes: bool
) -> None:
    """Let the parameters of this rank's chunk that are `frozen` ask for no gradient.

    Before DDP wraps it, so that they take no place in its buffers. `recomputes`: activations are
    computed again in backward, which megatron-core does only for what depends on a tensor that
    asks for a gradient. The embedding's output then asks for one, frozen or not.
    """
    if not frozen:
        return
    for name, tensor in layout_free_names(module):
        # A tied table's copy on the last pipeline stage is the same parameter.
        is_copy = model.tie_embeddings and name == OUTPUT
        if (EMBEDDING if is_copy else name) in frozen:
            tensor.requires_grad_(False)
    if recomputes and EMBEDDING in frozen and getattr(module, "embedding", None) is not None:
        module.embedding.register_forward_hook(_ask_for_gradient)


def _ask_for_gradient(module: torch.nn.Module, arguments: object, output: torch.Tensor) -> None:
    if torch.is_grad_enabled():
        output.requires_grad_(True)


def _unmatched(pattern: str, names: Sequence[str]) -> str:
    literal = pattern.replace("*", "")
    near = get_close_matches(literal, names, n=3, cutoff=0.4)
    near = ", ".join(near or get_close_matches(literal, names, n=1, cutoff=0.0))
    text = f"training.frozen: pattern {pattern!r} names no parameter; use * for any text"
    if BIAS in pattern:
        return (
            f"{text}. The router's {BIAS} is none, since no gradient moves it: to hold it, set "
            "model.moe.expert_bias_update_rate=0"
        )
    return f"{text}, and the names that `{command('groups')}` prints, e.g. {near}"


def _biases_beside_frozen_matrices(names: Sequence[str], frozen: frozenset[str]) -> Iterator[str]:
    """megatron-core's linear layer with a frozen weight gives its bias no gradient."""
    silent = [
        name
        for name in names
        if name.endswith(".bias")
        and name not in frozen
        and f"{name.removesuffix('.bias')}.weight" in frozen
    ]
    if silent:
        yield (
            f"training.frozen names {silent[0].removesuffix('.bias')}.weight and not {silent[0]} "
            f"({len(silent)} such): beside a frozen matrix a bias gets no gradient; freeze both, "
            "or neither"
        )


def _experts_apart(names: Sequence[str], frozen: frozenset[str]) -> Iterator[str]:
    """Transformer Engine multiplies a layer's experts at once, by the first one's requires_grad."""
    layers: dict[str, set[str]] = defaultdict(set)
    for name in names:
        together, count = re.subn(r"local_experts\.\d+", "local_experts.*", name)
        if count:
            layers[together].add(name)
    for together, members in layers.items():
        held = members & frozen
        if held and held != members:
            yield (
                f"training.frozen names {len(held)} of the {len(members)} experts' {together}, e.g."
                f" {min(held)}: the experts of a layer are frozen together, or none of them"
            )
            return
