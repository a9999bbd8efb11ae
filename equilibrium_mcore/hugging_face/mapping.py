"""Which Megatron tensor becomes which Hugging Face tensor: one table for every layer kind.

A name on the left is a key of a megatron-core distributed checkpoint, whatever layout wrote it. The
rows of a kind are used once for each of its layers, their names counted from the layer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from equilibrium_mcore.config.heads import has_output, has_scalar_head
from equilibrium_mcore.config.pattern import LAYER_KINDS, ByKind, layers_of
from equilibrium_mcore.config.schema import ModelConfig
from equilibrium_mcore.hugging_face.transforms import (
    Copy,
    Join,
    SplitGated,
    SplitQKV,
    TrimVocabulary,
)

MEGATRON_LAYER = "decoder.layers.{index}."
HUGGING_FACE_LAYER = "model.layers.{index}."

Condition = Callable[[ModelConfig], bool]
Transform = Copy | Join | SplitGated | SplitQKV | TrimVocabulary


@dataclass(frozen=True)
class ParamMapping:
    """One row: names on both sides, and what happens in between.

    Attributes:
        megatron, hugging_face: a name, or several where the transform joins or splits.
        transform: see `transforms`.
        when: whether a model has them at all.
        keep_float32: stays float32 whatever the export's dtype.
    """

    megatron: str | tuple[str, ...]
    hugging_face: str | tuple[str, ...]
    transform: Transform = Copy()
    when: Condition = lambda model: True
    keep_float32: bool = False

    def at(self, index: int | None) -> ParamMapping:
        """This row with the whole names of layer `index`, both sides as tuples."""
        left = right = ""
        if index is not None:
            left = MEGATRON_LAYER.format(index=index)
            right = HUGGING_FACE_LAYER.format(index=index)
        return replace(
            self,
            megatron=tuple(left + name for name in _names(self.megatron)),
            hugging_face=tuple(right + name for name in _names(self.hugging_face)),
        )


Rows = tuple[ParamMapping, ...]


def _names(names: str | tuple[str, ...]) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else names


def _under(prefix: str, *names: str) -> tuple[str, ...]:
    return tuple(prefix + name for name in names)


def _conv_parts(model: ModelConfig) -> list[int]:
    m = model.mamba
    assert m is not None
    return [m.num_heads * m.head_dim, m.num_groups * m.state_dim, m.num_groups * m.state_dim]


def _in_proj_parts(model: ModelConfig) -> list[int]:
    assert model.mamba is not None
    inner, *states = _conv_parts(model)
    return [inner, inner, *states, model.mamba.num_heads]


def _has_query_latent(model: ModelConfig) -> bool:
    return bool(model.mla and model.mla.q_lora_rank)


def _no_query_latent(model: ModelConfig) -> bool:
    return not _has_query_latent(model)


def _has_qkv_bias(model: ModelConfig) -> bool:
    return bool(model.attention and model.attention.qkv_bias)


def _gated_mlp(model: ModelConfig) -> bool:
    return bool(model.mlp and model.mlp.activation == "swiglu")


def _plain_mlp(model: ModelConfig) -> bool:
    return not _gated_mlp(model)


def _gated_experts(model: ModelConfig) -> bool:
    return bool(model.moe and model.moe.activation == "swiglu")


def _plain_experts(model: ModelConfig) -> bool:
    return not _gated_experts(model)


def _has_shared_experts(model: ModelConfig) -> bool:
    return bool(model.moe and model.moe.shared_ffn_hidden_size)


def _shared_gated(model: ModelConfig) -> bool:
    return _has_shared_experts(model) and _gated_experts(model)


def _shared_plain(model: ModelConfig) -> bool:
    return _has_shared_experts(model) and _plain_experts(model)


def _has_expert_bias(model: ModelConfig) -> bool:
    return bool(model.moe and model.moe.expert_bias)


_MLA = "self_attention."
_QKV = ("mixer.q_proj.", "mixer.k_proj.", "mixer.v_proj.")
_FC1, _FC2 = "linear_fc1.weight", "linear_fc2.weight"
_GATE_UP = ("gate_proj.weight", "up_proj.weight")
_ROUTED, _SHARED = "mlp.experts.experts.", "mlp.shared_experts."
_HF_SHARED = "mixer.shared_experts."

# fmt: off
MODEL_MAPPING: Rows = (
    ParamMapping("embedding.word_embeddings.weight", "model.embed_tokens.weight", TrimVocabulary()),
    ParamMapping("output_layer.weight", "lm_head.weight", TrimVocabulary(),
                 when=lambda model: has_output(model) and not model.tie_embeddings),
    ParamMapping("scalar_head.weight", "score.weight", when=has_scalar_head),
    ParamMapping("decoder.final_norm.weight", "model.norm.weight"),
)
"""What lies outside the layers."""

LAYER_MAPPING: ByKind[Rows] = {
    "mamba": (
        ParamMapping("norm.weight", "norm.weight"),
        ParamMapping(_under("mixer.in_proj.weight.", "z", "x", "B", "C", "dt"),
                     "mixer.in_proj.weight", Join(_in_proj_parts)),
        ParamMapping(_under("mixer.conv1d.weight.", "x", "B", "C"), "mixer.conv1d.weight",
                     Join(_conv_parts)),
        ParamMapping(_under("mixer.conv1d.bias.", "x", "B", "C"), "mixer.conv1d.bias",
                     Join(_conv_parts)),
        ParamMapping("mixer.A_log", "mixer.A_log", keep_float32=True),
        ParamMapping("mixer.D", "mixer.D", keep_float32=True),
        ParamMapping("mixer.dt_bias", "mixer.dt_bias", keep_float32=True),
        ParamMapping("mixer.norm.weight", "mixer.norm.weight"),
        ParamMapping("mixer.out_proj.weight", "mixer.out_proj.weight"),
    ),
    "mla": (
        ParamMapping("input_layernorm.weight", "norm.weight"),
        ParamMapping(_MLA + "linear_q_proj.weight", "mixer.q_proj.weight", when=_no_query_latent),
        ParamMapping(_MLA + "linear_q_down_proj.weight", "mixer.q_a_proj.weight",
                     when=_has_query_latent),
        ParamMapping(_MLA + "q_layernorm.weight", "mixer.q_a_layernorm.weight",
                     when=_has_query_latent),
        ParamMapping(_MLA + "linear_q_up_proj.weight", "mixer.q_b_proj.weight",
                     when=_has_query_latent),
        ParamMapping(_MLA + "linear_kv_down_proj.weight", "mixer.kv_a_proj_with_mqa.weight"),
        ParamMapping(_MLA + "kv_layernorm.weight", "mixer.kv_a_layernorm.weight"),
        ParamMapping(_MLA + "linear_kv_up_proj.weight", "mixer.kv_b_proj.weight"),
        ParamMapping(_MLA + "linear_proj.weight", "mixer.o_proj.weight"),
    ),
    "attention": (
        ParamMapping("input_layernorm.weight", "norm.weight"),
        ParamMapping("self_attention.linear_qkv.weight", tuple(name + "weight" for name in _QKV),
                     SplitQKV()),
        ParamMapping("self_attention.linear_qkv.bias", tuple(name + "bias" for name in _QKV),
                     SplitQKV(), when=_has_qkv_bias),
        ParamMapping("self_attention.linear_proj.weight", "mixer.o_proj.weight"),
    ),
    "mlp": (
        ParamMapping("pre_mlp_layernorm.weight", "norm.weight"),
        ParamMapping("mlp." + _FC1, _under("mixer.", *_GATE_UP), SplitGated(), when=_gated_mlp),
        ParamMapping("mlp." + _FC1, "mixer.up_proj.weight", when=_plain_mlp),
        ParamMapping("mlp." + _FC2, "mixer.down_proj.weight"),
    ),
    # Both sides stack the experts, [E, out, in], and keep [gate; up] whole.
    "moe": (
        ParamMapping("pre_mlp_layernorm.weight", "norm.weight"),
        ParamMapping("mlp.router.weight", "mixer.gate.weight"),
        ParamMapping("mlp.router.expert_bias", "mixer.gate.e_score_correction_bias",
                     when=_has_expert_bias, keep_float32=True),
        ParamMapping(_ROUTED + _FC1, "mixer.experts.gate_up_proj", when=_gated_experts),
        ParamMapping(_ROUTED + _FC1, "mixer.experts.up_proj", when=_plain_experts),
        ParamMapping(_ROUTED + _FC2, "mixer.experts.down_proj"),
        ParamMapping(_SHARED + _FC1, _under(_HF_SHARED, *_GATE_UP), SplitGated(),
                     when=_shared_gated),
        ParamMapping(_SHARED + _FC1, _HF_SHARED + "up_proj.weight", when=_shared_plain),
        ParamMapping(_SHARED + _FC2, _HF_SHARED + "down_proj.weight", when=_has_shared_experts),
    ),
}
"""What a layer has, by its kind; names are counted from the layer."""
# fmt: on


def expand(
    model: ModelConfig,
    *,
    of_model: Rows = MODEL_MAPPING,
    of_layers: ByKind[Rows] = LAYER_MAPPING,
) -> list[ParamMapping]:
    """The rows that `model` has, with whole names, from the embedding through the layers."""
    expanded = [row.at(None) for row in of_model if row.when(model)]
    for index, letter in enumerate(layers_of(model.layer_pattern)):
        rows = of_layers[LAYER_KINDS[letter]]
        expanded += [row.at(index) for row in rows if row.when(model)]
    return expanded


def plan(
    model: ModelConfig,
    megatron_names: Iterable[str],
    *,
    of_model: Rows = MODEL_MAPPING,
    of_layers: ByKind[Rows] = LAYER_MAPPING,
) -> list[ParamMapping]:
    """The rows that turn a checkpoint with `megatron_names` into the whole Hugging Face model.

    Raises ValueError naming every tensor that no row takes, that a row misses, or that two rows
    take or make.
    """
    rows = expand(model, of_model=of_model, of_layers=of_layers)
    taken = Counter(name for row in rows for name in row.megatron)
    made = Counter(name for row in rows for name in row.hugging_face)
    there = set(megatron_names)
    problems = [
        *(f"unmapped: {name}" for name in sorted(there - taken.keys())),
        *(f"missing: {name}" for name in taken if name not in there),
        *(f"mapped twice: {name}" for name, count in (taken + made).items() if count > 1),
    ]
    if problems:
        raise ValueError(
            f"the checkpoint's tensors do not fit the model {model.name!r} with layer_pattern "
            f"{model.layer_pattern}; is it the config that trained it?\n  " + "\n  ".join(problems)
        )
    return rows
