"""A model in small: every kind of layer and every cut, at widths that a laptop multiplies."""

from __future__ import annotations

import math
import re

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.pattern import CUT, balanced_cuts, cut_into, layers_of
from equilibrium_mcore.config.schema import ModelConfig, RunConfig


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
    used = set(layers_of(model.layer_pattern))
    if "M" in used:
        mamba = model.mamba
        ratio = min(2, mamba.num_heads // mamba.num_groups)
        # Fewer groups than ranks are repeated over CP ranks: another path, kept where it is taken.
        # Two groups on a rank, where there are several: one alone cannot show a norm over both.
        several = 2 if mamba.num_groups >= 2 * ranks else 1
        groups = tensor if mamba.num_groups < ranks else several * ranks
        heads = math.lcm(groups * ratio, ranks)
        values["mamba"].update(
            num_heads=heads, head_dim=16, state_dim=16, num_groups=groups, chunk_size=16
        )
    if "*" in used:
        attention = model.attention
        ratio = min(2, attention.num_heads // attention.num_query_groups)
        groups = attention.num_query_groups
        if groups < max(tensor, run_tensor):
            groups = max(1, tensor * groups // max(tensor, run_tensor))
        else:
            groups = ranks if groups >= ranks else tensor
        values["attention"].update(
            num_heads=math.lcm(groups * ratio, ranks), num_query_groups=groups, head_dim=16
        )
    if "+" in used:
        values["mla"].update(
            num_heads=max(2, ranks),
            q_lora_rank=None if model.mla.q_lora_rank is None else _up(32, tensor),
            kv_lora_rank=_up(32 + 8, tensor) - 8,
            qk_nope_head_dim=16,
            qk_rope_head_dim=8,
            v_head_dim=16 if model.mla.v_head_dim == model.mla.qk_nope_head_dim else 24,
        )
    if "-" in used:
        values["mlp"].update(ffn_hidden_size=_up(96, tensor))
    if "E" in used:
        moe = model.moe
        experts = max(2 * largest["expert"], min(moe.num_experts, 8))
        values["moe"].update(
            num_experts=experts,
            top_k=experts if moe.top_k == moe.num_experts else min(moe.top_k, experts // 2),
            expert_ffn_hidden_size=_up(32, largest["expert_tensor"]),
            shared_ffn_hidden_size=_up(64, tensor) if moe.shared_ffn_hidden_size else 0,
        )
    return values


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


def shrink_optimizer(config: RunConfig, twin: dict) -> dict:
    """The optimizer's section for the twin, whose model's section is `twin`."""
    values = config.optimizer.model_dump(mode="json")
    values["schedule"] = {"kind": "constant"}
    # Products in bfloat16 would hide a fault below their rounding.
    for name in ("muon", "cosmos"):
        values[name]["matmul_precision"] = "highest"
    values["soap"]["basis_interval_steps"] = 2  # renewed within the few steps
    if values["soap"]["max_dimension"] < longest_side(config.model):
        values["soap"]["max_dimension"] = twin["hidden_size"]  # sides beyond it are there too
    values["overrides"] = _shrink_overrides(config, twin["layer_pattern"])
    return values


def longest_side(model: ModelConfig) -> int:
    """Rows or columns of the model's longest weight matrix between two features, about."""
    sides = [model.hidden_size]
    if model.mamba:
        sides.append(2 * model.mamba.num_heads * model.mamba.head_dim)
    if model.attention:
        sides.append(model.attention.num_heads * model.attention.head_dim)
    if model.mla:
        sides.append(model.mla.num_heads * (model.mla.qk_nope_head_dim + model.mla.v_head_dim))
    if model.mlp:
        sides.append(model.mlp.ffn_hidden_size)
    return max(sides)


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
