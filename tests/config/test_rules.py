"""Every rule once broken and once kept; messages give the values and the allowed choices."""

from __future__ import annotations

from dataclasses import replace

import pytest

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.rule_kit import Host
from equilibrium_mcore.config.rules import RULES, check

TINY_ATTENTION = {"num_heads": 8, "num_query_groups": 4, "head_dim": 16}
GPU = Host(
    has_cuda=True,
    has_transformer_engine=True,
    has_mamba_ssm=True,
    device_name="H100",
    compute_capability=(9, 0),
)
BLACKWELL = Host(True, True, True, "B200", (10, 0))
CPU = Host()
EP_GPU = replace(GPU, has_deep_ep=True)
# The pattern without MLA, so that GQA can stand in.
GQA = {"model.layer_pattern": "ME|*E", "model.attention": TINY_ATTENTION}
DENSE = {"model.layer_pattern": "M-|+-", "model.mlp": {"ffn_hidden_size": 256}}
CAPPED = [{"name": "code", "prefix": "data/code", "weight": 1, "max_epochs": 2}]
PP2 = {"parallelism.pipeline": 2}
SP = {"parallelism.sequence": True}

ONLINE = {
    "stage": "grpo",
    "data": {
        "type": "prompts",
        "name": "prompts",
        "tokenizer": {"type": "SentencePieceTokenizer", "model": "tokenizer.model"},
        "sources": [{"name": "sums", "train": ["prompts.jsonl"]}],
    },
    "objective": {"type": "policy"},
    "rollout": {"max_new_tokens": 16},
    "rewards": [{"type": "math_answer"}],
    "checkpoint.initial_weights": "runs/sft",
    "model.moe.load_balancing": "none",
    "model.moe.expert_bias_update_rate": 0.0,
}
SERVED = {
    "model.layer_pattern": "*-|*-",
    "model.attention": TINY_ATTENTION,
    "model.mlp": {"ffn_hidden_size": 256},
}
SERVER = {"max_new_tokens": 16, "engine": "http", "http": {"url": "http://host:8000"}}
# The rest of what pairs of own answers have.
JUDGED = {
    **{key: value for key, value in ONLINE.items() if key != "rewards"},
    "stage": "rlaif",
    "objective": {"type": "dpo"},
    "rollout": {"max_new_tokens": 16, "samples_per_prompt": 2},
    "judge": {"type": "http", "url": "http://host:8000", "model": "large"},
}
CHATS = {
    "type": "conversations",
    "name": "chats",
    "tokenizer": {"type": "SentencePieceTokenizer", "model": "t.model"},
    "sources": [{"name": "general", "train": ["general.train.jsonl"]}],
}
SINGLE = {**CHATS, "type": "preferences", "unpaired": True}
SFT = {"stage": "sft", "data": CHATS, "objective": {"type": "sft"}}

