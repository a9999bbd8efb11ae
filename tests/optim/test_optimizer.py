"""The table, Muon, AdamW's kinds, ownership and schedules, against plain references."""

from __future__ import annotations

import math

import pytest
import torch

from equilibrium_mcore.config.load import load_model
from equilibrium_mcore.config.optimizers import MuonConfig, ScheduleConfig
from equilibrium_mcore.config.schema import ModelConfig
from equilibrium_mcore.optim.ownership import assign_owners, work
from equilibrium_mcore.optim.parts import Parts, join_rows, split_rows
from equilibrium_mcore.optim.schedule import learning_rate_factor
from equilibrium_mcore.optim.table import rule_for
from equilibrium_mcore.parallel.launch import RankInfo
from tests.optim.support import Group, matrix
from tests.support.runs import tiny_run

EVERY_KIND = ModelConfig(name="rows", layer_pattern="M+|*-E", hidden_size=8, vocab_size=8)

# ---------------------------------------------------------------------------------- the table


@pytest.mark.parametrize(
    ("name", "kind"),  # of a parameter of the pattern M+*-E
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
        ("decoder.layers.2.self_attention.linear_qkv.bias", "bias"),
        ("decoder.layers.3.mlp.linear_fc2.weight", "matrix"),
        ("decoder.layers.4.mlp.router.weight", "router"),
        ("decoder.layers.0.mixer.in_proj.weight", "matrix"),
        ("decoder.layers.4.mlp.experts.local_experts.3.linear_fc1.weight", "matrix"),
        ("decoder.layers.1.self_attention.linear_q_down_proj.weight", "matrix"),
    ],
)
def test_kind_of_parameter(name, kind):
    assert rule_for(name, EVERY_KIND).kind == kind


def test_a_parameter_without_a_row_is_named():
    with pytest.raises(KeyError, match=r"decoder.layers.0.mixer.mystery.*LAYER_RULES\['mamba'\]"):
        rule_for("decoder.layers.0.mixer.mystery", EVERY_KIND)
    with pytest.raises(KeyError, match="mystery.*MODEL_RULES"):
        rule_for("mystery", EVERY_KIND)


def test_a_layer_has_the_rows_of_its_own_kind():
    """Two kinds may give one name to other maps, so that a name alone says nothing."""
    with pytest.raises(KeyError, match=r"in_proj.*LAYER_RULES\['mla'\]"):
        rule_for("decoder.layers.1.mixer.in_proj.weight", EVERY_KIND)


def test_parts_fill_their_matrices():
    model = load_model("equilibrium_3b")

    def sizes(letter: str, name: str, of=model) -> tuple[int, dict[str, int]]:
        layer = of.layer_pattern.replace("|", "").index(letter)
        parts = rule_for(f"decoder.layers.{layer}.{name}", of).parts(of)
        return parts.blocks, dict(zip(parts.names, parts.sizes, strict=True))

    in_proj = {"z": 3072, "x": 3072, "B": 1024, "C": 1024, "dt": 48}
    assert sizes("M", "mixer.in_proj.weight") == (1, in_proj)
    fc1 = "linear_fc1.weight"
    assert sizes("E", f"mlp.shared_experts.{fc1}") == (1, {"gate": 640, "up": 640})
    assert sizes("E", f"mlp.experts.local_experts.0.{fc1}") == (1, {"gate": 320, "up": 320})
    llama = load_model("llama_1b")
    qkv = {"q": 256, "k": 64, "v": 64}
    assert sizes("*", "self_attention.linear_qkv.weight", llama) == (8, qkv)
    assert sizes("-", f"mlp.{fc1}", llama) == (1, {"gate": 8192, "up": 8192})
    of_mla = "self_attention.linear_"
    assert sizes("+", f"{of_mla}q_up_proj.weight") == (16, {"nope": 128, "rope": 64})
    assert sizes("+", f"{of_mla}kv_up_proj.weight") == (16, {"k": 128, "v": 128})
    assert sizes("+", f"{of_mla}kv_down_proj.weight") == (1, {"latent": 512, "rope": 64})


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
