"""The layer pattern: one letter per layer, `|` where the pipeline may be cut.

The letters are megatron-core's (`megatron.core.models.hybrid.hybrid_layer_allocation.Symbols`).
This module reads them without importing megatron, so that a config can be checked on any machine.

A layer kind is a row in every table that is annotated `ByKind`, each in the module of its concern.
`tests/test_rows.py` finds these tables and asks that each has every kind.
"""

from __future__ import annotations

from collections import Counter

LAYER_KINDS: dict[str, str] = {
    "M": "mamba",
    "+": "mla",
    "*": "attention",
    "-": "mlp",
    "E": "moe",
}
"""Letter -> name of the kind: of its section in the model's config, of its rows, and of its place
in megatron-core's stack (`mamba_layer`)."""

type ByKind[T] = dict[str, T]
"""A table with a row for every layer kind, and no other."""

LABELS: ByKind[str] = {
    "mamba": "Mamba-2",
    "mla": "MLA",
    "attention": "GQA",
    "mlp": "MLP",
    "moe": "MoE",
}
MIXES_POSITIONS: ByKind[bool] = {  # whether what it adds to a token depends on earlier tokens
    "mamba": True,
    "mla": True,
    "attention": True,
    "mlp": False,
    "moe": False,
}
CUT = "|"


def layers_of(pattern: str) -> str:
    """The pattern without its cuts: one letter per layer."""
    return pattern.replace(CUT, "")


def count_kinds(pattern: str) -> dict[str, int]:
    """How many layers of each kind the pattern has, e.g. `{"mamba": 21, "mla": 3, "moe": 24}`."""
    letters = Counter(layers_of(pattern))
    return {kind: letters[letter] for letter, kind in LAYER_KINDS.items() if letters[letter]}


def cut_into(pattern: str, stages: int) -> str:
    """The pattern with exactly `stages` segments, made by dropping cuts that are not needed.

    A pattern of 4 segments serves 1, 2 or 4 stages, so one model file fits several layouts.
    Raises ValueError when the number of segments is not a multiple of `stages`.
    """
    segments = pattern.split(CUT)
    if len(segments) % stages:
        raise ValueError(
            f"layer_pattern has {len(segments)} segments, which do not divide among {stages} stages"
        )
    per_stage = len(segments) // stages
    return CUT.join(
        "".join(segments[i : i + per_stage]) for i in range(0, len(segments), per_stage)
    )


def balanced_cuts(pattern: str, stages: int) -> str:
    """The pattern cut into `stages` segments of nearly equal length, never before an `E` or `-`.

    A mixer and the channel mixer after it stay together where that is possible. For a model that
    trains it is a suggestion, in error messages; one that is frozen is cut so.
    """
    layers = layers_of(pattern)
    channel_mixers = {letter for letter, kind in LAYER_KINDS.items() if not MIXES_POSITIONS[kind]}
    starts = [i for i in range(1, len(layers)) if layers[i] not in channel_mixers]
    if len(starts) < stages - 1:
        starts = list(range(1, len(layers)))
    if len(starts) < stages - 1:
        return pattern
    cuts: list[int] = []
    for stage in range(1, stages):
        target = len(layers) * stage / stages
        left = stages - 1 - stage
        free = [c for c in starts if not cuts or c > cuts[-1]]
        free = free[: len(free) - left] if left else free
        cuts.append(min(free, key=lambda c: abs(c - target)))
    bounds = [0, *cuts, len(layers)]
    return CUT.join(layers[a:b] for a, b in zip(bounds, bounds[1:], strict=False))
