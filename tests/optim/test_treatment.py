"""Overrides by name, names that no layout changes, shares of work, and the tools that show them."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.load import load_model, load_run
from equilibrium_mcore.config.optimizers import OptimizerConfig, OverrideConfig
from equilibrium_mcore.optim.newton_schulz import coefficient_triples, orthogonalise
from equilibrium_mcore.optim.ownership import spread
from equilibrium_mcore.optim.parameters import layout_free_names
from equilibrium_mcore.optim.treatment import check_overrides_match, treatment_of
from tests.optim.support import Group
from tests.support.pool import RankError
from tests.support.runs import tiny_run, train_steps

KV_DOWN = "decoder.layers.6.self_attention.linear_kv_down_proj.weight"
ROUTER = "decoder.layers.1.mlp.router.weight"
QUICKSTART = "configs/runs/quickstart.yaml"


def treat(name: str, shape: tuple[int, ...], *overrides: dict, **settings):
    optimizer = OptimizerConfig(overrides=[OverrideConfig(**o) for o in overrides], **settings)
    return treatment_of(name, shape, model=load_model("equilibrium_tiny"), optimizer=optimizer)


# ----------------------------------------------------------------------------------- overrides


def test_an_override_changes_what_it_names_and_nothing_else():
    plain = treat(KV_DOWN, (80, 128))
    assert (plain.optimizer, plain.learning_rate, plain.weight_decay) == ("muon", 0.02, 0.1)
    assert plain.parts.names == ("latent", "rope")
    change = {"pattern": "*.linear_kv_down_proj.weight", "optimizer": "adamw"}
    moved = treat(KV_DOWN, (80, 128), {**change, "learning_rate": 1e-3})
    assert (moved.optimizer, moved.learning_rate, moved.weight_decay) == ("adamw", 1e-3, 0.0)
    assert "*.linear_kv_down_proj.weight" in moved.why
    assert treat(ROUTER, (8, 128), change) == treat(ROUTER, (8, 128))


def test_the_first_pattern_that_matches_decides():
    narrow = {"pattern": "*.layers.6.*", "split": False, "weight_decay": 0.0}
    wide = {"pattern": "*.weight", "optimizer": "soap"}
    found = treat(KV_DOWN, (80, 128), narrow, wide)
    assert (found.optimizer, found.parts, found.weight_decay) == ("muon", None, 0.0)
    assert treat(ROUTER, (8, 128), narrow, wide).optimizer == "soap"


def test_a_matrix_optimizer_is_not_given_a_vector():
    with pytest.raises(ConfigError, match=r"A_log to muon.*\(16,\).*narrower pattern"):
        treat("decoder.layers.0.mixer.A_log", (16,), {"pattern": "*.A_log", "optimizer": "muon"})


def test_a_pattern_that_decides_nothing_is_named_with_a_hint():
    overrides = [OverrideConfig(pattern="*.linear_kv_dwn_proj.weight", split=False)]
    with pytest.raises(ConfigError, match="linear_kv_dwn_proj") as caught:
        check_overrides_match(overrides, [0], [ROUTER, KV_DOWN])
    assert KV_DOWN in str(caught.value)
    check_overrides_match(overrides, [1], [KV_DOWN])


def test_overrides_are_counted_over_all_ranks(ranks, data, tmp_path):
    """Layers 0 and 1 lie on the first pipeline rank alone; no rank has layer 99."""

    def config(layer: int):
        override = {"pattern": f"*.layers.{layer}.*.weight", "learning_rate": 1e-4}
        return tiny_run(
            data,
            tmp_path,
            parallelism={"world_size": 2, "pipeline": 2},
            optimizer={"overrides": [override]},
        )

    assert len(ranks.run(2, train_steps, config(0), 1)[0]["loss"]) == 1
    with pytest.raises(RankError, match=r"\*\.layers\.99\.\*\.weight.*decides no parameter"):
        ranks.run(2, train_steps, config(99), 1)


# --------------------------------------------------------------------------------------- names


def _experts(first_rank: int, *, grouped: bool) -> torch.nn.Module:
    """The shape of an MoE layer's modules, with 2 of 4 experts on this rank."""

    def linear(count: int | None) -> torch.nn.Module:
        module = torch.nn.Module()
        for number in range(count or 1):
            name = f"weight{number}" if count else "weight"
            module.register_parameter(name, torch.nn.Parameter(torch.zeros(2, 2)))
        return module

    experts = torch.nn.Module()
    experts.num_local_experts, experts.config = 2, SimpleNamespace(num_moe_experts=4)
    experts.ep_group = SimpleNamespace(rank=lambda: first_rank)
    if grouped:
        experts.linear_fc1, experts.linear_fc2 = linear(2), linear(2)
    else:
        experts.local_experts = torch.nn.ModuleList()
        for _ in range(2):
            expert = torch.nn.Module()
            expert.linear_fc1, expert.linear_fc2 = linear(None), linear(None)
            experts.local_experts.append(expert)
    model, layer = torch.nn.Module(), torch.nn.Module()
    layer.layer_number, layer.mlp = 8, torch.nn.Module()
    layer.mlp.experts = experts
    model.layers = torch.nn.ModuleList([layer])
    wrapper = torch.nn.Module()
    wrapper.decoder = model
    return wrapper


