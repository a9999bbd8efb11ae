"""What a random run draws of every setting, and which settings it leaves alone, with the reason.

Every setting of the schema stands in DRAWN, in SPECIAL or in EXEMPT: a test asks for it, so that a
new setting that changes numbers is certified, or somebody says why not.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel

from equilibrium_mcore.config.optimizers import OPTIMIZERS
from equilibrium_mcore.config.problems import sections_in
from equilibrium_mcore.config.schema import RunConfig

COEFFICIENTS = ("simple", "quintic", "polar_express", "cans", "aol")
PRECISIONS = ("highest", "high", "medium")
# Small models: a twin keeps ratios and kinds, and shrinks sizes itself.
DRAWN: dict[str, tuple[Any, ...]] = {
    "objective": (
        {"type": "next_token"},
        {"type": "sft", "reduction": "token_mean", "constant_length": None},
        {"type": "sft", "reduction": "sequence_mean", "constant_length": None},
        {"type": "sft", "reduction": "constant_length", "constant_length": 32},
    ),
    "model.hidden_size": (64, 96, 128),
    "model.vocab_size": (250, 256, 500),
    "model.vocab_size_multiple": (64, 128),
    "model.tie_embeddings": (False, True),
    "model.norm_epsilon": (1e-5, 1e-6, 1e-3),
    "model.init_std": (0.006, 0.02, 0.1),
    "model.mamba.num_heads": (8, 16),
    "model.mamba.head_dim": (8, 16),
    "model.mamba.state_dim": (16, 32),
    "model.mamba.num_groups": (1, 2, 4, 8),
    "model.mamba.conv_width": (2, 3, 4),
    "model.mamba.chunk_size": (16, 32),
    "model.attention.num_heads": (4, 8),
    "model.attention.num_query_groups": (1, 2, 4),
    "model.attention.head_dim": (8, 16),
    "model.attention.qkv_bias": (False, True),
    "model.attention.rope_base": (10000.0, 500000.0, None),
    "model.mla.num_heads": (4, 8),
    "model.mla.q_lora_rank": (None, 32),
    "model.mla.kv_lora_rank": (16, 32),
    "model.mla.qk_nope_head_dim": (8, 16),
    "model.mla.qk_rope_head_dim": (4, 8),
    "model.mla.v_head_dim": (8, 16, 24),
    "model.mla.rope_base": (10000.0, 500000.0),
    "model.mlp.ffn_hidden_size": (64, 96),
    "model.mlp.activation": ("swiglu", "relu2", "gelu"),
    "model.moe.num_experts": (4, 8),
    "model.moe.top_k": (1, 2, 3),
    "model.moe.expert_ffn_hidden_size": (16, 32),
    "model.moe.shared_ffn_hidden_size": (0, 64),
    "model.moe.activation": ("swiglu", "relu2", "gelu"),
    "model.moe.score_function": ("softmax", "sigmoid"),
    "model.moe.normalize_top_k": (True, False),
    "model.moe.routed_scaling_factor": (1.0, 2.5),
    "model.moe.load_balancing": ("aux_loss", "seq_aux_loss", "global_aux_loss", "none"),
    "model.moe.aux_loss_coefficient": (0.0, 1e-3, 1e-1),
    "model.moe.z_loss_coefficient": (0.0, 1e-3),
    "model.moe.expert_bias": (False, True),
    "model.moe.expert_bias_update_rate": (1e-3, 1e-1),
    "data.packing": ("stream", "documents"),
    "data.document_multiple": (8, 16),
    "parallelism.distributed_optimizer": (True, False),
    "parallelism.moe_dispatcher": ("alltoall", "allgather"),
    "optimizer.matrices": tuple(OPTIMIZERS),
    "optimizer.muon.learning_rate": (4e-3, 2e-2),
    "optimizer.muon.momentum": (0.0, 0.95),
    "optimizer.muon.nesterov": (True, False),
    "optimizer.muon.newton_schulz_steps": (3, 5, 8),
    "optimizer.muon.coefficients": COEFFICIENTS,
    "optimizer.muon.scale": ("spectral", "unit_rms_norm", "shape_scaling"),
    "optimizer.muon.extra_scale": (0.2, 1.0),
    "optimizer.muon.matmul_precision": PRECISIONS,
    "optimizer.muon.weight_decay": (0.0, 0.1),
    "optimizer.soap.learning_rate": (1e-3, 3e-3),
    "optimizer.soap.beta1": (0.0, 0.9, 0.95),
    "optimizer.soap.beta2": (0.9, 0.95),
    "optimizer.soap.preconditioner_beta": (0.8, 0.95),
    "optimizer.soap.epsilon": (1e-8, 1e-6),
    "optimizer.soap.basis_interval_steps": (1, 2, 10),
    "optimizer.soap.max_dimension": (48, 8192),
    "optimizer.soap.weight_decay": (0.0, 0.1),
    "optimizer.cosmos.learning_rate": (1e-3, 3e-3),
    "optimizer.cosmos.rank": (4, 64),
    "optimizer.cosmos.beta1": (0.0, 0.9),
    "optimizer.cosmos.beta2": (0.9, 0.96),
    "optimizer.cosmos.epsilon": (1e-8, 1e-6),
    "optimizer.cosmos.muon_weight": (0.0, 0.2),
    "optimizer.cosmos.update_rms": (0.2, 1.0),
    "optimizer.cosmos.newton_schulz_steps": (3, 5),
    "optimizer.cosmos.coefficients": COEFFICIENTS,
    "optimizer.cosmos.matmul_precision": PRECISIONS,
    "optimizer.cosmos.weight_decay": (0.0, 0.1),
    "optimizer.adamw.learning_rate": (3e-4, 4e-3),
    "optimizer.adamw.learning_rates": ({}, {"router": 1e-3, "ssm": 1e-4}, {"matrix": 1e-3}),
    "optimizer.adamw.beta1": (0.0, 0.9),
    "optimizer.adamw.beta2": (0.95, 0.999),
    "optimizer.adamw.epsilon": (1e-8, 1e-6),
    "optimizer.adamw.weight_decay": (0.0, 0.1),
    "optimizer.schedule.kind": ("cosine", "wsd", "constant"),
    "optimizer.schedule.warmup_steps": (0, 2),
    "optimizer.schedule.decay_steps": (1, 2),
    "optimizer.schedule.decay_form": ("linear", "cosine", "sqrt"),
    "optimizer.schedule.minimum_ratio": (0.0, 0.1),
    "optimizer.schedule_free.beta": (0.5, 0.9),
    "optimizer.schedule_free.matrix_momentum": (0.0, 0.9),
    "optimizer.clip_gradient_norm": (0.0, 0.1, 1.0),
    "training.sequence_length": (64, 128),
    "training.micro_batch_size": (1, 2),
    "training.global_batch_size": (16, 32),
    "training.steps": (10, 200),
    "training.seed": tuple(range(100)),
    "training.recompute": ("none", "full", "selective"),
    "training.recompute_layers": (1, 2),
    "training.recompute_modules": (
        ["core_attn"], ["moe"], ["mlp"], ["moe_act"], ["mla_up_proj"], ["core_attn", "mlp"],
    ),
}  # fmt: skip

# Drawn by code of their own (draw.py), since they hang together.
SPECIAL = (
    "model.layer_pattern",
    "parallelism.tensor",
    "parallelism.sequence",
    "parallelism.pipeline",
    "parallelism.virtual_pipeline",
    "parallelism.expert",
    "parallelism.expert_tensor",
    "parallelism.context",
    "parallelism.world_size",
    "parallelism.overlap_grad_reduce",
    "parallelism.overlap_shared_experts",
    "training.fused.activation",
    "optimizer.overrides.pattern",
    "optimizer.overrides.optimizer",
    "optimizer.overrides.learning_rate",
    "optimizer.overrides.weight_decay",
    "optimizer.overrides.split",
)

_NAME = "a name or a path: no number depends on it"
_TOKENS = "certificates train on made-up tokens"
_PRECISION = "the twin trains in a precision of its own"
_ENGINE = "Transformer Engine's, which needs a GPU: tests/gpu/test_fused.py"
_WHEN = "says when something happens, not what is learned in a step"
EXEMPT: dict[str, str] = {
    "name": _NAME,
    "output_directory": _NAME,
    "model.name": _NAME,
    "model.head": "the objective decides it: tests/models/test_heads.py has every layout",
    "stage": "certified by tests/stages; it sets defaults, and what it takes is drawn",
    "description": _NAME,
    "tags": _NAME,
    "data.name": _NAME,
    "data.type": "conversations are packed documents where answers count: chat.yaml is certified",
    "data.unpaired": "of objective kto alone, which tests/certify/settings.py certifies",
    "data.template": _TOKENS,
    "data.max_tokens": _TOKENS,
    "data.too_long": _TOKENS,
    "data.window": _TOKENS,
    "data.prefetch_factor": _TOKENS,
    "data.tokenizer": _TOKENS,
    "data.sources": _TOKENS,
    "data.allow_repeated_sources": "what is refused: tests/data/test_repeats.py",
    "data.split": _TOKENS,
    "data.order": _TOKENS,
    "data.train_samples": _TOKENS,
    "data.cache_directory": _TOKENS,
    "data.num_workers": _TOKENS,
    "parallelism.gradient_bucket_size": "a twin's is small enough for several buckets",
    "parallelism.context_exchange": _ENGINE,
    "training.fused.cross_entropy": "of bf16: tests/models/test_fused.py",
    "training.fused.permutation": _ENGINE,
    "training.fused.router": _ENGINE,
    "training.fused.weight_gradients": _ENGINE,
    "training.cuda_graphs": _ENGINE,
    "parallelism.timeout_minutes": _WHEN,
    "training.stop_after_steps": _WHEN,
    "training.epochs": _WHEN,
    "training.anomalies": "judges whole runs: tests/training/test_anomalies.py",
    "training.compare_replicas": "changes no number: tests/optim/test_replicas.py",
    "adapters": "tests/adapters has every layout",
    "training.left_out": "which samples: tests/data/test_left_out.py",
    "training.frozen": "a certificate's twin trains everything: tests/optim/test_frozen.py",
    "training.precision": _PRECISION,
    "training.fp8_recipe": _PRECISION,
    "training.fp8_format": _PRECISION,
    "training.validation_interval_steps": _WHEN,
    "training.validation_batches": _WHEN,
    "training.backend": "Transformer Engine needs a GPU: --tier kernels compares it",
    "data.truth": _TOKENS,
    "rollout": "tests/stages/test_online.py; a certificate makes rollouts of its own",
    "rewards": "tests/verification; a certificate's are made up",
    "judge": "tests/stages/test_rlaif.py; a certificate's preferences are made up",
    "evaluation": _WHEN,
    "checkpoint": "certificates save and load by themselves",
    "logging": "only says what is written",
}


def leaves(section: type[BaseModel] = RunConfig, prefix: str = "") -> Iterator[str]:
    """Every setting of the schema: `model.moe.top_k`; of a list its items', without an index."""
    for name, field in section.model_fields.items():
        inside = sections_in(field.annotation)
        if not inside or prefix + name in DRAWN:  # a value, or a section that is drawn whole
            yield prefix + name
        for kind in inside if prefix + name not in DRAWN else ():
            yield from leaves(kind, f"{prefix}{name}.")


def is_exempt(key: str) -> bool:
    """Whether `key`, or a section that holds it, is left alone."""
    return any(key == left or key.startswith(left + ".") for left in EXEMPT)
