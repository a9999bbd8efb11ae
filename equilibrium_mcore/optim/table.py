"""What every parameter is, and which rows of it act as one linear map.

One table per layer kind, and one for what lies outside the layers: the first row whose pattern
matches the end of a parameter's name decides. Matrices between two features go to the matrix
optimizer; the rest goes to AdamW, by kind. `optimizer.overrides` of a run changes single rows.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from equilibrium_mcore.config.pattern import LAYER_KINDS, ByKind, layers_of
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


def _gate_and_up(section: str, width: str) -> Callable[[ModelConfig], Parts | None]:
    """The maps of a first projection whose width is a setting of a section."""

    def parts(model: ModelConfig) -> Parts | None:
        mixer = getattr(model, section)
        if mixer.activation != "swiglu":
            return None
        rows = getattr(mixer, width)
        return Parts(("gate", "up"), (rows, rows), shared_out=True)

    return parts


_NORM = ParameterRule(r"norm\.weight", "norm", "one number per channel")
_BIAS = ParameterRule(r"\.bias", "bias", "one number per channel")


def _one_map(*names: str) -> ParameterRule:
    """Weights that are one linear map."""
    return ParameterRule(rf"\.({'|'.join(names)})\.weight", "matrix", "one map")


MODEL_RULES: tuple[ParameterRule, ...] = (
    ParameterRule(
        r"embedding\.word_embeddings\.weight", "embedding", "a lookup table, not a linear map"
    ),
    ParameterRule(r"output_layer\.weight", "output", "rows are tokens"),
    ParameterRule(r"scalar_head\.weight", "head", "one number per channel"),
    _NORM,
)
"""What lies outside the layers."""

LAYER_RULES: ByKind[tuple[ParameterRule, ...]] = {
    "mamba": (
        ParameterRule(r"\.(A_log|D|dt_bias)", "ssm", "one number per head"),
        ParameterRule(r"\.conv1d_(weight|bias)", "conv", "one short filter per channel"),
        _NORM,
        _BIAS,
        ParameterRule(
            r"\.in_proj\.weight", "matrix", "z, x, B, C and dt are five maps", _mamba_in_proj
        ),
        _one_map("out_proj"),
    ),
    "mla": (
        _NORM,
        _BIAS,
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
        _one_map("linear_q_down_proj", "linear_proj"),
    ),
    "attention": (
        _NORM,
        _BIAS,
        ParameterRule(
            r"\.linear_qkv\.weight", "matrix", "q, k and v are three maps", _query_key_value
        ),
        _one_map("linear_proj"),
    ),
    "mlp": (
        _NORM,
        _BIAS,
        ParameterRule(
            r"\.linear_fc1\.weight",
            "matrix",
            "gate and up are two maps",
            _gate_and_up("mlp", "ffn_hidden_size"),
        ),
        _one_map("linear_fc2"),
    ),
    "moe": (
        _NORM,
        _BIAS,
        ParameterRule(
            r"\.router\.weight", "router", "its rows compete; orthogonal rows would force balance"
        ),
        ParameterRule(
            r"\.shared_experts\.linear_fc1\.weight",
            "matrix",
            "gate and up are two maps",
            _gate_and_up("moe", "shared_ffn_hidden_size"),
        ),
        ParameterRule(
            r"\.experts\.local_experts\.\d+\.linear_fc1\.weight",
            "matrix",
            "gate and up are two maps, each expert by itself",
            _gate_and_up("moe", "expert_ffn_hidden_size"),
        ),
        _one_map("linear_fc2"),
    ),
}
"""The parameters of a layer, by its kind."""


ADAPTER_RULES: tuple[ParameterRule, ...] = (
    ParameterRule(r"\.adapter\.[AB]", "adapter", "a low-rank factor, of no use by itself"),
)
"""What is added to a layer of any kind, see `adapters.lora`."""


def rule_for(name: str, model: ModelConfig) -> ParameterRule:
    """The row for parameter `name` of `model`. Raises KeyError where the tables have none.

    Args:
        name: its layout-free name, e.g. decoder.layers.3.mixer.in_proj.weight.
    """
    layer = re.match(r"decoder\.layers\.(\d+)\.", name)
    table, rules = "MODEL_RULES", MODEL_RULES
    if layer is not None:
        kind = LAYER_KINDS[layers_of(model.layer_pattern)[int(layer[1])]]
        table, rules = f"LAYER_RULES[{kind!r}]", (*ADAPTER_RULES, *LAYER_RULES[kind])
    for rule in rules:
        if re.search(rule.pattern + "$", name):
            return rule
    raise KeyError(
        f"parameter {name!r} matches no row of equilibrium_mcore.optim.table.{table}: add a row "
        "that says what it is"
    )
