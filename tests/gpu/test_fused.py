"""Faster kernels against the plain ones: a short run with each setting follows the plain run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from equilibrium_mcore.config import rules
from tests.gpu.test_training import TOLERANCE, run_config, train

pytestmark = pytest.mark.gpu

STEPS = 6
# Of one GPU; what needs several (flex dispatchers, context_exchange) is not compared here.
SETTINGS: dict[str, dict[str, Any]] = {
    "activation": {"training": {"fused": {"activation": True}}},
    "cross_entropy": {"training": {"fused": {"cross_entropy": True}}},
    "permutation": {"training": {"fused": {"permutation": True}}},
    "router": {"training": {"fused": {"router": True}}},
    "weight_gradients": {"training": {"fused": {"weight_gradients": True}}},
    "shared_experts": {"parallelism": {"overlap_shared_experts": True}},
    "gradient_overlap": {
        "parallelism": {"overlap_grad_reduce": True, "gradient_bucket_size": 100_000}
    },
    "moe_act": {"training": {"recompute": "selective", "recompute_modules": ["moe_act"]}},
    "cuda_graphs": {"training": {"cuda_graphs": ["mamba", "attn", "moe_router"]}},
}


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> dict[str, Any]:
    """Weights to start from, and the plain run's losses."""
    folder = tmp_path_factory.mktemp("plain")
    train(run_config(folder / "start"), steps=0, folder=folder / "a", save=True)
    config = run_config(folder / "run", checkpoint={"initial_weights": str(folder / "start")})
    losses = train(config, steps=STEPS, folder=folder / "b")["losses"]
    return {"start": folder / "start", "losses": losses}


@pytest.mark.parametrize("name", SETTINGS)
def test_a_faster_kernel_follows_the_plain_run(name, plain, tmp_path: Path):
    from equilibrium_mcore.parallel.host import describe_host

    start = {"initial_weights": str(plain["start"])}
    config = run_config(tmp_path / "run", checkpoint=start, **SETTINGS[name])
    problems = rules.check(config, world_size=1, host=describe_host())
    if problems:
        pytest.skip("; ".join(problems))
    losses = train(config, steps=STEPS, folder=tmp_path)["losses"]
    apart = max(abs(a - b) for a, b in zip(losses, plain["losses"], strict=True))
    print(f"{name}: at most {apart:.4f} nats apart")
    assert apart <= TOLERANCE["bf16"], (losses, plain["losses"])
