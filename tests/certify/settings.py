"""Every setting that changes numbers, certified in a layout that could get it wrong.

`python -m tests.certify.settings OUT [NAME ...]` certifies the cases below, or those named, and
writes what the certificates said as JSON.
"""

from __future__ import annotations

import json
import sys
import traceback
from pathlib import Path
from typing import NamedTuple


class Case(NamedTuple):
    """A run with other settings, and the layout in which it is certified."""

    layout: str
    overrides: tuple[str, ...]
    run: str = "quickstart"


def _gqa(pattern: str, **attention: object) -> tuple[str, ...]:
    values = {"num_heads": 8, "num_query_groups": 4, "head_dim": 16, **attention}
    settings = ", ".join(f"{key}: {_yaml(value)}" for key, value in values.items())
    return (f"model.layer_pattern='{pattern}'", "model.mla=null", f"model.attention={{{settings}}}")


def _yaml(value: object) -> str:
    return "null" if value is None else str(value).lower()


MLP = "model.mlp={ffn_hidden_size: 256, activation: swiglu}"
SOFTMAX = ("model.moe.score_function=softmax", "model.moe.expert_bias=false")
BALANCED = "model.moe.aux_loss_coefficient=0.01"
FREE = ("optimizer.schedule.kind=constant", "optimizer.schedule_free={beta: 0.9}")
# One micro-batch per step on the run's own two data ranks.
ONE_BATCH = ("training.micro_batch_size=8", "model.moe.load_balancing=global_aux_loss", BALANCED)


def _policy(preset: str, **changes: object) -> tuple[str, ...]:
    """Made-up answers and experience; bounds that some ratios cross."""
    values = {"type": "policy", "preset": preset, **changes}
    settings = ", ".join(f"{key}: {_yaml(value)}" for key, value in values.items())
    return (
        f"objective={{{settings}}}",
        "data.packing=documents",
        "model.moe.load_balancing=none",  # nothing but the reward pulls a policy's router
        "model.moe.expert_bias_update_rate=0",
    )


