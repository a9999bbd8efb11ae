"""What a layout splits, and FP8 multiplies, in each kind of layer: a row per kind.

The rows are pure: they are asked only for kinds that a model uses (`layout_rules.py`,
`training_rules.py`), and give numbers or messages.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from equilibrium_mcore.config.layout import divisors
from equilibrium_mcore.config.pattern import ByKind
from equilibrium_mcore.config.rule_kit import choices
from equilibrium_mcore.config.schema import ModelConfig, ParallelismConfig


class Quantity(NamedTuple):
    """A number of the model that a parallel dimension splits."""

    key: str
    value: int
    why: str


# ------------------------------------------------------------------------------ tensor parallelism


def _heads(model: ModelConfig, kind: str) -> Quantity:
    heads = getattr(model, kind).num_heads
    return Quantity(f"model.{kind}.num_heads", heads, "whole heads on each TP rank")


def _mamba_tensor(model: ModelConfig) -> list[Quantity]:
    groups = model.mamba.num_groups
    return [
        _heads(model, "mamba"),
        Quantity("model.mamba.num_groups", groups, "whole groups on each TP rank"),
    ]


def _mlp_tensor(model: ModelConfig) -> list[Quantity]:
    width = model.mlp.ffn_hidden_size
    return [Quantity("model.mlp.ffn_hidden_size", width, "split over TP ranks")]


def _moe_tensor(model: ModelConfig) -> list[Quantity]:
    width = model.moe.shared_ffn_hidden_size
    key = "model.moe.shared_ffn_hidden_size"
    return [Quantity(key, width, "split over TP ranks")] if width else []


TENSOR_SPLITS: ByKind[Callable[[ModelConfig], list[Quantity]]] = {
    "mamba": _mamba_tensor,
    "attention": lambda model: [_heads(model, "attention")],
    "mla": lambda model: [_heads(model, "mla")],
    "mlp": _mlp_tensor,
    "moe": _moe_tensor,
}
"""What tensor parallelism must divide."""

# ----------------------------------------------------------------------------- context parallelism


def _mamba_context(model: ModelConfig, p: ParallelismConfig) -> Iterator[str]:
    """megatron-core's MambaContextParallel: heads of a TP rank are dealt to the CP ranks."""
    mamba = model.mamba
    if mamba.num_heads % p.tensor or mamba.num_groups % p.tensor:
        return  # tensor_divides speaks
    heads, groups = mamba.num_heads // p.tensor, mamba.num_groups // p.tensor
    allowed = [c for c in divisors(heads) if groups % c == 0 or c % groups == 0]
    if heads % p.context:
        yield (
            f"parallelism.context={p.context} does not divide model.mamba.num_heads="
            f"{mamba.num_heads} / tensor={p.tensor} = {heads} (whole heads on each CP rank): use "
            f"{choices(allowed)}"
        )
    if groups % p.context and p.context % groups:
        yield (
            f"parallelism.context={p.context} neither divides nor is a multiple of "
            f"model.mamba.num_groups={mamba.num_groups} / tensor={p.tensor} = {groups} (groups "
            f"are split, or repeated, over CP ranks): use {choices(allowed)}"
        )


def _attention_context(model: ModelConfig, p: ParallelismConfig, *, kind: str) -> Iterator[str]:
    """Attention trades sequence for heads over the CP ranks (all-to-all), as Mamba does.

    Key/value heads that do not divide are repeated, so only query heads have to.
    """
    heads = getattr(model, kind).num_heads
    local = heads // p.tensor
    if local and local % p.context:
        yield (
            f"parallelism.context={p.context} does not divide model.{kind}.num_heads={heads} / "
            f"tensor={p.tensor} = {local} (whole heads on each CP rank): use "
            f"{choices(divisors(local))}"
        )


def _position_by_position(model: ModelConfig, p: ParallelismConfig) -> Iterator[str]:
    """Nothing to divide: each rank has the whole layer for its own positions."""
    yield from ()


CONTEXT_PROBLEMS: ByKind[Callable[[ModelConfig, ParallelismConfig], Iterator[str]]] = {
    "mamba": _mamba_context,
    "attention": partial(_attention_context, kind="attention"),
    "mla": partial(_attention_context, kind="mla"),
    "mlp": _position_by_position,
    "moe": _position_by_position,
}
"""What keeps a layer from being shared by context ranks, in words; nothing when nothing does."""

# --------------------------------------------------------------------------------------------- FP8


def _mamba_widths(model: ModelConfig, p: ParallelismConfig) -> dict[str, int]:
    m = model.mamba
    inner = m.num_heads * m.head_dim
    projected = 2 * inner + 2 * m.num_groups * m.state_dim + m.num_heads
    return {
        "model.mamba: num_heads * head_dim / tensor": inner // p.tensor,
        "model.mamba: (2 * num_heads * head_dim + 2 * num_groups * state_dim + num_heads) "
        "/ tensor": projected // p.tensor,
    }


def _attention_widths(model: ModelConfig, p: ParallelismConfig) -> dict[str, int]:
    inner = model.attention.num_heads * model.attention.head_dim
    return {"model.attention: num_heads * head_dim / tensor": inner // p.tensor}


def _mla_widths(model: ModelConfig, p: ParallelismConfig) -> dict[str, int]:
    a = model.mla
    widths = {
        "model.mla: kv_lora_rank": a.kv_lora_rank,
        "model.mla: kv_lora_rank + qk_rope_head_dim": a.kv_lora_rank + a.qk_rope_head_dim,
        "model.mla: num_heads * v_head_dim / tensor": a.num_heads * a.v_head_dim // p.tensor,
    }
    if a.q_lora_rank is not None:
        widths["model.mla: q_lora_rank"] = a.q_lora_rank
    return widths


def _mlp_widths(model: ModelConfig, p: ParallelismConfig) -> dict[str, int]:
    return {"model.mlp: ffn_hidden_size / tensor": model.mlp.ffn_hidden_size // p.tensor}


def _moe_widths(model: ModelConfig, p: ParallelismConfig) -> dict[str, int]:
    e = model.moe
    expert = e.expert_ffn_hidden_size // p.expert_tensor
    widths = {"model.moe: expert_ffn_hidden_size / expert_tensor": expert}
    if e.shared_ffn_hidden_size:
        shared = e.shared_ffn_hidden_size // p.tensor
        widths["model.moe: shared_ffn_hidden_size / tensor"] = shared
    return widths


FP8_WIDTHS: ByKind[Callable[[ModelConfig, ParallelismConfig], dict[str, int]]] = {
    "mamba": _mamba_widths,
    "attention": _attention_widths,
    "mla": _mla_widths,
    "mlp": _mlp_widths,
    "moe": _moe_widths,
}
"""Widths of the weight matrices that one rank multiplies in FP8, by key."""
