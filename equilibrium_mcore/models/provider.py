"""Builds this rank's part of a model."""

from __future__ import annotations

from functools import partial

import torch
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig

from equilibrium_mcore.config.heads import has_output, has_scalar_head
from equilibrium_mcore.config.layout import pipeline_segments
from equilibrium_mcore.config.pattern import ByKind, count_kinds, cut_into
from equilibrium_mcore.config.schema import ModelConfig, ParallelismConfig, TrainingConfig
from equilibrium_mcore.models.heads import ScalarHeadModel
from equilibrium_mcore.models.router import forget_last_model
from equilibrium_mcore.models.specs import choose_backend, stack_spec
from equilibrium_mcore.models.transformer_config import build_transformer_config

KEPT_IN_FLOAT32: ByKind[tuple[str, ...]] = {
    "mamba": ("A_log", "dt_bias", ".D"),
    "mla": (),
    "attention": (),
    "mlp": (),
    "moe": ("expert_bias",),
}
"""Ends of names of parameters that stay float32 whatever the precision: small, and sensitive to
rounding."""


def build_model(
    model: ModelConfig,
    layout: ParallelismConfig,
    training: TrainingConfig,
    groups: ProcessGroupCollection,
    *,
    on_gpu: bool = False,
    virtual_stage: int | None = None,
    transformer_config: TransformerConfig | None = None,
) -> HybridModel:
    """This rank's part of `model`: the segment of its pipeline stage, split over its groups.

    Args:
        groups: all of megatron-core's groups for `layout`.
        virtual_stage: which model chunk, where a rank has several.
        transformer_config: one that was built before, so that all chunks share it.
    """
    forget_last_model()
    config = transformer_config or build_transformer_config(model, layout, training, on_gpu=on_gpu)
    backend = choose_backend(training.backend, on_gpu=on_gpu)
    stages = pipeline_segments(layout)
    stage = groups.pp.rank() + (virtual_stage or 0) * layout.pipeline
    attends = "attention" in count_kinds(model.layer_pattern)
    rope_base = model.attention.rope_base if attends else None
    kind = HybridModel
    if has_scalar_head(model):
        kind = partial(ScalarHeadModel, keeps_output=has_output(model), seed=training.seed)
    module = kind(
        config=config,
        hybrid_stack_spec=stack_spec(model, backend),
        vocab_size=model.padded_vocab_size,
        max_sequence_length=training.sequence_length,
        hybrid_layer_pattern=cut_into(model.layer_pattern, stages),
        pre_process=stage == 0,
        post_process=stage == stages - 1,
        share_embeddings_and_output_weights=model.tie_embeddings,
        position_embedding_type="rope" if rope_base else "none",
        rotary_base=rope_base or 10000,
        pg_collection=groups,
        vp_stage=virtual_stage,
    )
    cast_parameters(module, config.params_dtype)
    if training.fused.weight_gradients:
        accumulate_weight_gradients(module)
    return module


def accumulate_weight_gradients(module: torch.nn.Module) -> None:
    """Have Transformer Engine's linear layers add their weights' gradients to DDP's buffers.

    megatron-core has one flag for all layers of a model, and its own, of which the output layer is
    one, need apex for it. Transformer Engine reads its own flag at every forward pass.
    """
    for part in module.modules():
        if hasattr(part, "fuse_wgrad_accumulation"):
            part.fuse_wgrad_accumulation = True


def is_kept_in_float32(name: str) -> bool:
    """Whether a parameter stays float32 whatever the precision, by its name."""
    return name.endswith(tuple(end for ends in KEPT_IN_FLOAT32.values() for end in ends))


def cast_parameters(module: torch.nn.Module, dtype: torch.dtype) -> None:
    """Cast every floating-point parameter to `dtype`, but for those kept in float32.

    In float64, which only proofs use, nothing is kept: buffers and what modules hold beside them
    (RoPE's frequencies) are cast too.
    """
    for name, parameter in module.named_parameters():
        keep = is_kept_in_float32(name) and dtype != torch.float64
        target = torch.float32 if keep else dtype
        if parameter.is_floating_point() and parameter.dtype != target:
            parameter.data = parameter.data.to(target)
    if dtype == torch.float64:
        for part in module.modules():
            for tensors in (part._buffers, vars(part)):
                for name, value in tensors.items():
                    if isinstance(value, torch.Tensor) and value.is_floating_point():
                        tensors[name] = value.double()
