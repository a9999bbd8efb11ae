"""The kernel tier's comparison, with PyTorch on both sides, and with a planted fault in one."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from equilibrium_mcore.parallel import accelerator
from equilibrium_mcore.parallel.launch import RankInfo

ROOT = Path(__file__).parents[2]


def _wrong_gate_in_the_fast_mixer() -> None:
    """Every bf16 model but the reference's gets a Mamba mixer with another step size."""
    from equilibrium_mcore.certify import kernels

    build = kernels.build_model

    def broken(model, layout, training, *args: Any, **kwargs: Any):
        module = build(model, layout, training, *args, **kwargs)
        if training.backend == "auto" and "M" in model.layer_pattern:
            mixer = module.decoder.layers[0].mixer
            forward = mixer.forward
            mixer.forward = lambda *args, **kwargs: _scaled(forward(*args, **kwargs))
        return module

    kernels.build_model = broken


def _scaled(result: tuple) -> tuple:
    return (result[0] * 1.1, *result[1:])


def _verdicts(rank_info: RankInfo, fault: bool) -> list[tuple[str, float, bool]]:
    from equilibrium_mcore.certify.kernels import certify_kernels
    from equilibrium_mcore.config.load import load_run
    from equilibrium_mcore.config.schema import ParallelismConfig
    from equilibrium_mcore.parallel import process_groups

    if fault:
        _wrong_gate_in_the_fast_mixer()
    config = load_run(ROOT / "configs" / "runs" / "quickstart.yaml")
    groups = process_groups.join(rank_info, ParallelismConfig(), seed=1)
    found = certify_kernels(config, groups)
    process_groups.destroy()
    return [(v.what, v.difference, v.passed) for v in found]


@pytest.mark.parametrize("fault", [False, True], ids=["healthy", "mixer"])
def test_layers_are_compared_one_by_one(ranks, fault):
    (verdicts,) = ranks.run(1, _verdicts, fault)
    kinds = {what.split(" ")[0] for what, _, _ in verdicts}
    assert kinds == {"mamba", "moe", "mla"}
    bad = {what.split(" ")[0] for what, _, passed in verdicts if not passed}
    assert bad == ({"mamba"} if fault else set())
    # bfloat16 really rounds: the comparison is not of equal things.
    assert all(difference > 1e-4 for what, difference, _ in verdicts if "bf16" in what)


@pytest.mark.skipif(accelerator.has_cuda(), reason="there is a GPU")
def test_without_a_gpu_the_tool_says_so():
    command = [sys.executable, str(ROOT / "tools" / "certify_layout.py")]
    config = str(ROOT / "configs" / "runs" / "quickstart.yaml")
    job = subprocess.run(
        [*command, config, "--tier", "kernels"], capture_output=True, text=True, cwd=ROOT
    )
    assert job.returncode == 2 and "no CUDA device" in job.stderr
