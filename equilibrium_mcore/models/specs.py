"""Layer specs: which module stands at each place of megatron-core's hybrid stack.

One table per backend (`TORCH`, and Transformer Engine's, read only where it is used), and one row
per layer kind that makes a layer of such a table. Norms stand alone, never fused into a linear
layer, so that a checkpoint has the same keys whichever backend wrote it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.backends import BackendSpecProvider, LocalSpecProvider
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec_for_backend
from megatron.core.models.hybrid.hybrid_block import HybridStackSubmodules
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.attention import SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.multi_latent_attention import (
    MLASelfAttention,
    MLASelfAttentionSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import (
    MoETransformerLayer,
    TransformerLayer,
    TransformerLayerSubmodules,
)
from torch import Tensor

from equilibrium_mcore.config.pattern import ByKind, count_kinds
from equilibrium_mcore.config.schema import ModelConfig
from equilibrium_mcore.models.attention import TorchCoreAttention
from equilibrium_mcore.models.decode.attention import DecodingSelfAttention
from equilibrium_mcore.models.decode.experts import DecodingExperts
from equilibrium_mcore.models.decode.latent import DecodingLatentAttention
from equilibrium_mcore.models.decode.stack import DecodingStack
from equilibrium_mcore.models.mamba import FusedMambaMixer, TorchMambaMixer
from equilibrium_mcore.models.norms import RMSNorm
from equilibrium_mcore.models.router import GlobalRouter


@dataclass(frozen=True)
class Backend:
    """The modules of one implementation."""

    name: str
    column_linear: type
    row_linear: type
    duplicated_linear: type  # MLA's down-projections, whose output every TP rank needs whole
    norm: type
    core_attention: type
    mamba_mixer: type
    experts: BackendSpecProvider
    grouped_experts: bool


TORCH = Backend(
    name="torch",
    column_linear=ColumnParallelLinear,
    row_linear=RowParallelLinear,
    duplicated_linear=ColumnParallelLinear,
    norm=RMSNorm,
    core_attention=TorchCoreAttention,
    mamba_mixer=TorchMambaMixer,
    experts=LocalSpecProvider(),
    grouped_experts=False,
)


def transformer_engine_backend(*, has_mamba_ssm: bool) -> Backend:
    """Transformer Engine's modules, and mamba-ssm's fused scan where it is installed."""
    from megatron.core.extensions import transformer_engine as te
    from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
    from transformer_engine.pytorch import RMSNorm as EngineRMSNorm

    class EngineNorm(EngineRMSNorm):
        """Transformer Engine's RMSNorm, which brings nothing but its weight into a checkpoint.

        Its extra state describes quantized outputs, which no norm of ours has; a checkpoint of the
        PyTorch backend has no such key and could not be loaded.
        """

        get_extra_state = torch.nn.Module.get_extra_state
        set_extra_state = torch.nn.Module.set_extra_state

        def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5) -> None:
            super().__init__(
                hidden_size,
                eps=eps,
                sequence_parallel=config.sequence_parallel,
                **te._get_extra_te_kwargs(config),
            )

    return Backend(
        name="transformer_engine",
        column_linear=te.TEColumnParallelLinear,
        row_linear=te.TERowParallelLinear,
        duplicated_linear=te.TELinear,
        norm=EngineNorm,
        core_attention=te.TEDotProductAttention,
        mamba_mixer=FusedMambaMixer if has_mamba_ssm else TorchMambaMixer,
        experts=TESpecProvider(),
        grouped_experts=True,
    )


def choose_backend(name: str, *, on_gpu: bool) -> Backend:
    """The backend for `training.backend`: auto takes Transformer Engine where it can run."""
    has_engine = on_gpu and importlib.util.find_spec("transformer_engine") is not None
    if name == "torch" or (name == "auto" and not has_engine):
        return TORCH
    if not has_engine:
        raise ValueError(
            "training.backend=transformer_engine needs a CUDA device and the transformer-engine "
            "package, and this host lacks one of them: use training.backend=auto or torch"
        )
    has_mamba_ssm = importlib.util.find_spec("mamba_ssm") is not None
    return transformer_engine_backend(has_mamba_ssm=has_mamba_ssm)


def stack_spec(model: ModelConfig, backend: Backend) -> ModuleSpec:
    """The spec of the whole decoder for megatron-core's HybridModel."""
    kinds = count_kinds(model.layer_pattern)
    layers = {f"{kind}_layer": LAYER_SPECS[kind](model, backend) for kind in kinds}
    return ModuleSpec(
        module=EquilibriumStack,
        params={"norm": backend.norm},
        submodules=HybridStackSubmodules(**layers),
    )


# ------------------------------------------------------------------------------- kinds of layers


def _mamba_layer(model: ModelConfig, backend: Backend) -> ModuleSpec:
    mixer = ModuleSpec(
        module=backend.mamba_mixer,
        params={"d_conv": model.mamba.conv_width, "chunk_size": model.mamba.chunk_size},
        submodules=MambaMixerSubmodules(in_proj=backend.column_linear, out_proj=backend.row_linear),
    )
    return ModuleSpec(
        module=MambaLayer,
        submodules=MambaLayerSubmodules(
            norm=backend.norm, mixer=mixer, mamba_bda=get_bias_dropout_add
        ),
    )


