"""What faster kernels and ways to communicate need: of the model, the layout, and the host."""

from __future__ import annotations

from collections.abc import Iterator

from equilibrium_mcore.config.fused import FLEX_LIBRARIES
from equilibrium_mcore.config.layout import divisors
from equilibrium_mcore.config.model_rules import uses
from equilibrium_mcore.config.pattern import ByKind
from equilibrium_mcore.config.rule_kit import Host, RuleTable, Subject, choices

FUSED_RULES = RuleTable()
rule = FUSED_RULES.rule

ENGINE_KERNELS = ("permutation", "router", "weight_gradients")  # of `training.fused`
GRAPHED: ByKind[str] = {
    "mamba": "mamba",
    "mla": "attn",
    "attention": "attn",
    "mlp": "mlp",
    "moe": "moe_router",
}
"""What `training.cuda_graphs` calls the part of a layer that is launched as a graph."""

KEY_HEADS: ByKind[str | None] = {
    "mamba": None,  # it has its own exchange, of heads against positions
    "mla": "num_heads",
    "attention": "num_query_groups",
    "mlp": None,
    "moe": None,
}
"""The setting that counts a mixer's key/value heads; None where no keys are exchanged."""


@rule("model", "training")
def fused_activation_is_swiglu(subject: Subject) -> Iterator[str]:
    model = subject.config.model
    if not subject.config.training.fused.activation:
        return
    mixers = [kind for kind in ("mlp", "moe") if uses(subject, kind)]
    if not mixers:
        yield (
            f"training.fused.activation=true, but model.layer_pattern={model.layer_pattern!r} has "
            "no MLP or MoE layer: set it to false"
        )
    for kind in mixers:
        activation = getattr(model, kind).activation
        if activation != "swiglu":
            yield (
                f"training.fused.activation=true with model.{kind}.activation={activation!r}: "
                "megatron-core fuses SwiGLU alone; set it to false, or use activation: swiglu"
            )


@rule("training")
def fused_cross_entropy_is_half_precision(subject: Subject) -> Iterator[str]:
    training = subject.config.training
    if training.fused.cross_entropy and training.precision not in ("bf16", "fp8"):
        yield (
            f"training.fused.cross_entropy=true with training.precision={training.precision!r}: "
            "its gradients are rounded to bf16; use precision bf16 or fp8, or set it to false"
        )


@rule("model", "training")
def fused_experts_need_experts(subject: Subject) -> Iterator[str]:
    for name in ("permutation", "router"):
        if getattr(subject.config.training.fused, name) and not uses(subject, "moe"):
            yield (
                f"training.fused.{name}=true, but model.layer_pattern="
                f"{subject.config.model.layer_pattern!r} has no MoE layer (E): set it to false"
            )


def _engine_missing(backend: str, host: Host | None) -> str | None:
    """Why Transformer Engine's kernels cannot run: a setting, or what the host lacks."""
    if backend == "torch":
        return "training.backend='torch' has PyTorch's modules alone: use backend: auto"
    if host is None or (host.has_cuda and host.has_transformer_engine):
        return None
    missing = "a CUDA GPU" if not host.has_cuda else "Transformer Engine"
    return f"this host ({host.device_name}) lacks {missing}"


@rule("training")
def engines_kernels_need_the_engine(subject: Subject) -> Iterator[str]:
    training = subject.config.training
    asked = [f"fused.{name}=true" for name in ENGINE_KERNELS if getattr(training.fused, name)]
    asked += [f"cuda_graphs={training.cuda_graphs}"] if training.cuda_graphs else []
    why = _engine_missing(training.backend, subject.host)
    for setting in asked if why else ():
        yield (
            f"training.{setting} needs Transformer Engine on a GPU, and {why}; or leave the "
            "setting out"
        )