CASES = {
    # ------------------------------------------------------------------------- the router
    "aux_loss": Case("tp=2,dp=2", ("model.moe.load_balancing=aux_loss", BALANCED)),
    "seq_aux_loss": Case("cp=2,dp=2", ("model.moe.load_balancing=seq_aux_loss", BALANCED)),
    "global_aux_loss_data": Case("dp=2", ONE_BATCH),
    "global_aux_loss_tensor": Case("tp=2,ep=2,dp=2", ONE_BATCH),
    "global_aux_loss_context": Case("cp=2,pp=2", ONE_BATCH),
    "no_balancing": Case("dp=2,ep=2", ("model.moe.load_balancing=none",)),
    "no_coefficient": Case("ep=2", ("model.moe.aux_loss_coefficient=0",)),
    "bias_rate": Case("tp=2,dp=2", ("model.moe.expert_bias_update_rate=0.05",)),
    "softmax_after": Case(
        "tp=2,ep=2",
        (*SOFTMAX, "model.moe.routed_scaling_factor=2.5", "model.moe.z_loss_coefficient=1e-3"),
    ),
    "softmax_before": Case(
        "cp=2,ep=2",
        (
            *SOFTMAX,
            "model.moe.normalize_top_k=false",
            "model.moe.top_k=1",
            "model.moe.z_loss_coefficient=1e-3",
            BALANCED,
        ),
    ),
    "z_loss_data": Case("dp=2,tp=2", ("model.moe.z_loss_coefficient=1e-2",)),
    "every_expert": Case("ep=2", ("model.moe.top_k=8", "model.moe.shared_ffn_hidden_size=0")),
    "allgather": Case("tp=2,ep=2,dp=2", ("parallelism.moe_dispatcher=allgather",)),
    "expert_tensor": Case("tp=2,etp=2,ep=2", ("model.moe.activation=relu2",)),
    "expert_tensor_allgather": Case(
        "tp=2,etp=2", ("parallelism.moe_dispatcher=allgather", "model.moe.activation=gelu")
    ),
    # -------------------------------------------------------------------- the other layers
    "gqa_bias_tied": Case(
        "tp=2,pp=2", (*_gqa("M-|*E", qkv_bias=True), MLP, "model.tie_embeddings=true")
    ),
    "gqa_no_rope": Case("cp=2,tp=2", _gqa("*E|ME", rope_base=None)),
    "gqa_one_group": Case("cp=2", _gqa("*E|ME", num_query_groups=1)),
    "gqa_fewer_groups_than_tensor": Case("tp=4", _gqa("*E|ME", num_query_groups=2)),
    "dense_relu2": Case(
        "tp=2,cp=2",
        ("model.layer_pattern='M-|+-'", "model.mlp={ffn_hidden_size: 256, activation: relu2}")
        + ("model.moe=null", "parallelism.expert=1", "model.norm_epsilon=1e-6"),
    ),
    "dense_gelu_no_latent": Case(
        "tp=2,pp=2",
        ("model.layer_pattern='M-|+-'", "model.mlp={ffn_hidden_size: 256, activation: gelu}")
        + ("model.moe=null", "parallelism.expert=1", "model.mla.q_lora_rank=null")
        + ("model.mla.v_head_dim=32",),
    ),
    "one_group_of_states": Case(
        "cp=2,ep=2",
        ("model.mamba.num_groups=1", "model.mamba.conv_width=3", "parallelism.tensor=1")
        + ("parallelism.sequence=false",),
    ),
    "virtual_stages_tied": Case("pp=2,vpp=2", ("model.tie_embeddings=true",)),
    "sequence_not_sharded": Case(
        "tp=2,sp=0",
        ("model.layer_pattern='M-|+-'", MLP, "model.moe=null", "parallelism.expert=1")
        + ("parallelism.sequence=false",),
    ),
    # ------------------------------------------------------------- batches, recomputation
    "packed": Case(
        "tp=2,cp=2",
        ("data.packing=documents", "model.moe.load_balancing=aux_loss", BALANCED),
    ),
    "packed_gqa": Case(
        "cp=2,dp=2",
        (*_gqa("ME|*E"), "data.packing=documents", "training.micro_batch_size=1"),
    ),
    "recompute_full": Case(
        "pp=2,vpp=2", ("training.recompute=full", "training.recompute_layers=2", BALANCED)
    ),
    "recompute_full_tensor": Case("tp=2,ep=2", ("training.recompute=full", BALANCED)),
    "recompute_selective": Case(
        "tp=2,cp=2",
        ("training.recompute=selective", "training.recompute_modules=[core_attn, moe, mla_up_proj]")
        + (BALANCED,),
    ),
    "recompute_mlp": Case(
        "tp=2,pp=2",
        ("model.layer_pattern='M-|+E'", MLP, "training.recompute=selective")
        + ("training.recompute_modules=[mlp, moe]",),
    ),
    "recompute_packed": Case(
        "cp=2,ep=2",
        ("training.recompute=full", "data.packing=documents", "training.micro_batch_size=1"),
    ),
    "recompute_global": Case("tp=2,dp=2", (*ONE_BATCH, "training.recompute=full")),
    "adapters": Case("tp=2,cp=2,pp=2", ("adapters={rank: 4}", BALANCED)),
    "dpo": Case("tp=2,cp=2,ep=2", ("adapters=null", BALANCED), run="dpo"),
    "dpo_of_adapters": Case("pp=2,cp=2", ("objective.label_smoothing=0.1",), run="dpo"),
    "ipo": Case("tp=2,dp=2", ("objective={type: ipo}", "adapters=null"), run="dpo"),
    "simpo": Case("pp=2,vpp=2", ("objective={type: simpo}", "adapters=null"), run="dpo"),
    "orpo": Case("cp=2,dp=2", ("objective={type: orpo}", "adapters=null"), run="dpo"),
    "kto": Case(
        "tp=2,cp=2,ep=2",
        ("objective={type: kto, undesirable_weight: 1.3}", "adapters=null")
        + ("data.unpaired=true", BALANCED),
        run="dpo",
    ),
    "reward_model": Case("tp=2,cp=2,ep=2", ("adapters=null", BALANCED), run="reward_model"),
    "reward_model_stages": Case("pp=2,vpp=2", ("adapters=null",), run="reward_model"),
    "reward_model_of_adapters": Case(
        "tp=2,pp=2", ("model.tie_embeddings=true",), run="reward_model"
    ),
    "distillation": Case("tp=2,cp=2,ep=2", (BALANCED,), run="distill"),
    "distillation_reverse": Case(
        "pp=2,vpp=2", ("objective.direction=reverse", "objective.temperature=4"), run="distill"
    ),
    "grpo_run": Case("tp=2,ep=2", (), run="tiny/grpo"),
    "rlaif": Case("tp=2,ep=2", (), run="tiny/rlaif"),
    "grpo": Case("tp=2,cp=2,ep=2", _policy("grpo")),
    "gspo": Case("cp=2,dp=2", _policy("gspo", clip_low=0.02, clip_high=0.02)),
    "dr_grpo": Case("pp=2,vpp=2", _policy("dr_grpo", constant_length=50)),
    "cispo": Case("tp=2,dp=2", _policy("cispo", clip_low=0.1, clip_high=0.1)),
    "spo_minimind": Case("pp=2,cp=2", _policy("spo_minimind")),
    "adapters_of_experts": Case("ep=2,dp=2", ("adapters={rank: 2, experts: true}",)),
    # ------------------------------------------------- faster kernels, and overlapped sums
    "fused_swiglu": Case("tp=2,ep=2", ("training.fused.activation=true", BALANCED)),
    "overlapped_gradients": Case(
        "ep=2,dp=2,pp=2", ("parallelism.overlap_grad_reduce=true", BALANCED)
    ),
    "overlapped_shared_experts": Case(
        "tp=2,ep=2,dp=2",
        ("parallelism.overlap_shared_experts=true", "training.fused.activation=true")
        + ("parallelism.overlap_grad_reduce=true",),
    ),
    "a_gpus_settings": Case(  # the twin leaves out what only a GPU has
        "cp=2,ep=2",
        ("parallelism.moe_dispatcher=deepep", "parallelism.context=2", "parallelism.expert=2")
        + ("parallelism.context_exchange=all_gather", "training.cuda_graphs=[mamba]")
        + ("training.fused={permutation: true, router: true, weight_gradients: true}",),
    ),
    # ---------------------------------------------------------------------- the optimizers
    "whole_optimizer_everywhere": Case("tp=2,dp=2", ("parallelism.distributed_optimizer=false",)),
    "adamw": Case("tp=2,dp=2", ("optimizer.matrices=adamw", "optimizer.clip_gradient_norm=0")),
    "adamw_rates": Case(
        "tp=2,cp=2",
        ("optimizer.adamw.learning_rates={ssm: 1e-3, matrix: 2e-3, bias: 1e-3, conv: 5e-4}",)
        + ("optimizer.matrices=adamw", "optimizer.adamw.weight_decay=0.1"),
    ),
    "soap": Case("tp=2,ep=2,dp=2", ("optimizer.matrices=soap",)),
    "soap_one_side": Case(
        "tp=2,cp=2", ("optimizer.matrices=soap", "optimizer.soap.max_dimension=128")
    ),
    "soap_no_momentum": Case("pp=2,ep=2", ("optimizer.matrices=soap", "optimizer.soap.beta1=0")),
    "cosmos": Case("tp=2,ep=2,dp=2", ("optimizer.matrices=cosmos",)),
    "cosmos_small_rank": Case(
        "tp=2,cp=2",
        ("optimizer.matrices=cosmos", "optimizer.cosmos.rank=4", "optimizer.cosmos.beta1=0")
        + ("optimizer.cosmos.coefficients=quintic", "optimizer.cosmos.muon_weight=1"),
    ),
    "cosmos_no_muon": Case(
        "ep=2,dp=2", ("optimizer.matrices=cosmos", "optimizer.cosmos.muon_weight=0")
    ),
    "muon_plain": Case(
        "tp=2,ep=2",
        ("optimizer.muon.nesterov=false", "optimizer.muon.momentum=0")
        + ("optimizer.muon.scale=unit_rms_norm", "optimizer.muon.coefficients=polar_express"),
    ),
    "muon_shape": Case(
        "tp=2,cp=2",
        ("optimizer.muon.scale=shape_scaling", "optimizer.muon.coefficients=cans")
        + ("optimizer.muon.newton_schulz_steps=8", "optimizer.muon.matmul_precision=medium"),
    ),
    "muon_aol": Case("tp=2,pp=2", ("optimizer.muon.coefficients=aol",)),
    "overrides": Case(
        "tp=2,ep=2",
        (
            "optimizer.overrides=[{pattern: '*.linear_kv_down_proj.weight', optimizer: adamw}, "
            "{pattern: 'decoder.layers.4.*.in_proj.weight', split: false}, "
            "{pattern: '*.router.weight', optimizer: muon, weight_decay: 0.0}, "
            "{pattern: '*.local_experts.5.*', optimizer: cosmos, learning_rate: 1e-3}, "
            "{pattern: 'output_layer.weight', optimizer: soap}]",
        ),
    ),
    "small_epsilons": Case(
        "tp=2,ep=2",
        (
            "optimizer.matrices=soap",
            "optimizer.soap.epsilon=1e-12",
            "optimizer.adamw.epsilon=1e-12",
            "optimizer.cosmos.epsilon=1e-12",
            "optimizer.overrides=[{pattern: output_layer.weight, optimizer: soap}, "
            "{pattern: '*.local_experts.*', optimizer: cosmos}]",
        ),
    ),
    "free_muon": Case("tp=2,dp=2", FREE),
    "free_adamw": Case("cp=2,dp=2", (*FREE, "optimizer.matrices=adamw")),
    "free_soap": Case(
        "tp=2,ep=2",
        ("optimizer.matrices=soap", "optimizer.schedule.kind=constant")
        + ("optimizer.schedule_free={beta: 0.9, matrix_momentum: 0.9}",),
    ),
    "free_cosmos": Case("tp=2,pp=2", (*FREE, "optimizer.matrices=cosmos")),
    # -------------------------------------------------------------------- shipped models
    "llama": Case("tp=2,pp=2", ("model=llama_1b", "parallelism.expert=1")),
    "qwen": Case("tp=4", ("model=qwen2_1.5b", "parallelism.expert=1", "parallelism.tensor=4")),
    "mamba2": Case(
        "cp=2,dp=2",
        ("model=mamba2_1.3b", "parallelism.expert=1", "parallelism.tensor=1")
        + ("parallelism.sequence=false",),
    ),
    "deepseek": Case("tp=2,ep=2,dp=2", ("model=deepseek_v2_lite_16b",)),
    "pretrain_3b": Case("tp=2,ep=2", (), "pretrain_3b"),
}


