"""The certificate passes healthy layouts, and catches and names every planted fault."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from equilibrium_mcore.certify.bench import Bench
from equilibrium_mcore.certify.certificate import each_once
from equilibrium_mcore.certify.shrink import shrink_pattern
from equilibrium_mcore.certify.shrink_optimizer import longest_side
from equilibrium_mcore.certify.twin import (
    check_layout,
    in_layout,
    make_twin,
    parse_layout,
    shrink_layout,
)
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.load import load_run
from equilibrium_mcore.config.schema import MLPConfig, ModelConfig, MoEConfig
from tests.certify.faults import EXPECTED, HEALTHY, SEEN_BY_THE_WITNESS

ROOT = Path(__file__).parents[2]
CASES = {fault.__name__: case for fault, case in EXPECTED.items() if fault not in HEALTHY}


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> dict[str, dict]:
    """The certificates of all cases, made in one process that forks ranks."""
    output = tmp_path_factory.mktemp("certificates") / "said.json"
    job = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.certify.faults", str(output)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert job.returncode == 0, job.stderr[-4000:]
    return json.loads(output.read_text())


def verdicts(certificate: dict) -> list[dict]:
    (found,) = certificate["layouts"].values()
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", [fault.__name__ for fault in HEALTHY])
def test_healthy_layouts_pass(said, name):
    certificate = said[name]
    assert certificate["passed"], [v for v in verdicts(certificate) if not v["passed"]]
    # Not because nothing was compared: sums in another order do differ a little.
    gradients = next(v for v in verdicts(certificate) if v["what"] == "gradients")
    assert 0 < gradients["worst_relative_difference"] < gradients["tolerance"] / 5


@pytest.mark.slow
@pytest.mark.parametrize("fault", CASES)
def test_planted_fault_is_caught_and_named(said, fault):
    case = CASES[fault]
    certificate = said[fault]
    assert not certificate["passed"]
    failed = [v for v in verdicts(certificate) if not v["passed"]]
    assert any(case.what in v["what"] and case.where in v["where"] for v in failed), failed


@pytest.mark.slow
def test_a_fault_of_the_optimizer_leaves_the_gradients_alone(said):
    """What is named is the cause, not only that something differs."""
    first = {
        v["what"]: v["passed"]
        for v in verdicts(said["blockwise_muon"])
        if v["what"] in ("gradients", "weights loaded")
    }
    assert all(first.values())


@pytest.mark.slow
@pytest.mark.parametrize("fault", [f for f, c in SEEN_BY_THE_WITNESS.items() if c.layout])
def test_what_is_wrong_everywhere_is_seen_by_the_witness_alone(said, fault):
    case = SEEN_BY_THE_WITNESS[fault]
    certificate = said[fault.__name__]
    assert all(v["passed"] for v in verdicts(certificate)), "the layouts agree with each other"
    (witnessed,) = certificate["witnesses"].values()
    failed = [v for v in witnessed if not v["passed"]]
    assert not certificate["passed"]
    assert case.what in failed[0]["what"] and case.where in failed[0]["where"], failed


# ------------------------------------------------------------------------------------ the twin


@pytest.fixture
def run_3b():
    return load_run(ROOT / "configs" / "runs" / "pretrain_3b.yaml")


def test_layout_names():
    base = load_run(ROOT / "configs" / "runs" / "quickstart.yaml").parallelism
    layout = parse_layout("tp=2,cp=2,pp=2,ep=2", base=base)
    assert layout.world_size == 8
    assert layout.settings["sequence"] is True
    assert parse_layout("ep=4", base=base).world_size == 4
    assert parse_layout("dp=2,tp=2,sp=0", base=base).settings["sequence"] is False
    with pytest.raises(ConfigError, match="NAME=NUMBER"):
        parse_layout("tq=2", base=base)


def test_every_dimension_above_one_stays_above_one(run_3b):
    values = {"tensor": 4, "sequence": True, "pipeline": 4, "context": 2, "expert": 8}
    wide = run_3b.model_copy(
        update={"parallelism": run_3b.parallelism.model_copy(update={**values, "world_size": 64})}
    )
    layouts = shrink_layout(wide)
    assert all(layout.world_size <= 8 for layout in layouts)
    for name in ("tensor", "pipeline", "context", "expert"):
        assert any(layout.settings.get(name) == 2 for layout in layouts)
    assert any("dp=2" in layout.name for layout in layouts)


@pytest.mark.parametrize("stages", [1, 2, 4])
def test_the_twin_keeps_every_kind_and_cut(run_3b, tmp_path, stages):
    pattern = shrink_pattern(run_3b.model.layer_pattern, stages)
    assert pattern.count("|") == stages - 1
    assert set(pattern) - {"|"} == set(run_3b.model.layer_pattern) - {"|"}
    layouts = [parse_layout(f"pp={stages},tp=2,ep=2", base=run_3b.parallelism)]
    twin = make_twin(run_3b, layouts, folder=tmp_path)
    assert twin.model.moe.score_function == run_3b.model.moe.score_function
    assert twin.optimizer.muon.scale == run_3b.optimizer.muon.scale
    assert twin.model.hidden_size == 64


def _twin(tmp_path, run: str, layout: str, *overrides: str):
    config = load_run(ROOT / "configs" / "runs" / f"{run}.yaml", list(overrides))
    layouts = [parse_layout(layout, base=config.parallelism)]
    return make_twin(config, layouts, folder=tmp_path), layouts[0]


def test_the_twin_recomputes_as_the_run_does(tmp_path):
    full = ("training.recompute=full", "training.recompute_layers=2")
    twin, _ = _twin(tmp_path, "quickstart", "pp=2", *full)
    assert (twin.training.recompute, twin.training.recompute_layers) == ("full", 2)
    twin, _ = _twin(tmp_path, "pretrain_3b", "ep=2")
    assert twin.training.recompute_modules == ["core_attn", "mla_up_proj"]
    # Only Transformer Engine's experts recompute their activation, and the twin has none.
    some = ("training.recompute=selective", "training.recompute_modules=[moe_act, moe]")
    assert _twin(tmp_path, "quickstart", "ep=2", *some)[0].training.recompute_modules == ["moe"]
    alone = ("training.recompute=selective", "training.recompute_modules=[moe_act]")
    assert _twin(tmp_path, "quickstart", "ep=2", *alone)[0].training.recompute == "none"


def test_a_global_balancing_loss_has_one_micro_batch_in_every_layout(tmp_path):
    balanced = ("model.moe.load_balancing=global_aux_loss", "training.micro_batch_size=8")
    twin, layout = _twin(tmp_path, "quickstart", "dp=2,tp=2", *balanced)
    assert twin.training.micro_batch_size == twin.training.global_batch_size == 8
    assert in_layout(twin, layout).training.micro_batch_size == 4


def test_batches_fit_every_layout(tmp_path):
    assert _twin(tmp_path, "quickstart", "dp=3")[0].training.global_batch_size == 24
    twin, layout = _twin(tmp_path, "quickstart", "dp=2,pp=2,vpp=2")
    assert twin.training.micro_batch_size == 2
    assert in_layout(twin, layout).training.global_batch_size == 8


def test_more_tensor_ranks_than_key_value_heads_share_them(tmp_path):
    wide = ("model=qwen2_1.5b", "parallelism.expert=1", "parallelism.tensor=4")
    assert _twin(tmp_path, "quickstart", "tp=2", *wide)[0].model.attention.num_query_groups == 1
    assert _twin(tmp_path, "quickstart", "tp=4", *wide)[0].model.attention.num_query_groups == 2


def test_the_longest_side_is_that_of_any_kind_of_layer():
    experts = MoEConfig(num_experts=4, top_k=1, expert_ffn_hidden_size=24)
    shared = experts.model_copy(update={"shared_ffn_hidden_size": 40})

    def side(**sections) -> int:
        base = dict(name="sides", layer_pattern="E", hidden_size=8, vocab_size=8)
        return longest_side(ModelConfig(**base, **sections))

    assert (side(), side(moe=experts), side(moe=shared)) == (8, 24, 40)
    assert side(moe=shared, mlp=MLPConfig(ffn_hidden_size=64)) == 64


def test_overrides_are_those_of_the_twins_layers(tmp_path):
    patterns = ["decoder.layers.6.*", "*.layers.0.mixer.*", "*.layers.4.mixer.*"]
    overrides = ", ".join(f"{{pattern: '{p}', learning_rate: 1e-3}}" for p in patterns)
    twin, _ = _twin(tmp_path, "quickstart", "ep=2", f"optimizer.overrides=[{overrides}]")
    assert twin.model.layer_pattern == "ME+"
    found = [override.pattern for override in twin.optimizer.overrides]
    assert found == ["decoder.layers.2.*", "*.layers.0.mixer.*"]


def test_a_layout_that_divides_nothing_is_refused(run_3b, tmp_path):
    layout = parse_layout("tp=3", base=run_3b.parallelism)
    with pytest.raises(ConfigError, match=r"num_heads=16 .*: use 1, 2, 4, 8"):
        check_layout(run_3b, layout)
    check_layout(run_3b, parse_layout("tp=8,ep=8", base=run_3b.parallelism))
    # What the twin itself cannot have is said before it is trained.
    seven = parse_layout("pp=7", base=run_3b.parallelism)
    with pytest.raises(ConfigError, match="layout pp=7 of pretrain_3b"):
        check_layout(run_3b, seven)
    with pytest.raises(ConfigError, match="layout tp=2,sp=0 of the twin"):
        Bench(tmp_path, run_3b, [parse_layout("tp=2,sp=0", base=run_3b.parallelism)], None)


def tool(*arguments: str | Path) -> subprocess.CompletedProcess:
    """The tool as on a host where nobody has set a variable."""
    config = ROOT / "configs" / "runs" / "quickstart.yaml"
    return subprocess.run(
        [sys.executable, "-W", "ignore", ROOT / "tools" / "certify_layout.py", config, *arguments],
        cwd=ROOT,
        env={name: os.environ[name] for name in ("HOME", "PATH")},
        capture_output=True,
        text=True,
    )


def test_tool_writes_the_certificate_and_tells_by_its_status(tmp_path):
    output = tmp_path / "certificate.json"
    job = tool("--json", output, "--plot", output.with_suffix(".png"), "--time-limit", "10")
    assert job.returncode == 0, job.stdout + job.stderr
    assert "the same numbers in every layout" in job.stdout
    certificate = json.loads(output.read_text())
    assert certificate["passed"] and certificate["not_certified"] and certificate["versions"]
    assert output.with_suffix(".png").read_bytes().startswith(b"\x89PNG")
    wrong = tool("--plot", output)
    assert wrong.returncode == 2 and "must end in .png" in wrong.stderr
    wrong = tool("--layouts", "tp=two")
    assert wrong.returncode == 2 and "NAME=NUMBER" in wrong.stderr
    wrong = tool("--layouts", "tp=3")
    assert wrong.returncode == 2 and "tensor=3 does not divide" in wrong.stderr
    assert "..." not in wrong.stdout  # nothing was trained


def test_tool_tells_a_phase_that_takes_too_long():
    late = tool("--time-limit", "0.0001")
    assert late.returncode == 3 and "Traceback" not in late.stderr, late.stderr
    told = "certificate, reference on 1 ranks: they did not end within 0.0001 minutes"
    assert told in late.stderr and "--time-limit MINUTES" in late.stderr
    assert "rank 0 (pid " in late.stderr


def test_a_layout_that_is_named_twice_is_certified_once(run_3b):
    own = shrink_layout(run_3b)
    named = [parse_layout(text, base=run_3b.parallelism) for text in ("ep=2,dp=2", "tp=2")]
    assert own[0].name == "ep=2,dp=2"
    assert [layout.name for layout in each_once([*own, *named])] == ["ep=2,dp=2", "tp=2"]
