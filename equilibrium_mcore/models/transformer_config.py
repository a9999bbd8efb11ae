"""megatron-core's TransformerConfig, made from our plain values."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from megatron.core.activations import squared_relu
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_config import MLATransformerConfig

from equilibrium_mcore.config.fused import FLEX_LIBRARIES
from equilibrium_mcore.config.layout import megatron_sizes
from equilibrium_mcore.config.pattern import ByKind, count_kinds, layers_of
from equilibrium_mcore.config.schema import ModelConfig, ParallelismConfig, TrainingConfig
from equilibrium_mcore.models.specs import TORCH, choose_backend

DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8": torch.bfloat16,  # the weights; Transformer Engine quantizes inside its linear layers
}
_ACTIVATIONS = {"swiglu": (F.silu, True), "relu2": (squared_relu, False), "gelu": (F.gelu, False)}


def build_transformer_config(
    model: ModelConfig, layout: ParallelismConfig, training: TrainingConfig, *, on_gpu: bool
) -> TransformerConfig:
    """The config of one rank's part of `model` under `layout` and `training`'s numerics."""
    values = {
        **_model_values(model, layout),
        **_layer_values(model, layout, training),
        **megatron_sizes(layout),
        "sequence_parallel": layout.sequence,
        "cp_comm_type": layout.context_exchange,
        **_numeric_values(training, on_gpu=on_gpu),
        **_backend_values(training, on_gpu=on_gpu),
    }
    latent = values.get("multi_latent_attention", False)
    return (MLATransformerConfig if latent else TransformerConfig)(**values)


def _model_values(model: ModelConfig, layout: ParallelismConfig) -> dict:
    return dict(
        num_layers=len(layers_of(model.layer_pattern)),
        hidden_size=model.hidden_size,
        is_hybrid_model=True,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        init_method_std=model.init_std,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # Kept by megatron-core for every model; a model without attention has no heads.
        num_attention_heads=layout.tensor,
    )


# ------------------------------------------------------------------------------- kinds of layers


def _layer_values(model: ModelConfig, layout: ParallelismConfig, training: TrainingConfig) -> dict:
    """What the sections of the pattern's layers say: one without a layer changes nothing.

    A model has one activation of channel mixers and one kind of attention (`config.model_rules`),
    so no two rows contradict each other.
    """
    values: dict = {}
    for kind in count_kinds(model.layer_pattern):
        values |= LAYER_VALUES[kind](model, layout, training)
    return values


def _mamba_values(model: ModelConfig, layout: ParallelismConfig, training: TrainingConfig) -> dict:
    return dict(
        mamba_num_heads=model.mamba.num_heads,
        mamba_head_dim=model.mamba.head_dim,
        mamba_state_dim=model.mamba.state_dim,
        mamba_num_groups=model.mamba.num_groups,
    )


def _attention_values(
    model: ModelConfig, layout: ParallelismConfig, training: TrainingConfig
) -> dict:
    return dict(
        num_attention_heads=model.attention.num_heads,
        num_query_groups=model.attention.num_query_groups,
        kv_channels=model.attention.head_dim,
        add_qkv_bias=model.attention.qkv_bias,
    )


def _mla_values(model: ModelConfig, layout: ParallelismConfig, training: TrainingConfig) -> dict:
    mla = model.mla
    return dict(
        multi_latent_attention=True,
        num_attention_heads=mla.num_heads,
        q_lora_rank=mla.q_lora_rank,
        kv_lora_rank=mla.kv_lora_rank,
        qk_head_dim=mla.qk_nope_head_dim,
        qk_pos_emb_head_dim=mla.qk_rope_head_dim,
        v_head_dim=mla.v_head_dim,
        rope_type="rope",
        rotary_base=mla.rope_base,
        rotary_scaling_factor=1.0,
        mscale_all_dim=0.0,
        # The specs name the latent norms themselves. True would make megatron-core add up the query
        # latent norm's gradient over tensor ranks, each of which has the whole without SP.
        qk_layernorm=False,
    )


def _mlp_values(model: ModelConfig, layout: ParallelismConfig, training: TrainingConfig) -> dict:
    activation, gated = _ACTIVATIONS[model.mlp.activation]
    return dict(
        ffn_hidden_size=model.mlp.ffn_hidden_size,
        activation_func=activation,
        gated_linear_unit=gated,
    )


def _moe_values(model: ModelConfig, layout: ParallelismConfig, training: TrainingConfig) -> dict:
    moe = model.moe
    activation, gated = _ACTIVATIONS[moe.activation]
    return dict(
        activation_func=activation,
        gated_linear_unit=gated,
        num_moe_experts=moe.num_experts,
        moe_router_topk=moe.top_k,
        moe_ffn_hidden_size=moe.expert_ffn_hidden_size,
        moe_shared_expert_intermediate_size=moe.shared_ffn_hidden_size or None,
        moe_router_score_function=moe.score_function,
        # Softmax after the choice makes the chosen scores sum to 1, before it does not.
        moe_router_pre_softmax=moe.score_function == "softmax" and not moe.normalize_top_k,
        moe_router_topk_scaling_factor=(
            moe.routed_scaling_factor if moe.routed_scaling_factor != 1.0 else None
        ),
        moe_router_load_balancing_type=moe.load_balancing,
        moe_aux_loss_coeff=moe.aux_loss_coefficient,
        moe_z_loss_coeff=moe.z_loss_coefficient or None,
        moe_router_enable_expert_bias=moe.expert_bias,
        moe_router_bias_update_rate=moe.expert_bias_update_rate,
        moe_router_dtype="fp64" if DTYPES[training.precision] == torch.float64 else "fp32",
        **_dispatcher_values(layout),
        moe_shared_expert_overlap=layout.overlap_shared_experts,
        moe_permute_fusion=training.fused.permutation,
        moe_router_fusion=training.fused.router,
    )


def _dispatcher_values(layout: ParallelismConfig) -> dict:
    if layout.moe_dispatcher in FLEX_LIBRARIES:
        return dict(
            moe_token_dispatcher_type="flex", moe_flex_dispatcher_backend=layout.moe_dispatcher
        )
    return dict(moe_token_dispatcher_type=layout.moe_dispatcher)


LAYER_VALUES: ByKind[Callable[[ModelConfig, ParallelismConfig, TrainingConfig], dict]] = {
    "mamba": _mamba_values,
    "mla": _mla_values,
    "attention": _attention_values,
    "mlp": _mlp_values,
    "moe": _moe_values,
}
"""What a section says in megatron-core's names."""