def certify_case(case: Case) -> dict:
    """The certificate's values; `error` alone where it could not be made."""
    from equilibrium_mcore.certify.certificate import certify_run
    from equilibrium_mcore.certify.twin import shrink_layout
    from equilibrium_mcore.config.load import load_run

    root = Path(__file__).parents[2]
    config = load_run(root / "configs" / "runs" / f"{case.run}.yaml", list(case.overrides))
    alone = {"tensor": 1, "sequence": False, "expert": 1, "context": 1, "pipeline": 1}
    config = config.model_copy(
        update={
            "parallelism": config.parallelism.model_copy(
                update=alone | {"world_size": 1, "virtual_pipeline": 1}
            )
        }
    )
    assert not shrink_layout(config)
    return certify_run(config, tier="layouts", layouts=[case.layout]).as_dict()


def main() -> int:
    """Certify the cases named on the command line, or all."""
    from equilibrium_mcore.parallel import accelerator

    accelerator.install()
    accelerator.quiet_libraries()
    output, *names = sys.argv[1:]
    said = {}
    for name in names or CASES:
        try:
            said[name] = certify_case(CASES[name])
        except Exception:
            said[name] = {"error": traceback.format_exc()}
        Path(output).write_text(json.dumps(said))
    return 0


if __name__ == "__main__":
    sys.exit(main())
