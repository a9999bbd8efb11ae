"""How much memory a model takes at the least, and whether a host has it.

A lower bound, to tell sizes that can only be a slip of the keyboard: weights of the largest
products alone, with one gradient each. The exact count is that of the built model
(`models/parameters.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

from equilibrium_mcore.config import layout
from equilibrium_mcore.config.heads import has_output
from equilibrium_mcore.config.model_rules import uses
from equilibrium_mcore.config.pattern import ByKind, count_kinds
from equilibrium_mcore.config.rule_kit import RuleTable, Subject
from equilibrium_mcore.config.schema import ModelConfig

SIZE_RULES = RuleTable()
rule = SIZE_RULES.rule

WEIGHT_BYTES = 8  # float32: a weight and its gradient
MOST_LAYERS = 10_000


def _mamba(model: ModelConfig) -> int:
    m = model.mamba
    return model.hidden_size * (3 * m.num_heads * m.head_dim + 2 * m.num_groups * m.state_dim)


def _attention(model: ModelConfig) -> int:
    a = model.attention
    return model.hidden_size * 2 * a.head_dim * (a.num_heads + a.num_query_groups)


def _mla(model: ModelConfig) -> int:
    a = model.mla
    heads = a.num_heads * (a.qk_nope_head_dim + a.v_head_dim)
    return (
        model.hidden_size * (a.kv_lora_rank + a.num_heads * a.v_head_dim) + a.kv_lora_rank * heads
    )


def _mlp(model: ModelConfig) -> int:
    return 2 * model.hidden_size * model.mlp.ffn_hidden_size


def _moe(model: ModelConfig) -> int:
    e = model.moe
    experts = e.num_experts * e.expert_ffn_hidden_size + e.shared_ffn_hidden_size
    return model.hidden_size * (2 * experts + e.num_experts)


LEAST_WEIGHTS: ByKind[Callable[[ModelConfig], int]] = {
    "mamba": _mamba,
    "attention": _attention,
    "mla": _mla,
    "mlp": _mlp,
    "moe": _moe,
}
"""Weights of a layer's products: never more than it has."""


def least_weights(subject: Subject) -> dict[str, int]:
    """Weights of the model by what they are of; never more than it has."""
    model = subject.config.model
    tables = 1 if model.tie_embeddings or not has_output(model) else 2
    counts = {"vocab_size * hidden_size": tables * model.padded_vocab_size * model.hidden_size}
    for kind, layers in count_kinds(model.layer_pattern).items():
        if uses(subject, kind):
            counts[f"{layers} {kind} layers"] = layers * LEAST_WEIGHTS[kind](model)
    return counts


@rule("model")
def layers_can_be_built(subject: Subject) -> Iterator[str]:
    count = len(subject.config.model.layer_pattern)
    if count > MOST_LAYERS:
        yield f"model.layer_pattern has {count:,} letters: use at most {MOST_LAYERS:,}"


@rule("model", "parallelism", "training")
def the_host_can_hold_it(subject: Subject) -> Iterator[str]:
    """On a host without a GPU, where all ranks are processes of that host."""
    host, training = subject.host, subject.config.training
    if host is None or host.memory_gib is None or subject.world_size:
        return
    weights = least_weights(subject)
    gib = sum(weights.values()) * WEIGHT_BYTES / 2**30
    if gib > host.memory_gib:
        largest = max(weights, key=lambda name: weights[name])
        yield (
            f"model {subject.config.model.name!r} has more than {sum(weights.values()):,} weights "
            f"(most: {largest}), which take {gib:,.0f} GiB with their gradients, and this host has "
            f"{host.memory_gib:,.0f} GiB: correct the sizes, or start it on more hosts"
        )
    if not has_output(subject.config.model):
        return
    p = subject.config.parallelism
    table = subject.config.model.padded_vocab_size
    rows = training.micro_batch_size * training.sequence_length
    ranks = layout.resolve_world_size(p) // p.pipeline
    gib = rows * table * 4 / p.context / 2**30 * ranks / p.tensor
    if gib > host.memory_gib:
        yield (
            f"training.micro_batch_size={training.micro_batch_size} * sequence_length="
            f"{training.sequence_length} * {table} rows of the vocabulary: the logits of "
            f"{ranks} ranks take {gib:,.0f} GiB, and this host has {host.memory_gib:,.0f} GiB: "
            "use shorter sequences or a smaller micro-batch, or start it on more hosts"
        )
