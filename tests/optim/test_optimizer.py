"""The table, Muon, AdamW's kinds, ownership and schedules, against plain references."""

from __future__ import annotations

import math

import pytest
import torch

from equilibrium_mcore.config.load import load_model
from equilibrium_mcore.config.schema import MuonConfig, ScheduleConfig
from equilibrium_mcore.optim.ownership import assign_owners, work
from equilibrium_mcore.optim.parts import Parts, join_rows, split_rows
from equilibrium_mcore.optim.schedule import learning_rate_factor
from equilibrium_mcore.optim.table import rule_for
from equilibrium_mcore.parallel.launch import RankInfo
from tests.optim.support import Group, matrix
from tests.support.runs import tiny_run

# ---------------------------------------------------------------------------------- the table


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("embedding.word_embeddings.weight", "embedding"),
        ("output_layer.weight", "output"),
        ("decoder.layers.0.mixer.A_log", "ssm"),
        ("decoder.layers.0.mixer.D", "ssm"),
        ("decoder.layers.0.mixer.dt_bias", "ssm"),
        ("decoder.layers.0.mixer.conv1d_weight", "conv"),
        ("decoder.layers.0.mixer.conv1d_bias", "conv"),
        ("decoder.layers.0.mixer.norm.weight", "norm"),
        ("decoder.final_norm.weight", "norm"),
        ("decoder.layers.1.self_attention.kv_layernorm.weight", "norm"),
        ("decoder.layers.1.self_attention.linear_qkv.bias", "bias"),
        ("decoder.layers.1.mlp.router.weight", "router"),
        ("decoder.layers.0.mixer.in_proj.weight", "matrix"),
        ("decoder.layers.1.mlp.experts.local_experts.3.linear_fc1.weight", "matrix"),
        ("decoder.layers.1.self_attention.linear_q_down_proj.weight", "matrix"),
    ],
)
def test_kind_of_parameter(name, kind):
    assert rule_for(name).kind == kind


def test_a_parameter_without_a_row_is_named():
    with pytest.raises(KeyError, match="decoder.layers.0.mixer.mystery"):
        rule_for("decoder.layers.0.mixer.mystery")


def test_parts_fill_their_matrices():
    model = load_model("equilibrium_3b")

    def sizes(name: str, of=model) -> tuple[int, dict[str, int]]:
        parts = rule_for(name).parts(of)
        return parts.blocks, dict(zip(parts.names, parts.sizes, strict=True))

    in_proj = {"z": 3072, "x": 3072, "B": 1024, "C": 1024, "dt": 48}
    assert sizes("x.in_proj.weight") == (1, in_proj)
    assert sizes("x.shared_experts.linear_fc1.weight") == (1, {"gate": 640, "up": 640})
    assert sizes("x.experts.local_experts.0.linear_fc1.weight") == (1, {"gate": 320, "up": 320})
    assert sizes("x.linear_qkv.weight", load_model("llama_1b")) == (8, {"q": 256, "k": 64, "v": 64})
    assert sizes("x.linear_q_up_proj.weight") == (16, {"nope": 128, "rope": 64})
    assert sizes("x.linear_kv_up_proj.weight") == (16, {"k": 128, "v": 128})
    assert sizes("x.linear_kv_down_proj.weight") == (1, {"latent": 512, "rope": 64})


@pytest.mark.parametrize(
    "parts", [None, Parts(("a", "b", "c"), (4, 2, 6)), Parts(("a", "b", "c"), (2, 1, 1), blocks=3)]
)
def test_cutting_and_joining_rows_is_the_identity(parts):
    whole = torch.arange(12.0).view(12, 1)
    pieces = split_rows(whole, parts)
    assert torch.equal(join_rows(pieces, parts), whole)
    if parts is not None and parts.blocks == 3:  # q rows of every group come together
        assert pieces[0].flatten().tolist() == [0, 1, 4, 5, 8, 9]


# --------------------------------------------------------------------------------- ownership


def test_owners_share_the_work_evenly():
    group = Group(4)
    parameters = []
    for index in range(40):
        parameter = matrix(torch.empty(64 + 8 * (index % 5), 96), MuonConfig())
        parameter.data_group = group
        parameters.append(parameter)
    assign_owners(parameters, distributed=True)
    loads = [sum(work(p) for p in parameters if p.owner == rank) for rank in range(4)]
    assert max(loads) <= 1.05 * min(loads)
    assign_owners(parameters, distributed=False)
    assert {p.owner for p in parameters} == {0}


