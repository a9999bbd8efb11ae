"""Checkpoints of real training on several ranks, exported without process groups."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from equilibrium_mcore.hugging_face.convert import export_hugging_face
from equilibrium_mcore.hugging_face.mapping import plan
from equilibrium_mcore.hugging_face.reader import CheckpointReader
from equilibrium_mcore.hugging_face.verify import TOLERANCE, verify_export
from tests.support.runs import tiny_run, train_steps

LAYOUTS = {
    "tp2_sp_ep2": {"tensor": 2, "sequence": True, "expert": 2},
    "pp2_ep2": {"pipeline": 2, "expert": 2},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_is_read(name, ranks, data, tmp_path):
    parallelism = {"world_size": 4, **LAYOUTS[name]}
    config = tiny_run(data, tmp_path / "run", parallelism=parallelism)
    ranks.run(4, train_steps, config, 1, True)
    report = export_hugging_face(tmp_path / "run", tmp_path / "out", dtype="float32")
    assert report.checkpoint.name == "step_00000001"
    assert verify_export(tmp_path / "run", tmp_path / "out") <= TOLERANCE
    assert "1 of 20 steps, 256 tokens" in (tmp_path / "out" / "README.md").read_text()


def test_main_weights_are_the_unrounded_ones(ranks, data, tmp_path):
    """Every tensor of a bfloat16 run is its float32 copy, rounded."""
    config = tiny_run(data, tmp_path / "run", training={"precision": "bf16"})
    ranks.run(1, train_steps, config, 2, True)
    run, rounded, exact = tmp_path / "run", tmp_path / "rounded", tmp_path / "exact"
    export_hugging_face(run, rounded, dtype="float32")
    checkpoint = export_hugging_face(run, exact, dtype="float32", main_weights=True).checkpoint
    low = load_file(rounded / "model.safetensors")
    high = load_file(exact / "model.safetensors")
    differing = [name for name in low if not torch.equal(low[name], high[name])]
    assert len(differing) > len(low) / 2
    for name in differing:
        assert torch.equal(low[name], high[name].bfloat16().float()), name
    assert verify_export(run, exact, main_weights=True) <= TOLERANCE
    assert verify_export(run, rounded) <= TOLERANCE
    with pytest.raises(ValueError, match="computes other logits"):
        verify_export(run, exact)
    # No tensor is found only among the optimizer's.
    names = CheckpointReader(checkpoint).names()
    assert CheckpointReader(checkpoint, main_weights=True).names() == names
    plan(config.model, names)
