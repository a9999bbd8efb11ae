"""The PyTorch norms against their formula."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from equilibrium_mcore.models.norms import GroupRMSNorm, RMSNorm
from equilibrium_mcore.models.transformer_config import build_transformer_config


def rms(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """The formula, arXiv 1910.07467, in float64."""
    x = x.double()
    return x / torch.sqrt(x.pow(2).mean(-1, keepdim=True) + eps) * weight.double()


def random(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(4), dtype=dtype)


@pytest.fixture
def config(small_model):
    from equilibrium_mcore.config.schema import ParallelismConfig, TrainingConfig

    def make(*, sequence: bool = False, precision: str = "fp32"):
        layout = ParallelismConfig(tensor=2 if sequence else 1, sequence=sequence)
        training = TrainingConfig(
            sequence_length=8, global_batch_size=1, steps=1, precision=precision
        )
        return build_transformer_config(small_model("M-"), layout, training, on_gpu=False)

    return make


@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_rms_norm_is_its_formula(config, eps):
    norm = RMSNorm(config(), hidden_size=24, eps=eps).double()
    norm.weight.data = random(24)
    x = random(3, 2, 24)
    torch.testing.assert_close(norm(x), rms(x, norm.weight, eps))


@pytest.mark.parametrize("sequence", [False, True])
def test_rms_norm_marks_its_weight_for_sequence_parallelism(config, sequence):
    # megatron-core sums the partial gradients of the parameters marked so, and of no others.
    assert RMSNorm(config(sequence=sequence), hidden_size=24).weight.sequence_parallel is sequence


def test_rms_norm_has_the_dtype_of_the_parameters(config):
    assert RMSNorm(config(precision="bf16"), hidden_size=24).weight.dtype == torch.bfloat16


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("eps", [1e-5, 0.5])
def test_group_norm_is_the_formula_per_group(groups, eps):
    norm = GroupRMSNorm(24, eps=eps, group_size=24 // groups, dtype=torch.float64)
    norm.weight.data = random(24)
    x = (random(3, 2, 24) * torch.arange(1, 25)).requires_grad_()  # groups of unlike size
    expected = torch.cat(
        [
            rms(part, weight, eps)
            for part, weight in zip(
                x.split(24 // groups, -1), norm.weight.split(24 // groups), strict=True
            )
        ],
        dim=-1,
    )
    got = norm(x)
    torch.testing.assert_close(got, expected)
    cotangent = random(*got.shape)
    for one, other in zip(
        torch.autograd.grad(got, [x, norm.weight], cotangent, retain_graph=True),
        torch.autograd.grad(expected, [x, norm.weight], cotangent),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_group_norm_of_a_part_of_whole_groups_is_a_part_of_the_norm():
    # What TP and CP rely on: a rank that holds some groups needs nothing of the others.
    whole = GroupRMSNorm(24, group_size=6, dtype=torch.float64)
    part = GroupRMSNorm(12, group_size=6, dtype=torch.float64)
    x = random(5, 24)
    torch.testing.assert_close(whole(x)[:, 12:], part(x[:, 12:]))


def test_group_norm_without_a_group_size_takes_all_channels():
    x = random(5, 24)
    expected = rms(x, torch.ones(24), 1e-5)
    torch.testing.assert_close(GroupRMSNorm(24, dtype=torch.float64)(x), expected)


def test_group_norm_of_bfloat16_sums_in_float32():
    norm = GroupRMSNorm(4096, dtype=torch.bfloat16)
    x = 1 + random(2, 4096, dtype=torch.float32).to(torch.bfloat16)
    got = norm(x)
    assert got.dtype == torch.bfloat16
    # One rounding of the result, 2^-9 of it: a sum in bfloat16 would be off by far more.
    expected = rms(x, torch.ones(4096), 1e-5)
    torch.testing.assert_close(got.double(), expected, rtol=2**-8, atol=1e-6)


def test_group_norm_refuses_to_come_before_the_gate():
    with pytest.raises(ValueError, match="norm_before_gate=True"):
        GroupRMSNorm(24, norm_before_gate=True)
