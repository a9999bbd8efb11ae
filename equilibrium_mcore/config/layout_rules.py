"""Rules between a layout, the model, the batch and the number of ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

from equilibrium_mcore.config import layout
from equilibrium_mcore.config.layer_splits import CONTEXT_PROBLEMS, TENSOR_SPLITS, Quantity
from equilibrium_mcore.config.layout import divisors
from equilibrium_mcore.config.model_rules import uses
from equilibrium_mcore.config.pattern import CUT, balanced_cuts, cut_into, layers_of
from equilibrium_mcore.config.rule_kit import RuleTable, Subject, choices

LAYOUT_RULES = RuleTable()
rule = LAYOUT_RULES.rule


def tensor_quantities(subject: Subject) -> list[Quantity]:
    """What tensor parallelism splits, for the layer kinds that the pattern uses."""
    model = subject.config.model
    rows = model.padded_vocab_size
    quantities = [Quantity("the padded vocabulary", rows, "each TP rank holds as many rows")]
    for kind, splits in TENSOR_SPLITS.items():
        if uses(subject, kind):
            quantities += splits(model)
    return quantities


@rule("model", "parallelism")
def tensor_divides(subject: Subject) -> Iterator[str]:
    tensor = subject.config.parallelism.tensor
    quantities = tensor_quantities(subject)
    allowed = divisors(math.gcd(*(q.value for q in quantities)))
    for q in quantities:
        if q.value % tensor:
            yield (
                f"parallelism.tensor={tensor} does not divide {q.key}={q.value} ({q.why}): use "
                f"{choices(allowed)}"
            )
    if uses(subject, "attention"):
        groups = subject.config.model.attention.num_query_groups
        if groups % tensor and tensor % groups:
            fit = [t for t in allowed if groups % t == 0 or t % groups == 0]
            yield (
                f"parallelism.tensor={tensor} neither divides nor is a multiple of "
                f"model.attention.num_query_groups={groups} (key/value heads are split, or "
                f"repeated, over TP ranks): use {choices(fit)}"
            )


@rule("parallelism")
def sequence_parallel_needs_tensor(subject: Subject) -> Iterator[str]:
    p = subject.config.parallelism
    if p.sequence and p.tensor == 1:
        yield (
            "parallelism.sequence=true with parallelism.tensor=1: it shards activations over the "
            "TP ranks; set tensor to 2 or more, or sequence: false"
        )


@rule("model", "parallelism")
def moe_with_tensor_needs_sequence(subject: Subject) -> Iterator[str]:
    p = subject.config.parallelism
    if uses(subject, "moe") and p.tensor > 1 and not p.sequence:
        yield (
            f"parallelism.sequence=false with parallelism.tensor={p.tensor} and MoE layers (E): "
            "megatron-core's MoE needs sequence parallelism beside TP; set sequence: true"
        )


@rule("model", "parallelism")
def pipeline_fits_pattern(subject: Subject) -> Iterator[str]:
    p, pattern = subject.config.parallelism, subject.config.model.layer_pattern
    stages = layout.pipeline_segments(p)
    asked = f"parallelism.pipeline={p.pipeline}"
    if layout.is_interleaved(p):
        asked += f" * virtual_pipeline={p.virtual_pipeline}"
    if layout.is_interleaved(p) and p.pipeline == 1:
        yield (
            f"parallelism.virtual_pipeline={p.virtual_pipeline} with parallelism.pipeline=1: "
            "virtual stages interleave real ones; set pipeline to 2 or more, or "
            "virtual_pipeline: 1"
        )
    count = len(layers_of(pattern))
    if stages > count:
        yield (
            f"{asked} needs {stages} stages, but model.layer_pattern has {count} layers and a "
            f"stage needs at least one: use at most {count} stages"
        )
        return
    segments = pattern.count(CUT) + 1
    try:
        cut_into(pattern, stages)
    except ValueError:
        yield (
            f"{asked} needs {stages} stages, but model.layer_pattern={pattern!r} has {segments} "
            f"segment{'s' * (segments > 1)} between its cuts ({CUT}), which serve "
            f"{choices(divisors(segments))} stages: use one of these, or cut the pattern again, "
            f"e.g. model.layer_pattern={balanced_cuts(pattern, stages)!r}"
        )


@rule("model", "parallelism")
def experts_divide(subject: Subject) -> Iterator[str]:
    p = subject.config.parallelism
    if not uses(subject, "moe"):
        for key, row in layout.DIMENSIONS.items():
            if row.splits_experts and not row.splits_model and getattr(p, key) != 1:
                yield (
                    f"parallelism.{key}={getattr(p, key)}, but model.layer_pattern has no MoE "
                    f"layer (E), so there is nothing to split: use 1"
                )
        return
    moe = subject.config.model.moe
    if moe.num_experts % p.expert:
        yield (
            f"parallelism.expert={p.expert} does not divide model.moe.num_experts="
            f"{moe.num_experts} (whole experts on each rank): use "
            f"{choices(divisors(moe.num_experts))}"
        )
    if moe.expert_ffn_hidden_size % p.expert_tensor:
        yield (
            f"parallelism.expert_tensor={p.expert_tensor} does not divide "
            f"model.moe.expert_ffn_hidden_size={moe.expert_ffn_hidden_size} (split inside each "
            f"expert): use {choices(divisors(moe.expert_ffn_hidden_size))}"
        )


def _packed(data: Any) -> str:
    kind = "data.packing: documents"
    return kind if data.type == "indexed" else f"data.type: {data.type}"


@rule("data", "parallelism", "training")
def packed_documents_divide(subject: Subject) -> Iterator[str]:
    """Each document is cut over CP ranks by itself."""
    data, p, training = subject.config.data, subject.config.parallelism, subject.config.training
    if data.packing != "documents":
        return
    multiple, chunks = data.document_multiple, 2 * p.context if p.context > 1 else 1
    if multiple % chunks:
        yield (
            f"data.document_multiple={multiple} with {_packed(data)} and "
            f"parallelism.context={p.context}: each document is cut into {chunks} equal chunks, so "
            f"use a multiple of {chunks}. It decides where documents end, so choose one that fits "
            "every layout that the run may have"
        )
    if training.sequence_length % multiple:
        fit = [n for n in divisors(training.sequence_length) if n % chunks == 0]
        yield (
            f"data.document_multiple={multiple} does not divide training.sequence_length="
            f"{training.sequence_length} (sequences hold whole documents or end in a cut one): use "
            f"{choices(fit)}"
        )


@rule("data", "model", "training")
def packing_keeps_sequences_apart(subject: Subject) -> Iterator[str]:
    """A packed micro-batch is one sequence to the model."""
    data, batch = subject.config.data, subject.config.training.micro_batch_size
    if (
        data.packing == "documents"
        and uses(subject, "moe")
        and subject.config.model.moe.load_balancing == "seq_aux_loss"
        and batch > 1
    ):
        yield (
            f"model.moe.load_balancing='seq_aux_loss' with {_packed(data)} and "
            f"training.micro_batch_size={batch}: packed sequences are one to the router, so the "
            "loss would depend on the micro-batch; use training.micro_batch_size: 1, or "
            "load_balancing: aux_loss"
        )


@rule("model", "parallelism", "training")
def global_balance_sees_the_batch(subject: Subject) -> Iterator[str]:
    """megatron-core counts the micro-batches that a rank has seen so far.

    A later one is balanced by more counts than the first, so the loss of several depends
    on how the batch is laid out. Exact counts are known only after the last forward pass.
    """
    p, training = subject.config.parallelism, subject.config.training
    if not uses(subject, "moe") or subject.config.model.moe.load_balancing != "global_aux_loss":
        return
    world = layout.resolve_world_size(p, subject.world_size)
    if world % layout.model_parallel_size(p):
        return  # world_size_fits speaks
    data = layout.data_parallel_size(subject.config, subject.world_size)
    if training.global_batch_size % (training.micro_batch_size * data):
        return  # batch_divides speaks
    count = layout.micro_batches_per_step(subject.config, subject.world_size)
    if count > 1:
        whole = training.global_batch_size // data
        yield (
            "model.moe.load_balancing='global_aux_loss' with training.micro_batch_size="
            f"{training.micro_batch_size}, global_batch_size={training.global_batch_size} and "
            f"data-parallel size {data}: {count} micro-batches per step, each balanced by the "
            "counts of those before it, so that the loss would depend on the layout. Use one: "
            f"training.micro_batch_size={whole}, or {data * count} data-parallel ranks, or "
            "load_balancing: aux_loss"
        )


@rule("model", "parallelism")
def context_divides_layers(subject: Subject) -> Iterator[str]:
    model, p = subject.config.model, subject.config.parallelism
    if p.context == 1:
        return
    for kind, problems in CONTEXT_PROBLEMS.items():
        if uses(subject, kind):
            yield from problems(model, p)


@rule("parallelism", "training")
def sequence_length_divides(subject: Subject) -> Iterator[str]:
    p, length = subject.config.parallelism, subject.config.training.sequence_length
    # CP deals two chunks to each rank, an early and a late one, to balance causal attention.
    by_context = 2 * p.context if p.context > 1 else 1
    by_tensor = p.context * p.tensor if p.sequence else 1
    unit = math.lcm(by_context, by_tensor)
    below = length // unit * unit
    fit = f"{below} or {below + unit}" if below else str(unit)
    if length % by_context:
        yield (
            f"training.sequence_length={length} is not a multiple of 2 * parallelism.context="
            f"{p.context} (each CP rank takes an early and a late chunk): use {fit}"
        )
    elif length % by_tensor:
        yield (
            f"training.sequence_length={length} / context={p.context} is not a multiple of "
            f"parallelism.tensor={p.tensor} (sequence parallelism shards it): use {fit}"
        )


@rule("parallelism")
def world_size_fits(subject: Subject) -> Iterator[str]:
    p = subject.config.parallelism
    if subject.world_size and p.world_size and subject.world_size != p.world_size:
        yield (
            f"parallelism.world_size={p.world_size}, but the launcher started "
            f"{subject.world_size} ranks: start {p.world_size}, or leave world_size out"
        )
    world = layout.resolve_world_size(p, subject.world_size)
    fewest = layout.smallest_world_size(p)
    fit = f"start {choices([fewest * i for i in (1, 2, 3, 4)])} ... ranks, or split less"
    dense, expert = layout.model_parallel_size(p), layout.expert_parallel_size(p)
    if world % dense:
        yield (
            f"world size {world} is not a multiple of tensor={p.tensor} * pipeline={p.pipeline} * "
            f"context={p.context} = {dense} (ranks of one copy of the model): {fit}"
        )
    if world % expert:
        yield (
            f"world size {world} is not a multiple of expert={p.expert} * expert_tensor="
            f"{p.expert_tensor} * pipeline={p.pipeline} = {expert} (ranks of one copy of the "
            f"experts): {fit}"
        )


@rule("parallelism", "training")
def batch_divides(subject: Subject) -> Iterator[str]:
    p, training = subject.config.parallelism, subject.config.training
    world = layout.resolve_world_size(p, subject.world_size)
    if world % layout.model_parallel_size(p):
        return  # world_size_fits speaks
    data = layout.data_parallel_size(subject.config, subject.world_size)
    at_once = training.micro_batch_size * data
    below = training.global_batch_size // at_once * at_once
    if training.global_batch_size % at_once:
        fit = f"{below} or {below + at_once}" if below else str(at_once)
        yield (
            f"training.global_batch_size={training.global_batch_size} is not a multiple of "
            f"micro_batch_size={training.micro_batch_size} * data-parallel size {data} = "
            f"{at_once} (whole micro-batches on each DP rank): use {fit}"
        )
        return
    count = layout.micro_batches_per_step(subject.config, subject.world_size)
    if count % layout.micro_batch_unit(p):
        unit = at_once * layout.micro_batch_unit(p)
        batch = training.global_batch_size // unit * unit
        fit = f"{batch} or {batch + unit}" if batch else str(unit)
        yield (
            f"{count} micro-batches per step are not a multiple of parallelism.pipeline="
            f"{p.pipeline}, which virtual_pipeline={p.virtual_pipeline} needs (the interleaved "
            f"schedule works in groups of pipeline): use training.global_batch_size={fit}"
        )


@rule("parallelism")
def buckets_are_for_overlap(subject: Subject) -> Iterator[str]:
    p = subject.config.parallelism
    if p.gradient_bucket_size is not None and not p.overlap_grad_reduce:
        yield (
            f"parallelism.gradient_bucket_size={p.gradient_bucket_size} with "
            "overlap_grad_reduce=false: gradients are then reduced at once, after backward; set "
            "overlap_grad_reduce: true, or gradient_bucket_size: null"
        )
