"""The witness agrees with healthy training, and sees what is wrong in every layout alike."""

from __future__ import annotations

from pathlib import Path

import pytest

from equilibrium_mcore.certify.twin import make_twin
from equilibrium_mcore.config.load import load_run
from equilibrium_mcore.parallel import accelerator
from tests.certify.faults import SEEN_BY_THE_WITNESS

accelerator.install()  # before megatron-core is imported

from equilibrium_mcore.certify.witness import compare_with_witness  # noqa: E402

ROOT = Path(__file__).parents[2]
ONE_RANK = "parallelism={}"
RATES = "{embedding: 1e-3, output: 2e-3, norm: 3e-3, bias: 4e-3, conv: 5e-3, router: 6e-3}"
# Every kind of parameter at its own rate, and a decay as large as the update: the two programs tell
# kinds by different names and tables.
SETTINGS = (f"optimizer.adamw.learning_rates={RATES}", "optimizer.adamw.weight_decay=5.0")
# No layer kind in common: MLA and Mamba-2, with experts that sigmoids and a bias choose; grouped
# queries with biases, and MLPs, under a tied table.
MODELS = ("equilibrium_tiny", "qwen2_1.5b")


def twin_of(model: str, folder: Path, *overrides: str):
    run = ROOT / "configs" / "runs" / "quickstart.yaml"
    return make_twin(
        load_run(run, [f"model={model}", ONE_RANK, *overrides]), [], folder=folder / "twin"
    )


def witness(ranks, twin, folder: Path, *, prepare=None, steps: int = 3):
    return compare_with_witness(
        twin,
        lambda work, world_size: ranks.run(world_size, work),
        folder,
        prepare=prepare,
        steps=steps,
    )


@pytest.mark.parametrize("model", MODELS)
def test_training_here_is_training_by_the_witness(ranks, tmp_path, model):
    found = witness(ranks, twin_of(model, tmp_path, *SETTINGS), tmp_path)
    assert all(v.passed for v in found), found
    # Two programs were compared: their rounding differs, if not in every line.
    assert any(v.difference > 0 for v in found), found


@pytest.mark.parametrize("fault", SEEN_BY_THE_WITNESS, ids=lambda fault: fault.__name__)
def test_fault_of_every_layout_is_named(ranks, tmp_path, fault):
    case = SEEN_BY_THE_WITNESS[fault]
    found = witness(ranks, twin_of("equilibrium_tiny", tmp_path), tmp_path, prepare=fault, steps=1)
    failed = [v for v in found if not v.passed]
    assert any(case.what in v.what and case.where in v.where for v in failed), found


@pytest.mark.slow
@pytest.mark.parametrize(
    "model", [path.stem for path in sorted((ROOT / "configs" / "models").glob("*.yaml"))]
)
def test_every_shipped_model_has_a_witness(ranks, tmp_path, model):
    found = witness(ranks, twin_of(model, tmp_path), tmp_path, steps=10)
    assert all(v.passed for v in found), found
