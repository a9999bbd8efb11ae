"""Frozen parameters: bit-equal after steps in every layout, without gradients or state."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.parallel import accelerator
from tests.support.pool import RankError
from tests.support.runs import MODEL, tiny_run

accelerator.install()

EMBEDDING = "embedding.word_embeddings.weight"
# A table, a whole layer (its router and experts too), Mamba's projections, halves of experts.
PATTERNS = ["embedding.*", "decoder.layers.1.*", "*.in_proj.weight", "*.linear_fc2.weight"]
STEPS = 3
ONE = {"world_size": 1}
LAYOUTS = {
    "tp2_sp_ep2": {"world_size": 2, "tensor": 2, "sequence": True, "expert": 2},
    "dp2": {"world_size": 2},
}


def observed(rank_info, config, steps: int, save: bool = False) -> dict[str, Any]:
    """Train; what was seen on this rank, weights as bytes by name."""

    from equilibrium_mcore.optim.parameters import layout_free_names
    from equilibrium_mcore.training.callbacks import LogCallback
    from equilibrium_mcore.training.saving import CheckpointCallback
    from equilibrium_mcore.training.setup import setup, teardown
    from equilibrium_mcore.training.step import train_step

    run = setup(config, rank_info)
    named = [pair for chunk in run.chunks for pair in layout_free_names(chunk)]
    buffers = [b for c in run.chunks for b in (*c.buffers, *c.expert_parallel_buffers)]

    def weights() -> dict[str, bytes]:
        return {name: tensor.detach().numpy().tobytes() for name, tensor in named}

    before = weights()
    outcomes = [train_step(run) for _ in range(steps)]
    if save:
        CheckpointCallback(config, LogCallback(config)).on_end(run, reason="stop")
    after = weights()
    seen = {
        "loss": [outcome.loss for outcome in outcomes],
        "norm": [outcome.gradient_norm for outcome in outcomes],
        "weights": after,
        "held": {name for name in after if after[name] == before[name]},
        "trained": {parameter.name for parameter in run.optimizer.parameters},
        "in_buffers": sum(b.numel_unpadded for b in buffers),
        "trainable": sum(t.numel() for _, t in named if t.requires_grad),
    }
    teardown(run)
    return seen


@pytest.fixture(scope="module")
def start(ranks, data, tmp_path_factory):
    """A checkpoint to start from, by whether the embedding is tied."""
    made: dict[bool, Path] = {}

    def make(tied: bool = False) -> Path:
        if tied not in made:
            made[tied] = tmp_path_factory.mktemp("start")
            model = {"tie_embeddings": tied}
            config = tiny_run(data, made[tied], parallelism=ONE, model=model)
            ranks.run(1, observed, config, 2, True)
        return made[tied]

    return make


@pytest.fixture
def frozen_run(data, tmp_path, start):
    def make(name: str, patterns: list[str], layout: dict, **changes: Any):
        model = changes.pop("model", {})
        training = {"frozen": patterns, "steps": 8, "global_batch_size": 4, "sequence_length": 64}
        training |= {"precision": "fp32", **changes.pop("training", {})}
        return tiny_run(
            data,
            tmp_path / name,
            parallelism=layout,
            training=training,
            model=model,
            checkpoint={"initial_weights": str(start(model.get("tie_embeddings", False)))},
            **changes,
        )

    return make


def is_frozen(name: str) -> bool:
    return (
        name == EMBEDDING
        or name.startswith("decoder.layers.1.")
        or name.endswith((".in_proj.weight", ".linear_fc2.weight"))
    )


def check_held(seen: list[dict]) -> None:
    """What is frozen did not change by a bit, everything else did, and nothing is kept for it."""
    for rank in seen:
        names = set(rank["weights"])
        assert rank["held"] == {name for name in names if is_frozen(name)}
        assert rank["trained"] == names - rank["held"]
        assert rank["in_buffers"] == rank["trainable"] > 0


def test_one_rank_and_layouts_agree(ranks, frozen_run):
    whole = ranks.run(1, observed, frozen_run("one", PATTERNS, ONE), STEPS)
    check_held(whole)
    for name, layout in LAYOUTS.items():
        seen = ranks.run(2, observed, frozen_run(name, PATTERNS, layout), STEPS)
        check_held(seen)
        assert seen[0]["loss"] == pytest.approx(whole[0]["loss"], rel=1e-5)
        assert seen[0]["norm"] == pytest.approx(whole[0]["norm"], rel=1e-4)


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recomputing_changes_nothing(ranks, frozen_run, recompute):
    """What depends on no tensor with a gradient is not computed again, nor trained."""
    patterns = ["embedding.*"]
    plain = ranks.run(1, observed, frozen_run("plain", patterns, ONE), 2)[0]
    training = {"recompute": recompute, "recompute_modules": ["core_attn", "moe", "mlp"]}
    again = ranks.run(1, observed, frozen_run(recompute, patterns, ONE, training=training), 2)[0]
    assert again["held"] == {EMBEDDING} and again["loss"] == plain["loss"]
    assert again["norm"] == pytest.approx(plain["norm"], rel=1e-6)


def test_a_resume_is_bit_equal_and_may_freeze_more(ranks, frozen_run):
    straight = ranks.run(1, observed, frozen_run("straight", PATTERNS, ONE), 4)[0]
    first = ranks.run(1, observed, frozen_run("parts", PATTERNS, ONE), 2, True)[0]
    second = ranks.run(1, observed, frozen_run("parts", PATTERNS, ONE), 2, True)[0]
    assert first["loss"] + second["loss"] == straight["loss"]
    assert second["weights"] == straight["weights"]
    more = ranks.run(1, observed, frozen_run("parts", [*PATTERNS, "output_*"], ONE), 1, True)[0]
    assert more["held"] == second["held"] | {"output_layer.weight"}
    with pytest.raises(RankError, match=r"training\.frozen=.*e\.g\. output_layer\.weight: it has"):
        ranks.run(1, observed, frozen_run("parts", PATTERNS, ONE), 1)


TIED = {"tie_embeddings": True}
TWO_STAGES = {
    "pp2": {"world_size": 2, "pipeline": 2},
    "vpp2": {"world_size": 2, "pipeline": 2, "virtual_pipeline": 2},
    "pp2_tp2": {"world_size": 4, "pipeline": 2, "tensor": 2, "sequence": True},
}
FROZEN = {
    "table": ["embedding.*"],
    "stage": ["embedding.*", *(f"decoder.layers.{n}.*" for n in range(4))],
}


@pytest.mark.slow
@pytest.mark.parametrize("case", FROZEN)
def test_tied_embeddings_on_two_stages_are_one(ranks, frozen_run, case):
    """The copy on the last stage is held as the table is; a stage may be frozen whole."""
    run = frozen_run("one", FROZEN[case], ONE, model=TIED)
    whole = ranks.run(1, observed, run, STEPS + 1)[0]
    for name, layout in TWO_STAGES.items():
        run = frozen_run(name, FROZEN[case], layout, model=TIED)
        seen = ranks.run(layout["world_size"], observed, run, STEPS, True)
        assert "output_layer.weight" in seen[-1]["held"] and EMBEDDING in seen[0]["held"]
        resumed = ranks.run(layout["world_size"], observed, run, 1)[0]
        for key, tolerance in (("loss", 1e-5), ("norm", 1e-4)):
            found = seen[0][key] + resumed[key]
            assert found == pytest.approx(whole[key], rel=tolerance)
        if name != "pp2_tp2":
            table = seen[0]["weights"][EMBEDDING]
            assert table == whole["weights"][EMBEDDING]
            assert table == seen[-1]["weights"]["output_layer.weight"]


@pytest.mark.slow
def test_a_tied_table_and_its_copy_have_one_rate(ranks, frozen_run):
    """What the settings say of the embedding holds for its copy on the last stage."""
    optimizer = {"adamw": {"learning_rate": 2e-3, "learning_rates": {"embedding": 2e-2}}}
    run = frozen_run("rates", [], TWO_STAGES["pp2"], model=TIED, optimizer=optimizer)
    first, last = ranks.run(2, observed, run, STEPS)
    assert first["weights"][EMBEDDING] == last["weights"]["output_layer.weight"]


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["embeding.*"], r"'embeding\.\*' names no parameter.*e\.g\..*embedding\.word_embeddings"),
        (["*.expert_bias"], r"model\.moe\.expert_bias_update_rate=0"),
        (["*"], r"names all \d+ parameters"),
        (["*.local_experts.3.*"], r"names 1 of the 8 experts'.*are frozen together"),
    ],
)
def test_patterns_that_cannot_be_meant(data, tmp_path, patterns, message):
    from equilibrium_mcore.optim.param_groups import parameter_rows

    with pytest.raises(ConfigError, match=message):
        parameter_rows(tiny_run(data, tmp_path, training={"frozen": patterns, **SHORT}))


SHORT = {"sequence_length": 64, "global_batch_size": 4, "steps": 4, "precision": "fp32"}


def test_a_bias_beside_a_frozen_matrix_is_refused(data, tmp_path):
    from equilibrium_mcore.optim.frozen import frozen_names

    attention = {"num_heads": 4, "num_query_groups": 2, "head_dim": 16, "qkv_bias": True}
    kinds = {"layer_pattern": "*-", "mamba": None, "mla": None, "moe": None}
    config = tiny_run(data, tmp_path, model={**MODEL, **kinds, "attention": attention})
    with pytest.raises(ConfigError, match=r"linear_qkv\.weight and not .*linear_qkv\.bias"):
        frozen_names(config.model, ["*.linear_qkv.weight"])
    assert len(frozen_names(config.model, ["*.linear_qkv.*"])) == 2


def test_the_tool_shows_what_is_frozen(data, tmp_path):
    command = [sys.executable, "tools/show_param_groups.py", "configs/runs/quickstart.yaml"]
    command += ['training.frozen=["embedding.*", "*.router.weight"]']
    root = Path(__file__).parents[2]
    shown = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout
    line = next(line for line in shown.splitlines() if line.startswith("embedding."))
    assert line.endswith("training.frozen") and "frozen: " in shown
    found = subprocess.run([*command, "--json"], cwd=root, capture_output=True, check=True).stdout
    frozen = {row["name"] for row in json.loads(found) if row["frozen"]}
    assert EMBEDDING in frozen and all(n == EMBEDDING or "router" in n for n in frozen)
