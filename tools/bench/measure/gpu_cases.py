"""What the GPU benchmark trains: a model as a whole, or as one rank of a larger job sees it."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from equilibrium_mcore.config.fused_rules import ENGINE_KERNELS
from equilibrium_mcore.config.pattern import CUT
from equilibrium_mcore.config.schema import ModelConfig
from equilibrium_mcore.parallel import accelerator

EXPERT_RANKS = 8  # of configs/runs/pretrain_3b.yaml
FUSED = {"activation": True, "cross_entropy": True, "permutation": True, "router": True}


@dataclass(frozen=True)
class Case:
    """A measurement.

    Attributes:
        one_expert_rank: the routed experts are those of one of 8 expert-parallel ranks. Every
            token still goes to `top_k` experts, so each of these gets as many tokens as on such a
            rank, where they come from all of them; only the exchange of tokens is missing.
        micro_batch: sequences per forward pass; None for the largest that fits.
        thirds: of the model's blocks, kept from its end; fewer where memory runs out.
        environment: variables of libraries, set while it runs.
    """

    name: str
    precision: str = "bf16"
    one_expert_rank: bool = False
    micro_batch: int | None = None
    thirds: int = 3
    training: dict[str, Any] = field(default_factory=dict)
    parallelism: dict[str, Any] = field(default_factory=dict)
    environment: dict[str, str] = field(default_factory=dict)

    def model(self, model: ModelConfig) -> ModelConfig:
        """The model of this case. Raises ValueError for one expert rank of a dense model."""
        if not self.one_expert_rank:
            return model
        if model.moe is None:
            raise ValueError(f"{self.name}: {model.name} has no routed experts")
        experts = max(model.moe.num_experts // EXPERT_RANKS, model.moe.top_k)
        moe = model.moe.model_copy(update={"num_experts": experts})
        return model.model_copy(update={"moe": moe})

    def sizes(self, blocks: int, sequences_per_step: int) -> list[tuple[int, int]]:
        """(blocks kept, micro batch), best first: a smaller micro batch before a smaller model."""
        parts = [blocks * thirds // 3 for thirds in range(self.thirds, 0, -1)]
        kept = [part for part in parts if part] or [1]
        if self.micro_batch is not None:
            return [(part, self.micro_batch) for part in kept]
        micro_batches = [size for size in (4, 2, 1) if sequences_per_step % size == 0]
        return [(kept[0], size) for size in micro_batches] + [(part, 1) for part in kept[1:]]

    def run_training(self) -> dict[str, Any]:
        """Its settings of training; in a rehearsal without a GPU but for kernels that need one."""
        fused = self.training.get("fused", {})
        if not accelerator.has_cuda():
            fused = {name: value for name, value in fused.items() if name not in ENGINE_KERNELS}
        return {**self.training, "precision": self.precision, "fused": fused}

    @contextlib.contextmanager
    def variables(self) -> Iterator[None]:
        """Its environment, inside."""
        before = {name: os.environ.get(name) for name in self.environment}
        os.environ.update(self.environment)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


def last_blocks(model: ModelConfig, kept: int) -> ModelConfig:
    """The model with so many of its segments between cuts, from the end."""
    blocks = model.layer_pattern.split(CUT)
    return model.model_copy(update={"layer_pattern": CUT.join(blocks[-kept:])})


_RANK = {"one_expert_rank": True, "micro_batch": 2}
_OVERLAP = {"overlap_shared_experts": True}
_WGRAD = {"fused": {**FUSED, "weight_gradients": True}}
PARTS: dict[str, tuple[Case, ...]] = {
    "roofs": (),
    "bf16": (Case("bf16"),),
    "fp8": (Case("fp8", precision="fp8"),),
    "expert_rank": (
        Case("one expert rank", **_RANK),
        Case("... fused", **_RANK, training={"fused": FUSED}, parallelism=_OVERLAP),
        Case("... weight gradients", **_RANK, training=_WGRAD, parallelism=_OVERLAP),
        Case(
            "... CUTLASS",
            **_RANK,
            training=_WGRAD,
            parallelism=_OVERLAP,
            environment={"NVTE_USE_CUTLASS_GROUPED_GEMM": "1"},
        ),
    ),
    "blocks": (
        Case("a third", thirds=1, parallelism={"overlap_grad_reduce": True}),
        Case("a third, fp8", thirds=1, precision="fp8"),
    ),
}
PARTS["all"] = PARTS["bf16"] + PARTS["fp8"]
"""What `tools/bench/gpu.py --part` measures, roofs first."""
