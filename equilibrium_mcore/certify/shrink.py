"""A model in small: every kind of layer and every cut, at widths that a laptop multiplies."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.pattern import (
    CUT,
    ByKind,
    balanced_cuts,
    count_kinds,
    cut_into,
    layers_of,
)
from equilibrium_mcore.config.schema import (
    AttentionConfig,
    MambaConfig,
    MLAConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
)


def shrink_model(
    model: ModelConfig, *, stages: int, largest: dict[str, int], run_tensor: int = 1
) -> dict:
    """The model's section in small, divided by `largest` (sizes by dimension) as before.

    `run_tensor` are the tensor ranks of the run itself: more of them than key/value heads share
    one, and so they do in small.
    """
    values = model.model_dump(mode="json")
    tensor, context = largest["tensor"], largest["context"]
    ranks = tensor * context
    values.update(
        name=f"{model.name}_twin",
        layer_pattern=shrink_pattern(model.layer_pattern, stages),
        hidden_size=64,
        vocab_size=250,  # padded, so that rows beyond the vocabulary are there too
        vocab_size_multiple=math.lcm(64, tensor),
    )
    sizes = Sizes(tensor=tensor, ranks=ranks, run_tensor=run_tensor, largest=largest)
    for kind in count_kinds(model.layer_pattern):
        values[kind].update(TWINS[kind](getattr(model, kind), sizes))
    return values


class Sizes(NamedTuple):
    """The layouts that a twin must fit."""

    tensor: int  # the largest of all layouts
    ranks: int  # tensor times context ranks, both the largest
    run_tensor: int  # of the run itself
    largest: dict[str, int]  # of every dimension


def _mamba_twin(mamba: MambaConfig, sizes: Sizes) -> dict[str, Any]:
    ratio = min(2, mamba.num_heads // mamba.num_groups)
    # Fewer groups than ranks are repeated over CP ranks: another path, kept where it is taken.
    # Two groups on a rank, where there are several: one alone cannot show a norm over both.
    several = 2 if mamba.num_groups >= 2 * sizes.ranks else 1
    groups = sizes.tensor if mamba.num_groups < sizes.ranks else several * sizes.ranks
    heads = math.lcm(groups * ratio, sizes.ranks)
    return dict(num_heads=heads, head_dim=16, state_dim=16, num_groups=groups, chunk_size=16)


def _attention_twin(attention: AttentionConfig, sizes: Sizes) -> dict[str, Any]:
    ratio = min(2, attention.num_heads // attention.num_query_groups)
    groups, tensor = attention.num_query_groups, sizes.tensor
    if groups < max(tensor, sizes.run_tensor):
        groups = max(1, tensor * groups // max(tensor, sizes.run_tensor))
    else:
        groups = sizes.ranks if groups >= sizes.ranks else tensor
    heads = math.lcm(groups * ratio, sizes.ranks)
    return dict(num_heads=heads, num_query_groups=groups, head_dim=16)


def _mla_twin(mla: MLAConfig, sizes: Sizes) -> dict[str, Any]:
    return dict(
        num_heads=max(2, sizes.ranks),
        q_lora_rank=None if mla.q_lora_rank is None else _up(32, sizes.tensor),
        kv_lora_rank=_up(32 + 8, sizes.tensor) - 8,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=16 if mla.v_head_dim == mla.qk_nope_head_dim else 24,
    )


def _mlp_twin(mlp: MLPConfig, sizes: Sizes) -> dict[str, Any]:
    return dict(ffn_hidden_size=_up(96, sizes.tensor))


def _moe_twin(moe: MoEConfig, sizes: Sizes) -> dict[str, Any]:
    experts = max(2 * sizes.largest["expert"], min(moe.num_experts, 8))
    return dict(
        num_experts=experts,
        top_k=experts if moe.top_k == moe.num_experts else min(moe.top_k, experts // 2),
        expert_ffn_hidden_size=_up(32, sizes.largest["expert_tensor"]),
        shared_ffn_hidden_size=_up(64, sizes.tensor) if moe.shared_ffn_hidden_size else 0,
    )


TWINS: ByKind[Callable[[Any, Sizes], dict[str, Any]]] = {
    "mamba": _mamba_twin,
    "mla": _mla_twin,
    "attention": _attention_twin,
    "mlp": _mlp_twin,
    "moe": _moe_twin,
}
"""A kind's section in small, from the section: what it leaves out stays as it is."""


def _up(size: int, unit: int) -> int:
    """The least multiple of `unit` that is at least `size`."""
    return -(-size // unit) * unit


def shrink_pattern(pattern: str, stages: int) -> str:
    """`stages` segments that each keep one layer of every kind which their stage has, in order."""
    try:
        cut = cut_into(pattern, stages)
    except ValueError:
        cut = balanced_cuts(pattern, stages)
    segments = ["".join(dict.fromkeys(segment)) for segment in cut.split(CUT)]
    if len(segments) != stages:
        raise ConfigError(
            f"model.layer_pattern={pattern!r} cannot be cut into {stages} stages: it has "
            f"{len(layers_of(pattern))} layers"
        )
    return CUT.join(segments)
