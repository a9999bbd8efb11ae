"""Rules within a model: its pattern against its sections, and sizes that must divide."""

from __future__ import annotations

from collections.abc import Iterator

from equilibrium_mcore.config.layout import divisors
from equilibrium_mcore.config.pattern import CUT, LAYER_KINDS, ByKind, count_kinds, layers_of
from equilibrium_mcore.config.rule_kit import RuleTable, Subject, choices

MODEL_RULES = RuleTable()
rule = MODEL_RULES.rule

HEAD_GROUPS: ByKind[tuple[str, str] | None] = {
    "mamba": ("num_groups", "heads of a group share B and C"),
    "mla": None,
    "attention": ("num_query_groups", "heads of a group share keys, values"),
    "mlp": None,
    "moe": None,
}
"""The setting that must divide `num_heads`, and why; None where heads have no groups."""

ROPE_WIDTHS: ByKind[str | None] = {
    "mamba": None,
    "mla": "qk_rope_head_dim",
    "attention": "head_dim",
    "mlp": None,
    "moe": None,
}
"""The width that RoPE turns where `rope_base` is not null; None for a kind without RoPE."""


@rule("model")
def letters_are_known(subject: Subject) -> Iterator[str]:
    pattern = subject.config.model.layer_pattern
    allowed = ", ".join(f"{letter} {kind}" for letter, kind in LAYER_KINDS.items())
    if not layers_of(pattern):
        yield f"model.layer_pattern={pattern!r} has no layers; use the letters {allowed}"
    unknown = sorted(set(layers_of(pattern)) - LAYER_KINDS.keys())
    if unknown:
        yield (
            f"model.layer_pattern={pattern!r} has unknown letters {', '.join(map(repr, unknown))}; "
            f"allowed are {allowed}, and {CUT} for a cut"
        )


@rule("model")
def letters_have_their_sections(subject: Subject) -> Iterator[str]:
    model = subject.config.model
    for letter, kind in LAYER_KINDS.items():
        if letter in model.layer_pattern and getattr(model, kind) is None:
            yield (
                f"model.layer_pattern={model.layer_pattern!r} uses {letter}, but model.{kind} is "
                f"missing: add a section model.{kind}, or take {letter} out of the pattern"
            )


@rule("model")
def attention_kinds_do_not_mix(subject: Subject) -> Iterator[str]:
    pattern = subject.config.model.layer_pattern
    if "*" in pattern and "+" in pattern:
        yield (
            f"model.layer_pattern={pattern!r} mixes * (GQA) and + (MLA), which megatron-core's "
            f"HybridModel refuses: use only *, or only +"
        )


@rule("model")
def pattern_has_no_empty_segment(subject: Subject) -> Iterator[str]:
    pattern = subject.config.model.layer_pattern
    segments = pattern.split(CUT)
    empty = [str(i) for i, segment in enumerate(segments, start=1) if not segment]
    if empty and layers_of(pattern):
        tidy = CUT.join(segment for segment in segments if segment)
        yield (
            f"model.layer_pattern={pattern!r}: segment {', '.join(empty)} of {len(segments)} has "
            f"no layers, but a pipeline stage needs at least one: drop the {CUT}, as in {tidy!r}"
        )


@rule("model")
def groups_divide_heads(subject: Subject) -> Iterator[str]:
    for kind, groups in HEAD_GROUPS.items():
        section = getattr(subject.config.model, kind)
        if groups is None or section is None:
            continue
        key, why = groups
        if section.num_heads % getattr(section, key):
            yield (
                f"model.{kind}.{key}={getattr(section, key)} does not divide "
                f"model.{kind}.num_heads={section.num_heads} ({why}): use "
                f"{choices(divisors(section.num_heads))}"
            )


@rule("model")
def rope_widths_are_even(subject: Subject) -> Iterator[str]:
    for kind, key in ROPE_WIDTHS.items():
        section = getattr(subject.config.model, kind)
        if key is None or section is None or section.rope_base is None:
            continue
        width = getattr(section, key)
        if width % 2:
            yield (
                f"model.{kind}.{key}={width} is odd, but RoPE turns pairs of channels: use "
                f"{width - 1 or 2} or {width + 1}"
            )


@rule("model")
def channel_mixers_share_an_activation(subject: Subject) -> Iterator[str]:
    """megatron-core has one activation for all channel mixers of a model."""
    model = subject.config.model
    if not (uses(subject, "mlp") and uses(subject, "moe") and model.mlp and model.moe):
        return
    if model.mlp.activation != model.moe.activation:
        yield (
            f"model.mlp.activation={model.mlp.activation!r} and model.moe.activation="
            f"{model.moe.activation!r} differ, and megatron-core has one for both: use the same"
        )


@rule("model")
def router_can_choose(subject: Subject) -> Iterator[str]:
    moe = subject.config.model.moe
    if moe is None:
        return
    if moe.top_k > moe.num_experts:
        yield (
            f"model.moe.top_k={moe.top_k} is more than model.moe.num_experts={moe.num_experts} "
            f"(a token goes to different experts): use 1 to {moe.num_experts}"
        )
    if moe.expert_bias and moe.score_function != "sigmoid":
        yield (
            f"model.moe.expert_bias=true with model.moe.score_function={moe.score_function!r}: "
            "the bias is defined for sigmoid scores; set score_function: sigmoid, or "
            "expert_bias: false"
        )
    if moe.score_function == "sigmoid" and moe.top_k > 1 and not moe.normalize_top_k:
        yield (
            "model.moe.normalize_top_k=false with model.moe.score_function='sigmoid' and "
            f"model.moe.top_k={moe.top_k}: megatron-core always normalises sigmoid scores; set "
            "normalize_top_k: true, or score_function: softmax"
        )
    if moe.score_function == "softmax" and moe.top_k == 1 and moe.normalize_top_k:
        yield (
            "model.moe.normalize_top_k=true with model.moe.top_k=1: the one chosen score is then "
            "always 1 and the router learns nothing; set normalize_top_k: false"
        )


def uses(subject: Subject, kind: str) -> bool:
    """Whether the pattern has layers of this kind and the model has their section."""
    model = subject.config.model
    return kind in count_kinds(model.layer_pattern) and getattr(model, kind) is not None
