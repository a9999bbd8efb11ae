"""Which layers get an adapter: each linear layer is told, adapted or not, with the reason."""

from __future__ import annotations

import pytest

from equilibrium_mcore.adapters.report import with_adapters
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.load import load_run
from equilibrium_mcore.optim.param_groups import ParameterRow, as_text, parameter_rows


def rows_of(*overrides: str) -> list[ParameterRow]:
    config = load_run("configs/runs/quickstart.yaml", overrides)
    return with_adapters(parameter_rows(config), config)


def test_trap_every_linear_of_a_hybrid_is_covered_or_says_why():
    rows = {row.name: row for row in rows_of("adapters={rank: 8}")}
    matrices = [
        name for name, row in rows.items() if name.endswith(".weight") and len(row.shape) == 2
    ]
    bare = {name: rows[name].why_frozen for name in matrices
            if f"{name.removesuffix('.weight')}.adapter.A" not in rows}  # fmt: skip
    kinds = {"embedding.", "output_layer.", ".mlp.router.", ".local_experts."}
    assert all(any(kind in name for kind in kinds) for name in bare)
    assert all("linear layer" in why or "routed expert" in why for why in bare.values())
    trained = {name for name, row in rows.items() if row.treatment is not None}
    assert trained == {name for name in rows if ".adapter." in name}
    in_proj = "decoder.layers.0.mixer.in_proj"
    assert rows[f"{in_proj}.adapter.A"].shape == (8, 128)
    assert rows[f"{in_proj}.adapter.B"].shape == (784, 8)
    assert rows[f"{in_proj}.weight"].why_frozen == "adapters.targets: *"
    assert "of a routed expert: adapters.experts=true adapts them" in as_text(list(rows.values()))


def test_experts_get_theirs_when_asked():
    rows = [row.name for row in rows_of("adapters={experts: true, targets: ['*.linear_fc2']}")]
    adapted = [name for name in rows if name.endswith(".adapter.A")]
    assert len(adapted) == 4 * (8 + 1)  # of 4 layers: routed experts, and the shared ones


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["adapters={targets: ['*.in_prj']}"], "'*.in_prj' names no linear layer; use * for any"),
        (["adapters={targets: []}"], "adapters.targets: pattern '' names no linear layer"),
        (["adapters={targets: ['*.experts.*']}"], "but those of routed experts: set adapters.exp"),
        (["adapters={}", "training.frozen=['*.in_proj.*']"], "everything but the adapters is"),
        (
            ["adapters={experts: true}", "parallelism.expert_tensor=2"],
            "an expert's adapter is not cut; set expert_tensor to 1",
        ),
    ],
)
def test_trap_targets_and_settings_that_do_not_fit_are_refused(overrides, told):
    with pytest.raises(ConfigError) as error:
        rows_of(*overrides)
    assert told in str(error.value)
