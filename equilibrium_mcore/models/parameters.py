"""Exact parameter counts, from the real model on torch's `meta` device: shapes without memory.

Every count is read off the modules that training builds (`models.provider.build_model`), so it
cannot drift from them as a formula could.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
import torch.distributed as dist
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import random as mcore_random

# Registers torch's `fake` backend: groups of any size in one process, without communication.
from torch.testing._internal.distributed import fake_pg

from equilibrium_mcore.config.pattern import LABELS, LAYER_KINDS, ByKind, layers_of
from equilibrium_mcore.config.schema import ModelConfig, ParallelismConfig, TrainingConfig
from equilibrium_mcore.files.tables import terminal_table
from equilibrium_mcore.models.heads import SCALAR_HEAD, SCALAR_HEAD_WEIGHT
from equilibrium_mcore.models.provider import build_model
from equilibrium_mcore.models.transformer_config import build_transformer_config

COUNTED_APART: ByKind[dict[str, str]] = {
    "mamba": {},
    "mla": {},
    "attention": {},
    "mlp": {},
    "moe": {"experts": "moe_routed", "shared_experts": "moe_shared", "router": "moe_router"},
}
"""What a mixer's submodules count as; where it has none here, all of it counts as its kind."""

KINDS = (
    "embedding",
    "output",
    SCALAR_HEAD,
    *(count for kind, apart in COUNTED_APART.items() for count in apart.values() or (kind,)),
    "norms",
)
"""What a parameter belongs to, in the order of every table.

`norms` are those of the residual stream: one in front of each layer, and the last. Norms inside a
mixer (Mamba's gated norm, MLA's latent norms) count with their mixer.
"""

_STREAM_NORMS = ("norm.weight", "input_layernorm.weight", "pre_mlp_layernorm.weight")


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model by kind: all of them, and those that work on one token.

    A tied embedding table is counted once, as `embedding`; an untied output layer is `output`.
    Both are counted whole in `active`, although a token looks up one row of the embedding, and so
    are the padded rows of the vocabulary. Buffers (an expert bias) are not parameters.
    """

    by_kind: dict[str, int]
    active_by_kind: dict[str, int]

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(self.by_kind.values())

    @property
    def active(self) -> int:
        """The same with top_k of num_experts routed experts."""
        return sum(self.active_by_kind.values())

    def as_dict(self) -> dict[str, int | dict[str, int]]:
        """`total`, `active` and `by_kind`, as plain values."""
        return {"total": self.total, "active": self.active, "by_kind": self.by_kind}

    def table(self) -> str:
        """Lines of kind, parameters, share, and parameters that work on one token."""
        counts = [(kind, count, self.active_by_kind[kind]) for kind, count in self.by_kind.items()]
        counts.append(("total", self.total, self.active))
        rows = [(k, f"{n:,}", f"{n / self.total:.1%}", f"{active:,}") for k, n, active in counts]
        return terminal_table(("kind", "parameters", "share", "active"), rows, align="lr")


def count_parameters(model: ModelConfig) -> ParameterCount:
    """The parameters of the whole model. Takes about a second and no memory worth naming.

    `accelerator.install()` must have run before this module is imported, as for training. Process
    groups and random states are left as they were found.
    """
    layers = layers_of(model.layer_pattern)
    by_kind = dict.fromkeys(KINDS, 0)
    for name, parameter in build_on_meta(model).named_parameters():
        by_kind[kind_of(name, layers)] += parameter.numel()
    by_kind = {kind: count for kind, count in by_kind.items() if count}
    active = dict(by_kind)
    if "moe_routed" in active:  # all experts have one size, so this division has no rest
        active["moe_routed"] = by_kind["moe_routed"] // model.moe.num_experts * model.moe.top_k
    return ParameterCount(by_kind, active)


def build_on_meta(model: ModelConfig) -> HybridModel:
    """The whole model as one rank has it, of PyTorch's modules, on `meta`.

    Transformer Engine's modules have the same parameters, and need a GPU to be built.
    """
    layout = ParallelismConfig()
    # Neither lengths nor steps touch a shape.
    training = TrainingConfig(
        sequence_length=1, global_batch_size=1, steps=1, precision="fp32", backend="torch"
    )
    config = build_transformer_config(model, layout, training, on_gpu=False)
    config.use_cpu_initialization = False  # weights on the current device: see on_meta_device
    config.perform_initialization = False
    with _group_of_one() as group, on_meta_device():
        groups = ProcessGroupCollection()
        for field in fields(groups):
            setattr(groups, field.name, group)
        return build_model(model, layout, training, groups, transformer_config=config)


def kind_of(name: str, layers: str) -> str:
    """The kind of a parameter of megatron-core's HybridModel (its whole model, on one rank).

    Args:
        name: as in `named_parameters()`.
        layers: one letter per layer. Raises ValueError for a name that belongs nowhere.
    """
    if name == "embedding.word_embeddings.weight":
        return "embedding"
    if name == "output_layer.weight":
        return "output"
    if name == SCALAR_HEAD_WEIGHT:
        return SCALAR_HEAD
    if name == "decoder.final_norm.weight":
        return "norms"
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
    if match is None:
        raise ValueError(f"parameter {name!r} is neither embedding, layer, final norm nor a head's")
    kind, rest = LAYER_KINDS[layers[int(match[1])]], match[2]
    if rest in _STREAM_NORMS:
        return "norms"
    apart = COUNTED_APART[kind]
    if not apart:
        return kind
    part = rest.split(".")[1]
    if part not in apart:
        raise ValueError(
            f"parameter {name!r} of an {LABELS[kind]} layer is none of {', '.join(apart)}"
        )
    return apart[part]


@contextlib.contextmanager
def on_meta_device() -> Iterator[None]:
    """Let megatron-core build modules on `meta`, on a host with or without a GPU.

    It asks `torch.cuda.current_device()` where to put weights, and draws random numbers from a
    tracker of CUDA states, which cannot speak of the meta device; here nothing is drawn.
    """
    before = (
        torch.cuda.current_device,
        mcore_random._CUDA_RNG_STATE_TRACKER,
        mcore_random._CUDA_RNG_STATE_TRACKER_INITIALIZED,
    )
    meta = torch.device("meta")
    torch.cuda.current_device = lambda: meta
    mcore_random._CUDA_RNG_STATE_TRACKER = _NoRandomStates()
    mcore_random._CUDA_RNG_STATE_TRACKER_INITIALIZED = True
    try:
        with meta:
            yield
    finally:
        (
            torch.cuda.current_device,
            mcore_random._CUDA_RNG_STATE_TRACKER,
            mcore_random._CUDA_RNG_STATE_TRACKER_INITIALIZED,
        ) = before


class _NoRandomStates:
    """In place of megatron-core's CudaRNGStatesTracker while nothing random is drawn."""

    def is_initialized(self) -> bool:
        return True

    def fork(self, name: str = "") -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()


@contextlib.contextmanager
def _group_of_one() -> Iterator[dist.ProcessGroup]:
    """A process group of this rank alone, gone afterwards; no other rank takes part.

    Unlike `process_groups.one_rank` it may be called in the midst of a job, whose groups stay.
    """
    if dist.is_initialized():
        group = dist.new_group([dist.get_rank()], backend="fake", use_local_synchronization=True)
        try:
            yield group
        finally:
            dist.destroy_process_group(group)
    else:
        dist.init_process_group("fake", store=fake_pg.FakeStore(), rank=0, world_size=1)
        try:
            yield dist.group.WORLD
        finally:
            dist.destroy_process_group()
