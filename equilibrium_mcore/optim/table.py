"""What every parameter is, and which rows of it act as one linear map.

One table for all layer kinds: the first row whose pattern matches the end of a parameter's name
decides. Adding a layer kind means adding its rows. Matrices between two features go to the matrix
optimizer (Muon); the rest goes to AdamW, by kind.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from equilibrium_mcore.config.schema import ModelConfig

# Sizes of the parts along the output rows of the whole matrix, repeated `blocks` times.
PartSizes = tuple[int, list[int]]


@dataclass(frozen=True)
class Rule:
    """A row: parameters whose name ends like this are of this kind and split so."""

    pattern: str
    kind: str
    why: str
    parts: Callable[[ModelConfig], PartSizes] | None = None


def _mamba_in_proj(model: ModelConfig) -> PartSizes:
    mamba = model.mamba
    inner, state = mamba.num_heads * mamba.head_dim, mamba.num_groups * mamba.state_dim
    return 1, [inner, inner, state, state, mamba.num_heads]  # z, x, B, C, dt


def _query_key_value(model: ModelConfig) -> PartSizes:
    heads, groups = model.attention.num_heads, model.attention.num_query_groups
    head_dim = model.attention.head_dim
    return groups, [heads // groups * head_dim, head_dim, head_dim]


def _gate_and_up(which: str) -> Callable[[ModelConfig], PartSizes]:
    def parts(model: ModelConfig) -> PartSizes:
        mixer = model.mlp if which == "mlp" else model.moe
        width = {
            "mlp": lambda: mixer.ffn_hidden_size,
            "expert": lambda: mixer.expert_ffn_hidden_size,
            "shared": lambda: mixer.shared_ffn_hidden_size,
        }[which]()
        return 1, [width, width] if mixer.activation == "swiglu" else [width]

    return parts


RULES = (
    Rule(r"embedding\.word_embeddings\.weight", "embedding", "a lookup table, not a linear map"),
    Rule(r"output_layer\.weight", "output", "rows are tokens"),
    Rule(r"\.(A_log|D|dt_bias)", "ssm", "one number per head"),
    Rule(r"\.conv1d_(weight|bias)", "conv", "one short filter per channel"),
    Rule(r"norm\.weight", "norm", "one number per channel"),
    Rule(r"\.router\.weight", "router", "its rows compete; orthogonal rows would force balance"),
    Rule(r"\.bias", "bias", "one number per channel"),
    Rule(r"\.in_proj\.weight", "matrix", "z, x, B, C and dt are five maps", _mamba_in_proj),
    Rule(r"\.linear_qkv\.weight", "matrix", "q, k and v are three maps", _query_key_value),
    Rule(
        r"\.shared_experts\.linear_fc1\.weight",
        "matrix",
        "gate and up are two maps",
        _gate_and_up("shared"),
    ),
    Rule(
        r"\.experts\.(local_experts\.\d+\.)?linear_fc1\.weight\d*",
        "matrix",
        "gate and up are two maps, each expert by itself",
        _gate_and_up("expert"),
    ),
    Rule(r"\.linear_fc1\.weight", "matrix", "gate and up are two maps", _gate_and_up("mlp")),
    Rule(
        r"\.(out_proj|linear_proj|linear_fc2|linear_q_proj|linear_(q|kv)_(down|up)_proj)\.weight\d*",
        "matrix",
        "one map",
    ),
)


def rule_for(name: str) -> Rule:
    """The row for parameter `name`. Raises KeyError where the table has none."""
    for rule in RULES:
        if re.search(rule.pattern + "$", name):
            return rule
    raise KeyError(
        f"parameter {name!r} matches no row of equilibrium_mcore.optim.table.RULES: add a row that "
        "says what it is"
    )
