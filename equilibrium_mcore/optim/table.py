"""What every parameter is, and which rows of it act as one linear map.

One table for all layer kinds: the first row whose pattern matches the end of a parameter's name
decides. Adding a layer kind means adding its rows. Matrices between two features go to the matrix
optimizer; the rest goes to AdamW, by kind. `optimizer.overrides` of a run changes single rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from equilibrium_mcore.config.schema import ModelConfig
from equilibrium_mcore.optim.parts import Parts


@dataclass(frozen=True)
class ParameterRule:
    """A row: parameters whose name ends like this are of this kind and split so."""

    pattern: str
    kind: str
    why: str
    parts: Callable[[ModelConfig], Parts | None] | None = None


def _mamba_in_proj(model: ModelConfig) -> Parts:
    mamba = model.mamba
    inner, state = mamba.num_heads * mamba.head_dim, mamba.num_groups * mamba.state_dim
    sizes = (inner, inner, state, state, mamba.num_heads)
    return Parts(("z", "x", "B", "C", "dt"), sizes, shared_out=True)


def _query_key_value(model: ModelConfig) -> Parts:
    heads, groups = model.attention.num_heads, model.attention.num_query_groups
    head_dim = model.attention.head_dim
    sizes = (heads // groups * head_dim, head_dim, head_dim)
    return Parts(("q", "k", "v"), sizes, blocks=groups)


def _mla_query(model: ModelConfig) -> Parts:
    mla = model.mla
    sizes = (mla.qk_nope_head_dim, mla.qk_rope_head_dim)
    return Parts(("nope", "rope"), sizes, blocks=mla.num_heads)


def _mla_key_value_up(model: ModelConfig) -> Parts:
    mla = model.mla
    return Parts(("k", "v"), (mla.qk_nope_head_dim, mla.v_head_dim), blocks=mla.num_heads)


def _mla_key_value_down(model: ModelConfig) -> Parts:
    return Parts(("latent", "rope"), (model.mla.kv_lora_rank, model.mla.qk_rope_head_dim))


def _gate_and_up(which: str) -> Callable[[ModelConfig], Parts | None]:
    def parts(model: ModelConfig) -> Parts | None:
        mixer = model.mlp if which == "mlp" else model.moe
        width = {
            "mlp": lambda: mixer.ffn_hidden_size,
            "expert": lambda: mixer.expert_ffn_hidden_size,
            "shared": lambda: mixer.shared_ffn_hidden_size,
        }[which]()
        if mixer.activation != "swiglu":
            return None
        return Parts(("gate", "up"), (width, width), shared_out=True)

    return parts


RULES = (
    ParameterRule(
        r"embedding\.word_embeddings\.weight", "embedding", "a lookup table, not a linear map"
    ),
    ParameterRule(r"output_layer\.weight", "output", "rows are tokens"),
    ParameterRule(r"\.(A_log|D|dt_bias)", "ssm", "one number per head"),
    ParameterRule(r"\.conv1d_(weight|bias)", "conv", "one short filter per channel"),
    ParameterRule(r"norm\.weight", "norm", "one number per channel"),
    ParameterRule(
        r"\.router\.weight", "router", "its rows compete; orthogonal rows would force balance"
    ),
    ParameterRule(r"\.bias", "bias", "one number per channel"),
    ParameterRule(
        r"\.in_proj\.weight", "matrix", "z, x, B, C and dt are five maps", _mamba_in_proj
    ),
    ParameterRule(r"\.linear_qkv\.weight", "matrix", "q, k and v are three maps", _query_key_value),
    ParameterRule(
        r"\.linear_q_(up_)?proj\.weight",
        "matrix",
        "queries without and with position are two maps",
        _mla_query,
    ),
    ParameterRule(
        r"\.linear_kv_up_proj\.weight", "matrix", "k and v are two maps", _mla_key_value_up
    ),
    ParameterRule(
        r"\.linear_kv_down_proj\.weight",
        "matrix",
        "the latent and the key's position part are two maps",
        _mla_key_value_down,
    ),
    ParameterRule(
        r"\.shared_experts\.linear_fc1\.weight",
        "matrix",
        "gate and up are two maps",
        _gate_and_up("shared"),
    ),
    ParameterRule(
        r"\.experts\.local_experts\.\d+\.linear_fc1\.weight",
        "matrix",
        "gate and up are two maps, each expert by itself",
        _gate_and_up("expert"),
    ),
    ParameterRule(
        r"\.linear_fc1\.weight", "matrix", "gate and up are two maps", _gate_and_up("mlp")
    ),
    ParameterRule(
        r"\.(out_proj|linear_proj|linear_fc2|linear_q_down_proj)\.weight",
        "matrix",
        "one map",
    ),
)


def rule_for(name: str) -> ParameterRule:
    """The row for parameter `name`. Raises KeyError where the table has none."""
    for rule in RULES:
        if re.search(rule.pattern + "$", name):
            return rule
    raise KeyError(
        f"parameter {name!r} matches no row of equilibrium_mcore.optim.table.RULES: add a row that "
        "says what it is"
    )