# rule, a run that breaks it, words that the message must have, a run that keeps it.
# A key "world_size" or "host" is a fact, not a setting.
CASES = [
    ("steps_or_epochs", {"training.epochs": 2.0}, ["steps=", "epochs=2", "null"], {}),
    (
        "steps_or_epochs",
        {"training.steps": None},
        ["training.steps: missing", "training.epochs"],
        {"training.steps": None, "training.epochs": 2.0},
    ),
    (
        "layers_can_be_built",
        {"model.layer_pattern": "M" * 10_001},
        ["model.layer_pattern", "10,001 letters", "at most 10,000"],
        {"model.layer_pattern": "M" * 10_000},
    ),
    (
        "the_host_can_hold_it",
        {"model.hidden_size": 2**30, "host": Host(memory_gib=64.0)},
        ["weights", "GiB with their gradients", "this host has 64 GiB"],
        {"model.hidden_size": 2**30, "host": GPU},
    ),
    (
        "the_host_can_hold_it",
        {"training.sequence_length": 2**30, "host": Host(memory_gib=64.0)},
        ["sequence_length=1073741824", "logits", "64 GiB"],
        {"host": Host(memory_gib=64.0)},
    ),
    (
        "a_stage_has_its_data",
        {"stage": "sft", "data.type": "indexed"},
        ["data.type='indexed'", "stage='sft'", "pretrain or midtrain"],
        SFT,
    ),
    (
        "a_stage_starts_from_weights",
        {"stage": "midtrain"},
        ["stage='midtrain'", "checkpoint.initial_weights"],
        {
            "stage": "midtrain",
            "checkpoint.initial_weights": "runs/before",
            "optimizer.schedule.decay_steps": 100,
        },
    ),
    (
        "validation_has_documents",
        {**SFT, "training.validation_interval_steps": 5},
        ["validation_interval_steps=5", "data.sources.0.validation"],
        SFT,
    ),
    (
        "packed_documents_divide",
        {**SFT, "parallelism.context": 2},
        ["document_multiple=1 with data.type: conversations", "multiple of 4"],
        {**SFT, "data": {**CHATS, "document_multiple": 4}, "parallelism.context": 2},
    ),
    (
        "packed_documents_divide",
        {"data.packing": "documents", "parallelism.context": 2},
        ["document_multiple=1", "context=2", "multiple of 4"],
        {"data.packing": "documents", "data.document_multiple": 8, "parallelism.context": 2},
    ),
    (
        "packed_documents_divide",
        {"data.packing": "documents", "data.document_multiple": 7},
        ["document_multiple=7", "sequence_length="],
        {"data.packing": "documents", "data.document_multiple": 8},
    ),
    (
        "packing_keeps_sequences_apart",
        {
            "data.packing": "documents",
            "model.moe.load_balancing": "seq_aux_loss",
            "training.micro_batch_size": 2,
        },
        ["seq_aux_loss", "micro_batch_size=2"],
        {"data.packing": "documents", "model.moe.load_balancing": "seq_aux_loss"},
    ),
    (
        "global_balance_sees_the_batch",
        {
            "model.moe.load_balancing": "global_aux_loss",
            "training.micro_batch_size": 2,
            "training.global_batch_size": 16,
            "parallelism.world_size": 2,
        },
        ["4 micro-batches", "micro_batch_size=8", "8 data-parallel ranks"],
        {
            "model.moe.load_balancing": "global_aux_loss",
            "training.micro_batch_size": 8,
            "training.global_batch_size": 16,
            "parallelism.world_size": 2,
        },
    ),
    ("letters_are_known", {"model.layer_pattern": "MXE"}, ["'X'", "E moe"], {}),
    ("letters_are_known", {"model.layer_pattern": "|"}, ["no layers"], {}),
    ("letters_have_their_sections", {"model.mamba": None}, ["uses M", "model.mamba"], {}),
    (
        "letters_have_their_sections",
        {"model.layer_pattern": "M-|+-"},
        ["model.mlp is missing"],
        DENSE,
    ),
    # A section that no letter uses is fine.
    (
        "attention_kinds_do_not_mix",
        {"model.layer_pattern": "*E+E", "model.attention": TINY_ATTENTION},
        ["mixes * (GQA) and + (MLA)"],
        {"model.attention": TINY_ATTENTION},
    ),
    (
        "pattern_has_no_empty_segment",
        {"model.layer_pattern": "ME||+E"},
        ["segment 2 of 3", "'ME|+E'"],
        {"model.layer_pattern": "ME|+E"},
    ),
    (
        "groups_divide_heads",
        {"model.mamba.num_groups": 3},
        ["num_groups=3", "num_heads=16", "1, 2, 4, 8, 16"],
        {"model.mamba.num_groups": 16},
    ),
    (
        "groups_divide_heads",
        {**GQA, "model.attention": {**TINY_ATTENTION, "num_query_groups": 3}},
        ["num_query_groups=3", "1, 2, 4, 8"],
        GQA,
    ),
    (
        "rope_widths_are_even",
        {"model.mla.qk_rope_head_dim": 7},
        ["qk_rope_head_dim=7", "6 or 8"],
        {"model.mla.qk_rope_head_dim": 8},
    ),
    (
        "rope_widths_are_even",
        {**GQA, "model.attention": {**TINY_ATTENTION, "head_dim": 9}},
        ["head_dim=9"],
        {**GQA, "model.attention": {**TINY_ATTENTION, "head_dim": 9, "rope_base": None}},
    ),
    (
        "channel_mixers_share_an_activation",
        {
            "model.layer_pattern": "ME|M-",
            "model.mlp": {"ffn_hidden_size": 64, "activation": "gelu"},
        },
        ["model.mlp.activation='gelu'", "'swiglu'"],
        {"model.layer_pattern": "ME|M-", "model.mlp": {"ffn_hidden_size": 64}},
    ),
    ("router_can_choose", {"model.moe.top_k": 9}, ["top_k=9", "num_experts=8"], {}),
    (
        "router_can_choose",
        {"model.moe.score_function": "softmax"},
        ["expert_bias", "'softmax'"],
        {"model.moe.score_function": "softmax", "model.moe.expert_bias": False},
    ),
    (
        "router_can_choose",
        {"model.moe.normalize_top_k": False},
        ["normalize_top_k=false", "sigmoid"],
        {"model.moe.normalize_top_k": False, "model.moe.top_k": 1},
    ),
    (
        "router_can_choose",
        {"model.moe": {"score_function": "softmax", "expert_bias": False, "top_k": 1}},
        ["top_k=1", "learns nothing"],
        {
            "model.moe": {
                "score_function": "softmax",
                "expert_bias": False,
                "top_k": 1,
                "normalize_top_k": False,
            }
        },
    ),
    (
        "tensor_divides",
        {"parallelism.tensor": 8, **SP},
        ["tensor=8", "model.mamba.num_groups=4", "use 1, 2, 4"],
        {"parallelism.tensor": 4, **SP},
    ),
    (
        "tensor_divides",
        {"parallelism.tensor": 2, **SP, "model.mamba": {"num_heads": 15, "num_groups": 3}},
        ["tensor=2", "model.mamba.num_heads=15"],
        {"model.mamba": {"num_heads": 15, "num_groups": 3}},
    ),
    (
        "tensor_divides",
        {"parallelism.tensor": 4, **SP, "model.mla.num_heads": 6},
        ["model.mla.num_heads=6", "use 1, 2"],
        {"parallelism.tensor": 2, **SP, "model.mla.num_heads": 6},
    ),
    (
        "tensor_divides",
        {**GQA, "parallelism.tensor": 4, **SP, "model.attention.num_heads": 6},
        ["model.attention.num_heads=6"],
        {**GQA, "parallelism.tensor": 4, **SP},
    ),
    (
        "tensor_divides",
        {"model": "qwen2_1.5b", "parallelism.tensor": 3},
        ["num_query_groups=2", "use 1, 2, 4"],
        {"model": "qwen2_1.5b", "parallelism.tensor": 4},
    ),
    (
        "tensor_divides",
        {**DENSE, "model.mlp": {"ffn_hidden_size": 255}, "parallelism.tensor": 2},
        ["model.mlp.ffn_hidden_size=255"],
        {**DENSE, "parallelism.tensor": 2},
    ),
    (
        "tensor_divides",
        {"model.moe.shared_ffn_hidden_size": 99, "parallelism.tensor": 2, **SP},
        ["shared_ffn_hidden_size=99"],
        {"model.moe.shared_ffn_hidden_size": 0, "parallelism.tensor": 2, **SP},
    ),
    (
        "tensor_divides",
        {"model": {"vocab_size": 101, "vocab_size_multiple": 1}, "parallelism.tensor": 2, **SP},
        ["padded vocabulary=101"],
        {"model": {"vocab_size": 101, "vocab_size_multiple": 2}, "parallelism.tensor": 2, **SP},
    ),
    (
        "sequence_parallel_needs_tensor",
        SP,
        ["sequence=true", "tensor=1"],
        {"parallelism.tensor": 2, **SP},
    ),
    (
        "moe_with_tensor_needs_sequence",
        {"parallelism.tensor": 2},
        ["tensor=2", "set sequence: true"],
        {"parallelism.tensor": 2, **SP},
    ),
    (
        "pipeline_fits_pattern",
        {"parallelism.pipeline": 3},
        ["pipeline=3", "4 segments", "1, 2, 4", "e.g. model.layer_pattern="],
        {"parallelism.pipeline": 4},
    ),
    (
        "pipeline_fits_pattern",
        {"model.layer_pattern": "MEMEME+E", "parallelism.pipeline": 2},
        ["1 segment ", "'MEME|ME+E'"],
        {"model.layer_pattern": "MEME|ME+E", "parallelism.pipeline": 2},
    ),
    (
        "pipeline_fits_pattern",
        {"parallelism.virtual_pipeline": 2},
        ["virtual_pipeline=2", "pipeline=1"],
        {**PP2, "parallelism.virtual_pipeline": 2},
    ),
    (
        "pipeline_fits_pattern",
        {"parallelism.pipeline": 16},
        ["16 stages", "8 layers", "at most 8"],
        PP2,
    ),
    (
        "experts_divide",
        {"parallelism.expert": 3},
        ["expert=3", "num_experts=8", "1, 2, 4, 8"],
        {"parallelism.expert": 8},
    ),
    (
        "experts_divide",
        {"parallelism.expert_tensor": 5},
        ["expert_tensor=5", "=96"],
        {"parallelism.expert_tensor": 2},
    ),
    ("experts_divide", {**DENSE, "parallelism.expert": 2}, ["expert=2", "no MoE layer"], DENSE),
    (
        "context_divides_layers",
        {"parallelism.context": 3, "training.sequence_length": 96},
        ["context=3", "model.mamba.num_heads=16", "1, 2, 4, 8, 16"],
        {"parallelism.context": 2},
    ),
    # 4 groups over 2 TP ranks leave 2, repeated over 4 CP ranks; 3 groups do not fit 2.
    (
        "context_divides_layers",
        {"parallelism.context": 2, "model.mamba": {"num_heads": 12, "num_groups": 3}},
        ["context=2", "num_groups=3", "use 1, 3, 6, 12"],
        {"parallelism.context": 4, "parallelism.tensor": 2, **SP},
    ),
    (
        "context_divides_layers",
        {"parallelism.context": 16},
        ["context=16", "model.mla.num_heads=8", "1, 2, 4, 8"],
        {"parallelism.context": 8},
    ),
    (
        "context_divides_layers",
        {**GQA, "parallelism": {"context": 8, "tensor": 2, "sequence": True}},
        ["context=8", "num_heads=8 / tensor=2 = 4", "use 1, 2, 4"],
        {**GQA, "parallelism": {"context": 4, "tensor": 2, "sequence": True}},
    ),
    (
        "data_lasts_the_run",
        {"data.order": "megatron", "data.train_samples": 10},
        ["data.train_samples=10", "or more, or null"],
        {"data.order": "megatron", "data.train_samples": 10**9},
    ),
    (
        "ledger_settings_have_a_ledger",
        {"data.order": "megatron", "data.packing": "documents"},
        ["data.packing='documents'", "set data.order: ledger"],
        {"data.packing": "documents"},
    ),
    (
        "ledger_settings_have_a_ledger",
        {"data.order": "megatron", "data.sources": CAPPED},
        ["data.sources.0.max_epochs=2.0", "set data.order: ledger"],
        {"data.sources": CAPPED},
    ),
    (
        "samples_can_be_left_out",
        {"data.order": "megatron", "training.left_out": [[8, 4]]},
        ["training.left_out=[[8, 4]]", "set data.order: ledger"],
        {"training.left_out": [[8, 4]]},
    ),
    (
        "samples_can_be_left_out",
        {"data.order": "megatron", "training.anomalies": {"policy": "rollback"}},
        ["training.anomalies.policy=rollback", "set data.order: ledger"],
        {"data.order": "megatron", "training.anomalies": {"policy": "skip"}},
    ),
    (
        "sequence_length_divides",
        {"parallelism.context": 2, "training.sequence_length": 66},
        ["sequence_length=66", "context=2", "64 or 68"],
        {"parallelism.context": 2, "training.sequence_length": 68},
    ),
    (
        "sequence_length_divides",
        {"parallelism.tensor": 4, **SP, "training.sequence_length": 62},
        ["sequence_length=62", "tensor=4", "60 or 64"],
        {"parallelism.tensor": 4, **SP, "training.sequence_length": 60},
    ),
    (
        "world_size_fits",
        {"parallelism": {"tensor": 2, "sequence": True}, "world_size": 3},
        ["world size 3", "tensor=2", "start 2, 4, 6, 8"],
        {"parallelism": {"tensor": 2, "sequence": True}, "world_size": 4},
    ),
    (
        "world_size_fits",
        {"parallelism": {"expert": 4, "expert_tensor": 2}, "world_size": 4},
        ["world size 4", "expert=4 * expert_tensor=2", "start 8, 16"],
        {"parallelism": {"expert": 4, "expert_tensor": 2}, "world_size": 8},
    ),
    (
        "world_size_fits",
        {"parallelism.world_size": 2, "world_size": 4},
        ["world_size=2", "started 4"],
        {"parallelism.world_size": 4, "world_size": 4},
    ),
    (
        "batch_divides",
        {"training.global_batch_size": 9, "world_size": 4},
        ["global_batch_size=9", "data-parallel size 4", "8 or 12"],
        {"training.global_batch_size": 12, "world_size": 4},
    ),
    (
        "batch_divides",
        {**PP2, "parallelism.virtual_pipeline": 2, "training.global_batch_size": 3},
        ["3 micro-batches", "pipeline=2", "2 or 4"],
        {**PP2, "parallelism.virtual_pipeline": 2, "training.global_batch_size": 4},
    ),
    (
        "schedule_fits_steps",
        {"optimizer.schedule.warmup_steps": 101},
        ["warmup_steps=101", "steps=100"],
        {"optimizer.schedule.warmup_steps": 100},
    ),
    (
        "schedule_fits_steps",
        {"optimizer.schedule": {"kind": "wsd", "warmup_steps": 60, "decay_steps": 60}},
        ["decay_steps=60", "at least 120"],
        {"optimizer.schedule": {"kind": "wsd", "warmup_steps": 60, "decay_steps": 40}},
    ),
    (
        "schedule_fits_steps",
        {"optimizer.schedule.kind": "wsd"},
        ["decay_steps=0", "1 to 100"],
        {"optimizer.schedule": {"kind": "wsd", "decay_steps": 10}},
    ),
    ("moments_forget", {"optimizer.adamw.beta2": 1}, ["beta2=1"], {"optimizer.adamw.beta2": 0.99}),
    (
        "moments_forget",
        {"optimizer.schedule_free.beta": 1, "optimizer.schedule.kind": "constant"},
        ["schedule_free.beta=1"],
        {"optimizer.schedule_free.beta": 0.9, "optimizer.schedule.kind": "constant"},
    ),
    (
        "schedule_free_has_no_decay",
        {"optimizer.schedule_free": {}},
        ["kind='cosine'", "kind: constant"],
        {"optimizer.schedule_free": {}, "optimizer.schedule.kind": "constant"},
    ),
    (
        "overrides_change_something",
        {"optimizer.overrides": [{"pattern": "*.out_proj.weight"}]},
        ["optimizer.overrides.0", "'*.out_proj.weight'", "learning_rate"],
        {"optimizer.overrides": [{"pattern": "*.out_proj.weight", "split": False}]},
    ),
    (
        "stop_is_within_the_run",
        {"training.stop_after_steps": 101},
        ["stop_after_steps=101", "steps=100"],
        {"training.stop_after_steps": 100},
    ),
    (
        "a_named_step_is_resumed",
        {"checkpoint.resume_step": 8},
        ["checkpoint.resume_step=8", "checkpoint.resume='auto'"],
        {"checkpoint": {"resume_step": 8, "resume": "must"}},
    ),
    (
        "recompute_has_its_layers",
        {"training": {"recompute": "selective", "recompute_modules": ["mlp"]}},
        ["'mlp'", "no mlp layer"],
        {"training": {"recompute": "selective", "recompute_modules": ["moe", "mla_up_proj"]}},
    ),
    (
        "recompute_has_its_layers",
        {"training": {"recompute": "selective", "recompute_modules": []}},
        ["recomputes nothing"],
        {"training.recompute": "full"},
    ),
    (
        "recompute_has_its_layers",
        {
            "training": {
                "recompute": "selective",
                "recompute_modules": ["moe_act"],
                "precision": "fp8",
                "fp8_recipe": "delayed",
            }
        },
        ["'moe_act'", "'delayed'"],
        {
            "training": {
                "recompute": "selective",
                "recompute_modules": ["moe_act"],
                "precision": "fp8",
            }
        },
    ),
    (
        "recompute_has_its_layers",
        {
            "training": {
                "recompute": "selective",
                "recompute_modules": ["moe_act"],
                "backend": "torch",
            }
        },
        ["'moe_act'", "backend='torch'"],
        {
            "training": {
                "recompute": "selective",
                "recompute_modules": ["moe"],
                "backend": "torch",
            }
        },
    ),
    (
        "delayed_scaling_is_not_resumed",
        {"training": {"precision": "fp8", "fp8_recipe": "delayed"}},
        ["'delayed'", "checkpoint.resume='auto'", "tensorwise or blockwise"],
        {"training": {"precision": "fp8", "fp8_recipe": "delayed"}, "checkpoint.resume": "never"},
    ),
    (
        "delayed_scaling_is_not_resumed",
        {
            "training": {
                "precision": "fp8",
                "fp8_recipe": "delayed",
                "anomalies": {"policy": "rollback"},
            },
            "checkpoint.resume": "never",
        },
        ["'delayed'", "policy='rollback'"],
        {"training": {"precision": "fp8", "anomalies": {"policy": "rollback"}}},
    ),
    (
        "host_can_do_it",
        {
            "training": {"recompute": "selective", "recompute_modules": ["moe_act"]},
            "host": CPU,
        },
        ["'moe_act'", "needs a CUDA GPU"],
        {
            "training": {"recompute": "selective", "recompute_modules": ["moe_act"]},
            "host": GPU,
        },
    ),
    (
        "sources_are_told_apart",
        {"data.sources": [{"name": "a", "prefix": p, "weight": 1} for p in ("x", "y")]},
        ["2 sources", "'a'"],
        {},
    ),
    (
        "sources_are_told_apart",
        {"data.sources": [{"name": "a", "prefix": "x.bin", "weight": 1}]},
        ["'x.bin'", "use 'x'"],
        {"data.sources": [{"name": "a", "prefix": "x.v2", "weight": 1}]},
    ),
    ("split_is_good", {"data.split": "98;1"}, ["'98;1'", "98,1,1"], {"data.split": "98, 2"}),
    ("split_is_good", {"data.split": "1,1,1,1"}, ["three numbers"], {"data.split": "1"}),
    ("split_is_good", {"data.split": "2,-1,1"}, ["at least 0"], {"data.split": "0.9,0.1"}),
    ("split_is_good", {"data.split": "0,1,1"}, ["nothing to train on"], {}),
    (
        "validation_has_documents",
        {"data.split": "1,0,0", "training.validation_interval_steps": 5},
        ["validation_interval_steps=5", "'1,0,0'"],
        {"data.split": "1,0,0"},
    ),
    (
        "tokenizer_matches_its_file",
        {"data.tokenizer.model": "tokenizer.json"},
        ["tokenizer.json", "HuggingFaceTokenizer"],
        {"data.tokenizer": {"type": "HuggingFaceTokenizer", "model": "tokenizer.json"}},
    ),
    (
        "fp8_widths_are_multiples",
        {"training.precision": "fp8", "model.mamba.num_heads": 8},
        ["num_heads) / tensor = 520", "512 or 528"],
        {"training.precision": "fp8"},
    ),
    (
        "fp8_needs_transformer_engine",
        {"training.precision": "fp8", "training.backend": "torch"},
        ["backend='torch'"],
        {"training.precision": "fp8"},
    ),
    (
        "host_can_do_it",
        {"training.precision": "fp16", "host": CPU},
        ["'fp16'", "CUDA GPU", "fp32 or bf16"],
        {"training.precision": "fp16", "host": GPU},
    ),
    (
        "host_can_do_it",
        {"training.precision": "fp8", "host": CPU},
        ["'fp8'", "CUDA GPU"],
        {"training.precision": "fp8", "host": GPU},
    ),
    (
        "host_can_do_it",
        {"training.precision": "fp8", "host": Host(has_cuda=True, device_name="H100")},
        ["Transformer Engine", "not installed"],
        {"training.precision": "bf16", "host": Host(has_cuda=True, device_name="H100")},
    ),
    (
        "host_can_do_it",
        {"training.precision": "fp8", "training.fp8_recipe": "mxfp8", "host": GPU},
        ["'mxfp8'", "10.0", "tensorwise or delayed or blockwise"],
        {"training.precision": "fp8", "training.fp8_recipe": "mxfp8", "host": BLACKWELL},
    ),
    (
        "host_can_do_it",
        {"training.backend": "transformer_engine", "host": CPU},
        ["backend='transformer_engine'", "torch or auto"],
        {"training.backend": "transformer_engine", "host": GPU},
    ),
    (
        "fused_activation_is_swiglu",
        {"training.fused.activation": True, "model.moe.activation": "relu2"},
        ["fused.activation=true", "model.moe.activation='relu2'", "swiglu"],
        {"training.fused.activation": True},
    ),
    (
        "fused_activation_is_swiglu",
        {"training.fused.activation": True, "model.layer_pattern": "M|+"},
        ["fused.activation=true", "no MLP or MoE layer"],
        {"training.fused.activation": True},
    ),
    (
        "fused_cross_entropy_is_half_precision",
        {"training": {"fused": {"cross_entropy": True}, "precision": "fp32"}},
        ["fused.cross_entropy=true", "'fp32'", "bf16 or fp8"],
        {"training": {"fused": {"cross_entropy": True}, "precision": "bf16"}},
    ),
    (
        "fused_experts_need_experts",
        {**DENSE, "training.fused.router": True},
        ["fused.router=true", "no MoE layer"],
        {"training.fused": {"router": True, "permutation": True}, "host": GPU},
    ),
    (
        "engines_kernels_need_the_engine",
        {"training.fused.permutation": True, "host": CPU},
        ["fused.permutation=true", "Transformer Engine on a GPU", "lacks a CUDA GPU"],
        {"training.fused.permutation": True, "host": GPU},
    ),
    (
        "engines_kernels_need_the_engine",
        {"training.fused.weight_gradients": True, "training.backend": "torch"},
        ["fused.weight_gradients=true", "backend='torch'"],
        {"training.fused.weight_gradients": True},
    ),
    (
        "engines_kernels_need_the_engine",
        {"training.cuda_graphs": ["mamba"], "host": replace(GPU, has_transformer_engine=False)},
        ["cuda_graphs=['mamba']", "lacks Transformer Engine"],
        {"training.cuda_graphs": ["mamba", "attn", "moe_router"], "host": GPU},
    ),
    (
        "graphs_have_their_layers",
        {"training.cuda_graphs": ["mlp"]},
        ["'mlp'", "mamba, attn, moe_router"],
        {**DENSE, "training.cuda_graphs": ["mlp", "attn"]},
    ),
    (
        "graphs_have_their_layers",
        {"training": {"cuda_graphs": ["mamba"], "recompute": "full"}},
        ["cuda_graphs=['mamba']", "recompute='full'"],
        {"training": {"cuda_graphs": ["mamba"], "recompute": "selective"}},
    ),
    (
        "graphs_have_their_layers",
        {"training.cuda_graphs": ["mamba"], "data.packing": "documents"},
        ["cuda_graphs=['mamba']", "packed documents"],
        {"data.packing": "documents"},
    ),
    (
        "shared_experts_can_overlap",
        {"parallelism.overlap_shared_experts": True, "model.moe.shared_ffn_hidden_size": 0},
        ["overlap_shared_experts=true", "no shared experts"],
        {"parallelism.overlap_shared_experts": True},
    ),
    (
        "shared_experts_can_overlap",
        {"parallelism": {"overlap_shared_experts": True, "moe_dispatcher": "allgather"}},
        ["overlap_shared_experts=true", "'allgather'"],
        {"parallelism": {"overlap_shared_experts": True, "moe_dispatcher": "alltoall"}},
    ),
    (
        "flex_dispatchers_have_ranks_and_libraries",
        {"parallelism.moe_dispatcher": "deepep", "host": EP_GPU},
        ["'deepep'", "parallelism.expert=1"],
        {"parallelism": {"moe_dispatcher": "deepep", "expert": 2}, "host": EP_GPU},
    ),
    (
        "flex_dispatchers_have_ranks_and_libraries",
        {"parallelism": {"moe_dispatcher": "hybridep", "expert": 2}, "host": EP_GPU},
        ["'hybridep'", "needs HybridEP"],
        {
            "parallelism": {"moe_dispatcher": "hybridep", "expert": 2},
            "host": replace(EP_GPU, has_hybrid_ep=True),
        },
    ),
    (
        "flex_dispatchers_have_ranks_and_libraries",
        {
            "parallelism": {"moe_dispatcher": "deepep", "expert": 2},
            "training.backend": "torch",
        },
        ["'deepep'", "backend='torch'"],
        {"parallelism": {"moe_dispatcher": "alltoall", "expert": 2}, "training.backend": "torch"},
    ),
    (
        "context_exchange_suits_the_heads",
        {"parallelism.context_exchange": "a2a"},
        ["context_exchange='a2a'", "parallelism.context=1"],
        {"parallelism": {"context_exchange": "a2a", "context": 2}},
    ),
    (
        "context_exchange_suits_the_heads",
        {"parallelism": {"context_exchange": "p2p", "context": 2}, "host": CPU},
        ["context_exchange='p2p'", "lacks a CUDA GPU", "a2a or null"],
        {"parallelism": {"context_exchange": "p2p", "context": 2}, "host": GPU},
    ),
    (
        "context_exchange_suits_the_heads",
        {
            **GQA,
            "model.attention": {**TINY_ATTENTION, "num_query_groups": 2},
            "parallelism": {"context_exchange": "a2a", "context": 4},
        },
        ["context_exchange='a2a'", "num_query_groups=2", "another exchange"],
        {
            **GQA,
            "model.attention": {**TINY_ATTENTION, "num_query_groups": 2},
            "parallelism": {"context_exchange": "a2a", "context": 4},
            "training.backend": "torch",
        },
    ),
    (
        "buckets_are_for_overlap",
        {"parallelism.gradient_bucket_size": 1000},
        ["gradient_bucket_size=1000", "overlap_grad_reduce: true"],
        {"parallelism": {"gradient_bucket_size": 1000, "overlap_grad_reduce": True}, "host": CPU},
    ),
    (
        "an_objective_has_its_data",
        {"objective": {"type": "dpo"}},
        ["objective.type='dpo'", "data.type='indexed'", "pairs of answers"],
        {},
    ),
    (
        "an_objective_has_its_data",
        {"stage": "orpo", "data": {**CHATS, "type": "preferences"}, "objective": {"type": "sft"}},
        ["objective.type='sft'", "an objective of pairs"],
        {"stage": "orpo", "data": {**CHATS, "type": "preferences"}, "objective": {"type": "orpo"}},
    ),
    (
        "an_objective_has_its_data",
        {"stage": "orpo", "data": {**CHATS, "type": "preferences"}, "objective": {"type": "kto"}},
        ["objective.type='kto'", "data.unpaired: true"],
        {"stage": "orpo", "data": SINGLE, "objective": {"type": "kto"}},
    ),
    (
        "kto_needs_several_answers",
        {
            "stage": "orpo",
            "data": SINGLE,
            "objective": {"type": "kto"},
            "training.global_batch_size": 1,
            "training.micro_batch_size": 1,
        },
        ["global_batch_size=1", "set 2 or more"],
        {"stage": "orpo", "data": SINGLE, "objective": {"type": "kto"}},
    ),
    (
        "an_objective_has_its_head",
        {"model.head": "scalar"},
        ["model.head='scalar'", "objective.type='next_token'", "set model.head: output"],
        {"model.head": "both"},
    ),
    (
        "an_objective_has_its_head",
        {"model.head": "both", "parallelism.overlap_grad_reduce": True},
        ["model.head='both'", "overlap_grad_reduce: false"],
        {"model.head": "output", "parallelism.overlap_grad_reduce": True},
    ),
    (
        "distillation_is_a_stage",
        {"objective": {"type": "distillation", "teacher": "runs/teacher"}},
        ["objective.type='distillation'", "stage='pretrain'"],
        {"stage": "distill", "objective": {"type": "distillation", "teacher": "runs/teacher"}},
    ),
    (
        "distillation_is_a_stage",
        {**SFT, "stage": "distill"},
        ["objective.type='sft'", "stage='distill'"],
        {
            "stage": "distill",
            "data": CHATS,
            "objective": {"type": "distillation", "teacher": "runs/teacher"},
        },
    ),
    (
        "there_is_a_teacher",
        {"stage": "distill", "objective": {"type": "distillation"}},
        ["objective.teacher: missing", "objective.targets"],
        {"stage": "distill", "objective": {"type": "distillation", "targets": "data/targets"}},
    ),
    (
        "there_is_a_teacher",
        {
            "stage": "distill",
            "output_directory": "runs/student",
            "objective": {"type": "distillation", "teacher": "runs/student/checkpoints/step_1"},
        },
        ["objective.teacher='runs/student/checkpoints/step_1'", "does not learn from itself"],
        {
            "stage": "distill",
            "output_directory": "runs/student",
            "objective": {"type": "distillation", "teacher": "runs/teacher"},
        },
    ),
    (
        "the_teacher_counts",
        {
            "stage": "distill",
            "objective": {"type": "distillation", "teacher": "t", "cross_entropy_weight": 1.0},
        },
        ["objective.cross_entropy_weight=1", "nothing is left"],
        {
            "stage": "distill",
            "objective": {"type": "distillation", "teacher": "t", "cross_entropy_weight": 0.0},
        },
    ),
    (
        "the_teacher_counts",
        {
            "stage": "distill",
            "objective": {"type": "distillation", "targets": "t", "top_k": 65536},
        },
        ["objective.top_k=65536", "the rest would be empty"],
        {"stage": "distill", "objective": {"type": "distillation", "targets": "t", "top_k": 8}},
    ),
    (
        "adapters_freeze_the_rest",
        {"adapters": {}, "training.frozen": ["*.in_proj.*"]},
        ["training.frozen=['*.in_proj.*']", "everything but the adapters is frozen"],
        {"adapters": {}},
    ),
    (
        "adapters_of_experts_are_whole",
        {"adapters": {"experts": True}, "parallelism.expert_tensor": 2},
        ["adapters.experts=True", "expert_tensor=2", "is not cut"],
        {"adapters": {"experts": True}},
    ),
    (
        "adapters_of_experts_are_whole",
        {"adapters": {"experts": True}, **DENSE},
        ["adapters.experts=True", "no layer of model.layer_pattern"],
        {"adapters": {}, **DENSE},
    ),
    (
        "adapters_of_shared_experts_do_not_overlap",
        {"adapters": {}, "parallelism.overlap_shared_experts": True},
        ["overlap_shared_experts=True with adapters"],
        {"adapters": {}},
    ),
    (
        "an_online_stage_has_a_policy",
        {**ONLINE, "objective": {"type": "sft"}},
        ["objective.type='sft'", "stage='grpo'", "objective.type: policy"],
        ONLINE,
    ),
    (
        "answers_are_worth_something",
        {**ONLINE, "rewards": None},
        ["rewards: missing", "math_answer"],
        ONLINE,
    ),
    (
        "answers_are_worth_something",
        {"rewards": [{"type": "length", "max_length": 9}]},
        ["rewards with stage='pretrain'", "leave them out"],
        {},
    ),
    (
        "rollouts_are_for_policies",
        {"rollout": {"max_new_tokens": 9}},
        ["rollout with stage='pretrain'", "grpo"],
        {},
    ),
    (
        "rollouts_are_for_policies",
        {"evaluation": {"interval_steps": 9}},
        ["evaluation with stage='pretrain'"],
        {},
    ),
    (
        "a_teacher_is_named",
        {**ONLINE, "stage": "opd", "rewards": None, "objective.preset": "opd"},
        ["advantage='teacher'", "objective.teacher"],
        {
            **ONLINE,
            "stage": "opd",
            "rewards": None,
            "objective": {"type": "policy", "preset": "opd", "teacher": "runs/teacher"},
        },
    ),
    (
        "groups_are_whole",
        {**ONLINE, "rollout": {"samples_per_prompt": 3, "max_new_tokens": 16}},
        ["global_batch_size=8", "samples_per_prompt=3", "use 6 or 9"],
        ONLINE,
    ),
    (
        "advantages_have_their_groups",
        {**ONLINE, "rollout": {"samples_per_prompt": 1, "max_new_tokens": 16}},
        ["samples_per_prompt=1", "advantage='group'", "at least 2"],
        {**ONLINE, "stage": "spo", "rollout": {"max_new_tokens": 16}},
    ),
    (
        "advantages_have_their_groups",
        {**ONLINE, "stage": "spo", "rollout": {"max_new_tokens": 16, "resample": 1}},
        ["rollout.resample", "samples_per_prompt=1"],
        {**ONLINE, "rollout": {"samples_per_prompt": 2, "max_new_tokens": 16, "resample": 1}},
    ),
    (
        "an_answer_fits",
        {**ONLINE, "rollout": {"max_new_tokens": 64}},
        ["max_new_tokens=64", "sequence_length=64", "at most 63"],
        ONLINE,
    ),
    (
        "the_router_follows_the_reward",
        {**ONLINE, "model.moe.load_balancing": "aux_loss", "model.moe.aux_loss_coefficient": 0.1},
        ["load_balancing='aux_loss'", "load_balancing: none"],
        ONLINE,
    ),
    (
        "the_router_follows_the_reward",
        {**ONLINE, "model.moe.z_loss_coefficient": 0.1},
        ["z_loss_coefficient=0.1", "set it to 0"],
        ONLINE,
    ),
    (
        "the_router_follows_the_reward",
        {**ONLINE, "model.moe.expert_bias_update_rate": 0.1},
        ["expert_bias_update_rate=0.1", "set it to 0"],
        ONLINE,
    ),
    (
        "nothing_counts_positions_in_the_data",
        {**ONLINE, "training.validation_interval_steps": 5},
        ["validation_interval_steps=5", "evaluation.interval_steps"],
        ONLINE,
    ),
    (
        "nothing_counts_positions_in_the_data",
        {**ONLINE, "training.left_out": [[0, 1]]},
        ["training.left_out", "leave it empty"],
        ONLINE,
    ),
    (
        "nothing_counts_positions_in_the_data",
        {**ONLINE, "training.anomalies": {"policy": "rollback"}},
        ["policy='rollback'", "use skip or stop"],
        {**ONLINE, "training.anomalies": {"policy": "skip"}},
    ),
    (
        "an_evaluation_has_prompts",
        {**ONLINE, "evaluation": {"interval_steps": 5}},
        ["interval_steps=5", "held-out prompts"],
        ONLINE,
    ),
    (
        "an_evaluation_has_prompts",
        {
            **ONLINE,
            "data": {**ONLINE["data"], "truth": None},
            "rewards": [{"type": "length", "max_length": 9}],
            "evaluation": {"interval_steps": 5},
        },
        ["interval_steps=5", "data.truth=null", "name its key"],
        ONLINE,
    ),
    (
        "an_http_engine_has_a_server",
        {**ONLINE, **SERVED, "rollout": {"max_new_tokens": 16, "engine": "http"}},
        ["rollout.engine='http' without rollout.http", "engine: own"],
        {**ONLINE, **SERVED, "rollout": SERVER},
    ),
    (
        "a_server_has_an_address",
        {**ONLINE, **SERVED, "rollout": {**SERVER, "http": {"url": "host:8000"}}},
        ["rollout.http.url='host:8000'", "http://host:8000"],
        {**ONLINE, **SERVED, "rollout": SERVER},
    ),
    (
        "a_server_has_the_family",
        {**ONLINE, "rollout": SERVER},
        ["rollout.engine='http' with layers of", "set rollout.engine: own"],
        {**ONLINE, **SERVED, "rollout": SERVER},
    ),
    (
        "a_server_draws_from_all_tokens",
        {**ONLINE, **SERVED, "rollout": {**SERVER, "top_p": 0.9}},
        ["rollout.top_p=0.9 with rollout.engine='http'", "engine: own"],
        {**ONLINE, **SERVED, "rollout": SERVER},
    ),
    (
        "there_is_a_choice",
        {**ONLINE, "rollout": {"max_new_tokens": 16, "top_k": 1}},
        ["rollout.top_k=1", "at least 2"],
        {**ONLINE, "rollout": {"max_new_tokens": 16, "top_k": 2}},
    ),
    (
        "rewards_have_their_truths",
        {**ONLINE, "data": {**ONLINE["data"], "truth": None}},
        ["type math_answer", "data.truth=null", "name its key"],
        ONLINE,
    ),
    (
        "a_judge_says_which_answer_is_better",
        {**JUDGED, "judge": None},
        ["judge: missing", "type: http", "type: reward_model"],
        JUDGED,
    ),
    (
        "a_judge_says_which_answer_is_better",
        {**ONLINE, "judge": JUDGED["judge"]},
        ["judge with stage='grpo'", "stage: rlaif"],
        ONLINE,
    ),
    (
        "a_judge_says_which_answer_is_better",
        {**JUDGED, "rewards": [{"type": "length", "max_length": 9}]},
        ["rewards with stage='rlaif'", "leave them out"],
        JUDGED,
    ),
    (
        "a_judge_says_which_answer_is_better",
        {**JUDGED, "objective": {"type": "policy"}},
        ["objective.type='policy'", "dpo, ipo or simpo"],
        {**JUDGED, "objective": {"type": "simpo"}},
    ),
    (
        "a_judge_says_which_answer_is_better",
        {**JUDGED, "objective": {"type": "dpo", "reference": "stored"}},
        ["objective.reference='stored'", "live"],
        JUDGED,
    ),
    (
        "pairs_are_two_answers",
        {**JUDGED, "rollout": {"max_new_tokens": 16, "samples_per_prompt": 4}},
        ["samples_per_prompt=4", "set it to 2"],
        JUDGED,
    ),
    (
        "pairs_are_two_answers",
        {**JUDGED, "evaluation": {"interval_steps": 5}},
        ["evaluation.interval_steps=5", "tools/alignment_report.py"],
        JUDGED,
    ),
    (
        "an_answer_fits",
        {**JUDGED, "rollout": {"max_new_tokens": 40, "samples_per_prompt": 2}},
        ["max_new_tokens=40", "both answers", "at most 31"],
        JUDGED,
    ),
]


