"""Settings of faster kernels: the same sums in fewer passes over memory. All are off by default.

What each of them needs is in `fused_rules.py`.
"""

from __future__ import annotations

from typing import Literal

from equilibrium_mcore.config.section import Section, setting

FLEX_LIBRARIES = {"deepep": "DeepEP", "hybridep": "HybridEP"}
"""Values of `parallelism.moe_dispatcher` that are libraries of GPU kernels."""

GraphModule = Literal["mamba", "attn", "mlp", "moe_router"]


class FusedConfig(Section):
    """Kernels of megatron-core and Transformer Engine that do several operations at once."""

    activation: bool = setting(
        False, "SwiGLU in one function, in experts with the router's probability as its factor"
    )
    cross_entropy: bool = setting(
        False, "megatron-core's cross-entropy, whose gradients are bf16: precision bf16 and fp8"
    )
    permutation: bool = setting(False, "Transformer Engine's permutation of tokens to experts")
    router: bool = setting(False, "Transformer Engine's top-k, scores and balancing loss")
    weight_gradients: bool = setting(
        False, "Transformer Engine's linear layers add their gradients to the buffer themselves"
    )


def fused_on_any_host(fused: FusedConfig) -> dict[str, bool]:
    """Of these kernels those that run on a CPU too, in every precision: the others are off."""
    return {"activation": fused.activation}