# --------------------------------------------------------------------------- layout and numerics


def _backend_values(training: TrainingConfig, *, on_gpu: bool) -> dict:
    """What megatron-core checks other settings against while the config is built."""
    backend = choose_backend(training.backend, on_gpu=on_gpu)
    return dict(
        transformer_impl="local" if backend is TORCH else "transformer_engine",
        moe_grouped_gemm=backend.grouped_experts,
    )


def _numeric_values(training: TrainingConfig, *, on_gpu: bool) -> dict:
    dtype = DTYPES[training.precision]
    values = dict(
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        # Gradients are divided by the tokens of the whole batch, so no layout changes their scale.
        calculate_per_token_loss=True,
        use_cpu_initialization=not on_gpu,
        gradient_accumulation_fusion=False,  # `provider.accumulate_weight_gradients` instead
        bias_dropout_fusion=on_gpu,
        bias_activation_fusion=training.fused.activation,
        cross_entropy_loss_fusion=training.fused.cross_entropy,
        cross_entropy_fusion_impl="native",
        apply_rope_fusion=False,
        masked_softmax_fusion=False,
        batch_p2p_comm=on_gpu,
        deallocate_pipeline_outputs=True,
    )
    if training.precision == "fp8":
        values.update(fp8=training.fp8_format, fp8_recipe=training.fp8_recipe)
    if training.cuda_graphs:
        values.update(cuda_graph_impl="local", cuda_graph_modules=list(training.cuda_graphs))
    if training.recompute == "full":
        values.update(
            recompute_granularity="full",
            recompute_method="uniform",
            recompute_num_layers=training.recompute_layers,
        )
    elif training.recompute == "selective":
        values.update(
            recompute_granularity="selective",
            recompute_modules=list(training.recompute_modules),
        )
    return values