@pytest.mark.parametrize("rank", [0, 1])
def test_grouped_experts_have_the_names_of_experts_one_by_one(rank):
    names = [
        {name for name, _ in layout_free_names(_experts(rank, grouped=grouped))}
        for grouped in (True, False)
    ]
    first = 2 * rank
    assert names[0] == names[1]
    assert names[0] == {
        f"decoder.layers.7.mlp.experts.local_experts.{expert}.linear_fc{fc}.weight"
        for expert in (first, first + 1)
        for fc in (1, 2)
    }


# ------------------------------------------------------------------------------ spread of work


def test_the_least_loaded_gets_the_next_piece():
    loads = [5.0, 0.0, 0.0]
    assert spread([4, 3, 2, 1], loads) == [1, 2, 2, 1]
    assert loads == [5.0, 5.0, 5.0]
    assert Group(2).size() == 2


# --------------------------------------------------------------- float32 through Newton-Schulz


@pytest.mark.parametrize("decades", [0, 2, 4, 6])
def test_rounding_grows_no_more_than_the_documented_bound(decades):
    """A difference of gradients, relative to their norm, grows at most by the product of the slopes
    at zero (493 for five quintic steps) over the norm of the orthogonal factor; float32's own
    rounding adds less than 2e-5. docs/reference/optimizers.md states both."""
    generator = torch.Generator().manual_seed(decades)

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    settings = {"steps": 5, "coefficients": "quintic", "precision": "highest"}
    left, right = torch.linalg.qr(draw(64, 64)).Q, torch.linalg.qr(draw(96, 64)).Q
    gradient = (left * torch.logspace(0, -decades, 64, dtype=torch.float64)) @ right.T
    other = gradient * (1 + 2**-24 * draw(64, 96))
    update = orthogonalise(gradient[None], **settings)[0]
    apart = (orthogonalise(other[None], **settings)[0] - update).norm()
    slope = torch.tensor([a for a, _, _ in coefficient_triples(5, "quintic")]).prod()
    assert slope == pytest.approx(493, abs=1)
    relative = (other - gradient).norm() / gradient.norm()
    assert apart / update.norm() < 1.1 * slope / update.norm() * relative
    narrow = orthogonalise(gradient.float()[None], **settings)[0]
    same = orthogonalise(gradient.float().double()[None], **settings)[0]
    assert (narrow - same).norm() / update.norm() < 2e-5


# --------------------------------------------------------------------------------------- tools


def _tool(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_show_param_groups_lists_every_parameter_once():
    override = '[{pattern: "*.linear_proj.weight", optimizer: adamw, learning_rate: 5e-4}]'
    done = _tool(
        "tools/show_param_groups.py", QUICKSTART, f"optimizer.overrides={override}", "--json"
    )
    assert done.returncode == 0, done.stderr
    rows = {row["name"]: row for row in json.loads(done.stdout)}
    elements = sum(torch.Size(row["shape"]).numel() for row in rows.values())
    assert elements == 3_004_048
    proj = next(row for name, row in rows.items() if name.endswith(".linear_proj.weight"))
    assert (proj["optimizer"], proj["learning_rate"], proj["parts"]) == ("adamw", 5e-4, [])
    fc1 = rows["decoder.layers.1.mlp.experts.local_experts.7.linear_fc1.weight"]
    assert fc1["parts"] == ["gate 96x128", "up 96x128"]


def test_show_param_groups_names_a_pattern_without_parameters():
    done = _tool(
        "tools/show_param_groups.py",
        QUICKSTART,
        'optimizer.overrides=[{pattern: "nothing", split: false}]',
    )
    assert done.returncode == 2
    assert "'nothing' decides no parameter" in done.stderr


def _count_share() -> list[tuple[float, float, float]]:
    from tools.bench.measure.optimizer import count_share

    config = load_run("configs/runs/pretrain_3b.yaml")
    shares = [count_share(config, world_size) for world_size in (8, 64)]
    return [(s.operations_per_step, s.max_over_mean, s.of_a_step) for s in shares]


def _in_rank(rank_info, function):
    return function()


def test_the_3b_layout_spreads_newton_schulz(ranks):
    (few, even, _), (many, nearly, share) = ranks.run(1, _in_rank, _count_share)[0]
    assert few == many == pytest.approx(31e12, rel=0.01)
    assert even < 1.02
    assert nearly < 1.1
    assert share < 0.01
