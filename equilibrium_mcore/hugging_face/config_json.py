"""The values of an exported model's config.json, from ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from equilibrium_mcore.config.heads import has_scalar_head
from equilibrium_mcore.config.pattern import ByKind, count_kinds, layers_of
from equilibrium_mcore.config.schema import ModelConfig

_AUTO_MAP = {
    "AutoConfig": "configuration_equilibrium.EquilibriumConfig",
    "AutoModel": "modeling_equilibrium.EquilibriumModel",
}
MAMBA_NORM_EPSILON = 1e-5  # MambaMixer's own, whatever the model's norm_epsilon


def config_values(model: ModelConfig, *, sequence_length: int) -> dict[str, Any]:
    """`EquilibriumConfig`'s values; what a model lacks is left out."""
    pattern = layers_of(model.layer_pattern)
    values: dict[str, Any] = {
        "layer_pattern": pattern,
        "vocab_size": model.vocab_size,
        "hidden_size": model.hidden_size,
        "tie_word_embeddings": model.tie_embeddings,
        "layer_norm_epsilon": model.norm_epsilon,
        "initializer_range": model.init_std,
        "max_position_embeddings": sequence_length,
    }
    for kind in count_kinds(pattern):
        values |= SECTIONS[kind](model)
    return values


def architecture_values(model: ModelConfig) -> dict[str, Any]:
    """Which class the model is, and where transformers finds it.

    Raises ValueError for a model with an output layer and a scalar head: no class has both.
    """
    if model.head == "both":
        raise ValueError(
            "model.head='both': no class of transformers has an output layer and a scalar head. "
            "Start a run with model.head output or scalar from these weights, and export that"
        )
    auto = "AutoModelForCausalLM"
    name = "EquilibriumForCausalLM"
    labels: dict[str, Any] = {}
    if has_scalar_head(model):
        auto = "AutoModelForSequenceClassification"
        name = "EquilibriumForSequenceClassification"
        labels = {"id2label": {"0": "score"}, "label2id": {"score": 0}}
    return {
        "architectures": [name],
        "auto_map": {**_AUTO_MAP, auto: f"modeling_equilibrium.{name}"},
        **labels,
    }


def _mamba_values(model: ModelConfig) -> dict[str, Any]:
    mamba = model.mamba
    assert mamba is not None
    return {
        "mamba_num_heads": mamba.num_heads,
        "mamba_head_dim": mamba.head_dim,
        "ssm_state_size": mamba.state_dim,
        "n_groups": mamba.num_groups,
        "conv_kernel": mamba.conv_width,
        "chunk_size": mamba.chunk_size,
        "mamba_norm_epsilon": MAMBA_NORM_EPSILON,
    }


def _attention_values(model: ModelConfig) -> dict[str, Any]:
    attention = model.attention
    assert attention is not None
    values: dict[str, Any] = {
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_query_groups,
        "head_dim": attention.head_dim,
        "attention_bias": attention.qkv_bias,
        "use_rope": attention.rope_base is not None,
    }
    if attention.rope_base is not None:
        values["rope_parameters"] = _rope(attention.rope_base)
    return values


def _mla_values(model: ModelConfig) -> dict[str, Any]:
    mla = model.mla
    assert mla is not None
    return {
        "num_attention_heads": mla.num_heads,
        "num_key_value_heads": mla.num_heads,
        "head_dim": mla.qk_rope_head_dim,
        "q_lora_rank": mla.q_lora_rank,
        "kv_lora_rank": mla.kv_lora_rank,
        "qk_nope_head_dim": mla.qk_nope_head_dim,
        "qk_rope_head_dim": mla.qk_rope_head_dim,
        "v_head_dim": mla.v_head_dim,
        "rope_parameters": _rope(mla.rope_base),
    }


def _mlp_values(model: ModelConfig) -> dict[str, Any]:
    assert model.mlp is not None
    return {
        "intermediate_size": model.mlp.ffn_hidden_size,
        "mlp_activation": model.mlp.activation,
    }


def _moe_values(model: ModelConfig) -> dict[str, Any]:
    moe = model.moe
    assert moe is not None
    # With sigmoid scores megatron-core scales the chosen ones to sum to 1, unless there is one.
    normalized = moe.normalize_top_k if moe.score_function == "softmax" else moe.top_k > 1
    return {
        "n_routed_experts": moe.num_experts,
        "num_experts_per_tok": moe.top_k,
        "moe_intermediate_size": moe.expert_ffn_hidden_size,
        "moe_shared_expert_intermediate_size": moe.shared_ffn_hidden_size,
        "moe_activation": moe.activation,
        "score_function": moe.score_function,
        "norm_topk_prob": normalized,
        "routed_scaling_factor": moe.routed_scaling_factor,
        "use_expert_bias": moe.expert_bias,
    }


SECTIONS: ByKind[Callable[[ModelConfig], dict[str, Any]]] = {
    "mamba": _mamba_values,
    "mla": _mla_values,
    "attention": _attention_values,
    "mlp": _mlp_values,
    "moe": _moe_values,
}
"""What a kind adds to config.json."""


def _rope(base: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": base}
