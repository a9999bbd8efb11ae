"""What the card of a released model says of its layers and its training."""

from __future__ import annotations

from pathlib import Path

import pytest

from equilibrium_mcore.config.load import load_run
from equilibrium_mcore.config.optimizers import OPTIMIZERS
from equilibrium_mcore.hugging_face.model_card import model_card

RUN = Path(__file__).parents[2] / "configs" / "runs" / "quickstart.yaml"


def card(*overrides: str) -> str:
    return model_card(
        load_run(RUN, list(overrides)),
        checkpoint=Path("step_00000010"),
        state={"step": 10, "tokens": 1000},
        dtype="float32",
        total_parameters=2,
        active_parameters=1,
        splits_special_tokens=True,
    )


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_optimizer_is_the_runs_own(name):
    text = card(f"optimizer.matrices={name}", f"optimizer.{name}.learning_rate=0.0123")
    assert f"{OPTIMIZERS[name].label} (peak learning rate 0.0123)" in text
    assert ("AdamW (" in text and "for the rest" in text) or name == "adamw"


def test_layers_are_told_by_kind():
    text = card()
    assert "| `M` | Mamba-2 | 3 |" in text and "| `E` | mixture of experts (MoE) | 4 |" in text
    assert "| Mamba-2 |" in text and "| GQA |" not in text
