"""What the models of a run take of a rank's memory at the least, by role.

    policy    weights, one gradient each in float32 (adapters: of these alone), and main weights in
              float32 where the model is narrower
    critic    the same, of whole weights
    others    weights alone: a reference, a teacher or a reward model does not train

Counts are those of the built models (`models/parameters.py`), divided as the layout divides them:
experts over their ranks, matrices over tensor ranks, layers over pipeline stages alike. Optimizer
state, activations, logits and buffers come on top.
"""

from __future__ import annotations

from collections.abc import Mapping

from equilibrium_mcore.config.schema import ModelConfig, RunConfig
from equilibrium_mcore.models.parameters import count_parameters

TRAINS, CRITIC = "policy", "critic"
WHOLE = ("norms", "moe_router")  # what every tensor rank holds whole
GRADIENT_BYTES = MAIN_BYTES = 4


def weights_of_rank(config: RunConfig, model: ModelConfig) -> int:
    """Parameters of `model` on a rank, on the average over stages."""
    p, counts = config.parallelism, count_parameters(model).by_kind
    experts = counts.pop("moe_routed", 0) / (p.expert * p.expert_tensor)
    whole = sum(count for kind, count in counts.items() if kind in WHOLE)
    cut = sum(counts.values()) - whole
    return round((experts + whole + cut / p.tensor) / p.pipeline)


def bytes_of_role(config: RunConfig, role: str, model: ModelConfig) -> int:
    """Bytes of the model in this role on a rank."""
    width = 4 if config.training.precision == "fp32" else 2
    each = width
    if role == CRITIC or (role == TRAINS and config.adapters is None):
        each += GRADIENT_BYTES + (MAIN_BYTES if width < MAIN_BYTES else 0)
    return weights_of_rank(config, model) * each


def memory_of_roles(config: RunConfig, roles: Mapping[str, ModelConfig]) -> str:
    """A line: what each role takes of a rank, and all together."""
    sizes = {role: bytes_of_role(config, role, model) / 2**30 for role, model in roles.items()}
    parts = [f"{role} ({roles[role].name}) {size:,.3f} GiB" for role, size in sizes.items()]
    return (
        f"memory of a rank at the least: {', '.join(parts)}, together {sum(sizes.values()):,.3f} "
        "GiB; optimizer state and activations come on top"
    )