@rule("data", "model", "training")
def graphs_have_their_layers(subject: Subject) -> Iterator[str]:
    training = subject.config.training
    kinds = [kind for kind in GRAPHED if uses(subject, kind)]
    there = list(dict.fromkeys(GRAPHED[kind] for kind in kinds))
    if "moe" in kinds and "mlp" in there:
        there.remove("mlp")  # megatron-core graphs dense layers only where no layer is MoE
    for module in training.cuda_graphs:
        if module not in there:
            why = "beside MoE layers" if module == "mlp" and "mlp" in kinds else "without its layer"
            yield (
                f"training.cuda_graphs has {module!r}, which megatron-core does not graph {why} "
                f"(model.layer_pattern={subject.config.model.layer_pattern!r}): use "
                f"{', '.join(there)}"
            )
    if not training.cuda_graphs:
        return
    if training.recompute == "full":
        yield (
            f"training.cuda_graphs={training.cuda_graphs} with training.recompute='full', which "
            "recomputes around the graphs: use recompute: selective or none, or cuda_graphs: []"
        )
    if subject.config.data.packing == "documents":
        yield (
            f"training.cuda_graphs={training.cuda_graphs} with packed documents: a graph has fixed "
            "shapes, and documents have other lengths in every batch; set cuda_graphs: []"
        )


@rule("model", "parallelism")
def shared_experts_can_overlap(subject: Subject) -> Iterator[str]:
    p, moe = subject.config.parallelism, subject.config.model.moe
    if not p.overlap_shared_experts:
        return
    if not uses(subject, "moe") or not moe.shared_ffn_hidden_size:
        yield (
            "parallelism.overlap_shared_experts=true, but the model has no shared experts "
            "(model.moe.shared_ffn_hidden_size): set it to false"
        )
    if p.moe_dispatcher == "allgather":
        yield (
            "parallelism.overlap_shared_experts=true with moe_dispatcher='allgather', which has no "
            "exchange to overlap with: use moe_dispatcher: alltoall, or set it to false"
        )


@rule("model", "parallelism", "training")
def flex_dispatchers_have_ranks_and_libraries(subject: Subject) -> Iterator[str]:
    p, host = subject.config.parallelism, subject.host
    if p.moe_dispatcher not in FLEX_LIBRARIES or not uses(subject, "moe"):
        return
    library = FLEX_LIBRARIES[p.moe_dispatcher]
    asked = f"parallelism.moe_dispatcher={p.moe_dispatcher!r}"
    if p.expert * p.expert_tensor == 1:
        yield (
            f"{asked} with parallelism.expert=1: every rank has all experts and no token travels; "
            "use expert: 2 or more, or moe_dispatcher: alltoall"
        )
    if subject.config.training.backend == "torch":
        yield (
            f"{asked} with training.backend='torch': {library}'s kernels are no PyTorch; use "
            "backend: auto, or moe_dispatcher: alltoall"
        )
    if host is None:
        return
    has = {"deepep": host.has_deep_ep, "hybridep": host.has_hybrid_ep}[p.moe_dispatcher]
    if not (host.has_cuda and has):
        missing = "a CUDA GPU" if not host.has_cuda else f"{library} (the package deep_ep)"
        yield (
            f"{asked} needs {missing}, which this host ({host.device_name}) lacks: use "
            "moe_dispatcher: alltoall"
        )


@rule("model", "parallelism", "training")
def context_exchange_suits_the_heads(subject: Subject) -> Iterator[str]:
    p, host = subject.config.parallelism, subject.host
    if p.context_exchange is None:
        return
    asked = f"parallelism.context_exchange={p.context_exchange!r}"
    mixers = [kind for kind, key in KEY_HEADS.items() if key and uses(subject, kind)]
    if p.context == 1 or not mixers:
        why = "parallelism.context=1" if p.context == 1 else "no attention layer (+ or *)"
        yield f"{asked} with {why}: nothing is exchanged; set it to null"
        return
    why = _engine_missing(subject.config.training.backend, host)
    if p.context_exchange != "a2a" and why:
        yield (
            f"{asked} is Transformer Engine's, and {why}; PyTorch's attention exchanges heads "
            "against positions: set it to a2a or null"
        )
    for kind in mixers if p.context_exchange == "a2a" and not why else ():
        heads = getattr(getattr(subject.config.model, kind), KEY_HEADS[kind])
        here = max(heads // p.tensor, 1)
        if here % p.context:
            yield (
                f"{asked} with parallelism.context={p.context}: each CP rank takes whole key/value "
                f"heads, and a TP rank has model.{kind}.{KEY_HEADS[kind]}={heads} / tensor="
                f"{p.tensor} = {here}: use context {choices(divisors(here))}, or another exchange"
            )