def _attention_layer(model: ModelConfig, backend: Backend) -> ModuleSpec:
    submodules = SelfAttentionSubmodules(
        linear_qkv=backend.column_linear,
        core_attention=backend.core_attention,
        linear_proj=backend.row_linear,
    )
    return _with_attention(DecodingSelfAttention, submodules, backend.norm)


def _mla_layer(model: ModelConfig, backend: Backend) -> ModuleSpec:
    submodules = MLASelfAttentionSubmodules(
        linear_q_proj=backend.column_linear,
        linear_q_down_proj=backend.duplicated_linear,
        linear_q_up_proj=backend.column_linear,
        linear_kv_down_proj=backend.duplicated_linear,
        linear_kv_up_proj=backend.column_linear,
        core_attention=backend.core_attention,
        linear_proj=backend.row_linear,
        q_layernorm=backend.norm,
        kv_layernorm=backend.norm,
    )
    return _with_attention(MultiLatentSelfAttention, submodules, backend.norm)


def _with_attention(attention: type, submodules: Any, norm: type) -> ModuleSpec:
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=norm,
            self_attention=ModuleSpec(
                module=attention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=submodules,
            ),
            self_attn_bda=get_bias_dropout_add,
        ),
    )


def _mlp_layer(model: ModelConfig, backend: Backend) -> ModuleSpec:
    submodules = MLPSubmodules(linear_fc1=backend.column_linear, linear_fc2=backend.row_linear)
    mlp = partial(MLP.as_mlp_submodule, submodules=submodules)
    return _with_channel_mixer(MLPLayer, mlp, backend.norm)


def _moe_layer(model: ModelConfig, backend: Backend) -> ModuleSpec:
    moe = get_moe_module_spec_for_backend(
        backend=backend.experts,
        num_experts=model.moe.num_experts,
        moe_grouped_gemm=backend.grouped_experts,
    )
    submodules = replace(moe.keywords["submodules"], router=GlobalRouter)
    if not backend.grouped_experts:  # megatron-core's SequentialMLP, made of the same parts
        experts = partial(DecodingExperts, **submodules.experts.keywords)
        submodules = replace(submodules, experts=experts)
    moe = partial(moe.func, submodules=submodules)
    return _with_channel_mixer(MoETransformerLayer, moe, backend.norm)


def _with_channel_mixer(layer: type, mlp: Any, norm: type) -> ModuleSpec:
    return ModuleSpec(
        module=layer,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=norm, mlp=mlp, mlp_bda=get_bias_dropout_add
        ),
    )


LAYER_SPECS: ByKind[Callable[[ModelConfig, Backend], ModuleSpec]] = {
    "mamba": _mamba_layer,
    "mla": _mla_layer,
    "attention": _attention_layer,
    "mlp": _mlp_layer,
    "moe": _moe_layer,
}
"""The layer of a kind, made of a backend's modules."""

# ---------------------------------------------------------------- where megatron-core is not enough


class MultiLatentSelfAttention(DecodingLatentAttention, MLASelfAttention):
    """MLASelfAttention with the projections and norms that its spec names, and whole gradients.

    megatron-core re-derives them and refuses a latent norm when there is no query latent, which
    DeepSeek-V2-Lite has.
    """

    def _qkv_down_projection(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Latents of the query, and of key and value with the shared rope key, whole in width.

        The rope key serves the heads of every TP rank, so each rank's gradient of it is partial.
        megatron-core 0.19.2 adds them up only where a whole projection meets sequence parallelism;
        elsewhere the rope rows of this projection would learn from one rank's heads.
        """
        query, key_value = super()._qkv_down_projection(hidden_states)
        group, config = self.tp_group, self.config
        if group.size() == 1:
            return query, key_value
        widths = [config.kv_lora_rank, config.qk_pos_emb_head_dim]
        if key_value.size(-1) != sum(widths):  # a column-parallel projection: a slice per rank
            key_value = gather_from_tensor_model_parallel_region(key_value, group=group)
            if config.sequence_parallel:  # megatron-core gathers the rope key again, with its sum
                key_value = scatter_to_sequence_parallel_region(key_value, group=group)
        if not config.sequence_parallel:
            latent, rope = key_value.split(widths, dim=-1)
            rope = copy_to_tensor_model_parallel_region(rope, group=group)  # backward: the sum
            key_value = torch.cat([latent, rope], dim=-1)
        return query, key_value

    def _resolve_qk_norm_config(self, submodules: MLASelfAttentionSubmodules) -> dict[str, Any]:
        return {
            "linear_q_proj": submodules.linear_q_proj,
            "linear_q_up_proj": submodules.linear_q_up_proj,
            "linear_kv_up_proj": submodules.linear_kv_up_proj,
            "q_layernorm": submodules.q_layernorm,
            "kv_layernorm": submodules.kv_layernorm,
        }


class EquilibriumStack(DecodingStack):
    """HybridStack whose final norm is the backend's (megatron-core fixes Transformer Engine's)."""

    def __init__(self, config, submodules, *args, norm: type, **kwargs) -> None:
        super().__init__(config, submodules, *args, post_layer_norm=False, **kwargs)
        self.post_layer_norm = True
        if self.post_process:
            self.final_norm = norm(
                config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon
            )