# --------------------------------------------------------------------------------- schedules


def factors(steps: int = 100, **settings) -> list[float]:
    schedule = ScheduleConfig(**settings)
    return [learning_rate_factor(schedule, step=s, total_steps=steps) for s in range(steps)]


def test_cosine_rises_then_falls_to_its_floor():
    values = factors(kind="cosine", warmup_steps=9, minimum_ratio=0.1)
    assert values[:3] == pytest.approx([0.1, 0.2, 0.3])
    assert values[9] == 1.0
    middle = 9 + 91 // 2
    assert values[middle] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 45 / 91)))
    assert values[-1] == pytest.approx(0.1, abs=1e-3)
    assert all(a > b for a, b in zip(values[9:], values[10:], strict=False))


@pytest.mark.parametrize("form", ["linear", "cosine", "sqrt"])
def test_wsd_is_flat_then_falls(form):
    values = factors(
        kind="wsd", warmup_steps=10, decay_steps=20, decay_form=form, minimum_ratio=0.0
    )
    assert values[10:80] == [1.0] * 70
    assert values[-1] == pytest.approx(0.0, abs=1e-12)
    assert all(a > b for a, b in zip(values[79:], values[80:], strict=False))


def test_constant_stays():
    assert set(factors(kind="constant", warmup_steps=5)[5:]) == {1.0}


# ----------------------------------------------------------------------------- the whole of it


def _groups_of_a_model(rank_info: RankInfo, config) -> dict:
    """Which kind each parameter has, and the learning rate that it is updated with."""
    from equilibrium_mcore.training.setup import setup, teardown
    from equilibrium_mcore.training.step import train_step

    run = setup(config, rank_info)
    before = {p.name: p.model.detach().clone() for p in run.optimizer.parameters}
    train_step(run)
    rates = {}
    for optimizer in run.optimizer._optimizers:
        for group in optimizer.param_groups:
            for main in group["params"]:
                rates[id(main)] = (type(optimizer).__name__, group["lr"], group.get("weight_decay"))
    seen = {p.name: (p.kind, *rates[id(p.main)]) for p in run.optimizer.parameters}
    moved = {p.name for p in run.optimizer.parameters if not torch.equal(before[p.name], p.model)}
    teardown(run)
    return {"seen": seen, "moved": moved}


def test_every_parameter_is_updated_by_its_optimizer_at_its_rate(ranks, data, tmp_path):
    config = tiny_run(
        data,
        tmp_path,
        optimizer={
            "muon": {"learning_rate": 3e-3},
            "adamw": {
                "learning_rate": 1e-3,
                "learning_rates": {"embedding": 5e-3, "ssm": 2e-4},
                "weight_decay": 0.05,
            },
            "schedule": {"kind": "constant"},
        },
    )
    result = ranks.run(1, _groups_of_a_model, config)[0]
    expected = {
        "matrix": ("Muon", 3e-3, 0.1),
        "embedding": ("AdamW", 5e-3, 0.05),
        "output": ("AdamW", 1e-3, 0.05),
        "router": ("AdamW", 1e-3, 0.05),
        "ssm": ("AdamW", 2e-4, 0.0),
        "conv": ("AdamW", 1e-3, 0.0),
        "norm": ("AdamW", 1e-3, 0.0),
    }
    assert {seen[0] for seen in result["seen"].values()} == set(expected)
    for name, (kind, *rest) in result["seen"].items():
        assert tuple(rest) == expected[kind], name
    assert result["moved"] == set(result["seen"])


def _plant_infinity(rank_info: RankInfo, config) -> None:
    from equilibrium_mcore.training.setup import setup

    run = setup(config, rank_info)
    for parameter in run.optimizer.parameters:
        parameter.gradient.zero_()
    run.optimizer.parameters[5].gradient.view(-1)[0] = math.inf
    name = run.optimizer.parameters[5].name
    with pytest.raises(FloatingPointError, match="not finite") as caught:
        run.optimizer.step()
    assert name in str(caught.value)


def test_a_gradient_that_is_not_finite_is_named(ranks, data, tmp_path):
    ranks.run(1, _plant_infinity, tiny_run(data, tmp_path))
