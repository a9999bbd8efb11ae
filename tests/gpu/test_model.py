"""The whole tiny hybrid on the fast backend, against the PyTorch backend in float32."""

from __future__ import annotations

import pytest
import torch

from equilibrium_mcore.config.load import load_model
from equilibrium_mcore.parallel import accelerator, process_groups

pytestmark = pytest.mark.gpu

# Relative error of all logits together. Rounding flips a choice of experts now and then, where two
# scores are nearly equal, and each flip changes a token's logits; so the norm over all tokens is
# compared, and not the largest difference. On a CPU, PyTorch's bf16 against its float32: 0.014.
TOLERANCE = {"fp32": 1e-2, "bf16": 4e-2}


def build(groups, *, precision: str, backend: str):
    from equilibrium_mcore.config.schema import ParallelismConfig, TrainingConfig
    from equilibrium_mcore.models.provider import build_model

    training = TrainingConfig(
        sequence_length=128, global_batch_size=2, steps=1, precision=precision, backend=backend
    )
    model = build_model(
        load_model("equilibrium_tiny"),
        ParallelismConfig(),
        training,
        groups,
        on_gpu=accelerator.has_cuda(),
    )
    return model.to(accelerator.device()).eval()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_logits(precision, groups):
    from tests.gpu.compare import give_weights, relative_error

    process_groups.seed_everything(0)
    fast = build(groups, precision=precision, backend="auto")
    reference = build(groups, precision="fp32", backend="torch")
    give_weights(fast, reference)
    tokens = torch.randint(0, 4096, (2, 128), device=accelerator.device())
    positions = torch.arange(128, device=accelerator.device()).expand(2, -1)
    with torch.no_grad():
        got, wanted = (model(tokens, positions, None) for model in (fast, reference))
    error = relative_error(got, wanted)
    assert error <= TOLERANCE[precision], error


def test_small_sensitive_parameters_stay_in_float32(groups):
    model = build(groups, precision="bf16", backend="auto")
    kept = {n.rsplit(".", 1)[-1] for n, p in model.named_parameters() if p.dtype == torch.float32}
    assert kept == {"A_log", "dt_bias", "D"}
    assert all(p.device == accelerator.device() for p in model.parameters())