def _split(case: dict) -> tuple[dict, dict]:
    facts = {key: case[key] for key in ("world_size", "host") if key in case}
    changes = {key: value for key, value in case.items() if key not in facts}
    if "parallelism" in changes or any(key.startswith("parallelism.") for key in changes):
        # The batch divides by any data-parallel size of these cases.
        changes.setdefault("training.global_batch_size", 48)
    return changes, facts


@pytest.mark.parametrize(
    ("name", "broken", "words", "kept"), CASES, ids=[f"{i}-{c[0]}" for i, c in enumerate(CASES)]
)
def test_rule(build, name: str, broken: dict, words: list[str], kept: dict) -> None:
    changes, facts = _split(broken)
    with pytest.raises(ConfigError) as caught:
        build(changes, **facts)
    assert any(all(word in problem for word in words) for problem in caught.value.problems), (
        f"no problem of {name} with {words} in\n{caught.value}"
    )
    changes, facts = _split(kept)
    build(changes, **facts)


def test_every_rule_has_a_case() -> None:
    assert {rule.function.__name__ for rule in RULES} == {case[0] for case in CASES}


def test_rules_without_a_host_ask_nothing_of_it(build) -> None:
    config = build({"training.precision": "fp16"})
    assert check(config) == []
    assert len(check(config, host=CPU)) == 1


def test_problems_of_several_sections_come_together(build) -> None:
    with pytest.raises(ConfigError) as caught:
        build(
            {
                "parallelism": {"tensor": 3, "pipeline": 3},
                "optimizer.schedule.warmup_steps": 500,
                "data.split": "0,1",
                "checkpoint.keep_last": 0,
            },
            world_size=7,
        )
    text = str(caught.value)
    for word in ("tensor=3", "pipeline=3", "world size 7", "warmup_steps", "split", "keep_last"):
        assert word in text
    assert text.startswith(f"{len(caught.value.problems)} problems")
