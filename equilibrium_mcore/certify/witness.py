"""A witness from outside: the twin against the exported class of transformers in a plain loop.

Layouts agree with one rank also where both are wrong in the same way. So the twin is trained here,
on one rank, and once more by `plain_loop` from the same weights on the same batches.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from equilibrium_mcore.certify.plain_loop import PlainTrace
from equilibrium_mcore.certify.verdict import Verdict, worst_verdict
from equilibrium_mcore.certify.witness_rank import FILE, Ours, train_both
from equilibrium_mcore.config.load import run_from_mapping
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.parallel.launch import RankInfo

STEPS = 10
WITNESSES = ("transformers",)
NAME = "witness transformers: EquilibriumForCausalLM and torch.optim.AdamW in a plain loop"
CHOICES = (
    "the witness trains on one rank with optimizer.matrices=adamw, no overrides, no load-balancing "
    "loss, a constant schedule, no packing, and no vocabulary padding: the rest of the run has none"
)
# Rows of the table beyond the vocabulary take part in training's softmax and are not exported, so
# the witness has none.
VOCABULARY = 256
BLEND = {"name": "made_up", "sources": [{"name": "made_up", "prefix": "made_up", "weight": 1.0}]}
WEIGHT_DECAY = 0.1  # where the run has none for AdamW, so that a fault of decay shows
INIT_STD = 0.1  # attention with small weights is nearly uniform, whatever its scale


class Tolerance(NamedTuple):
    """Relative differences that rounding of the run's dtype may make; the witness's is float64."""

    loss: float
    gradient_norm: float
    gradients: float
    weights: float


# float64, measured on the twins of six shipped models: 3e-16, 7e-16, 3e-15, 8e-12. The last one is
# AdamW dividing a gradient near 0, of key biases, by its own size; the smallest planted fault, an
# epsilon of 1e-6 instead of 1e-5 in the norms, gives 2e-4, 8e-4, 4e-2, 2e-1.
TOLERANCES = {
    torch.float64: Tolerance(1e-9, 1e-9, 1e-9, 1e-7),
}


def compare_with_witness(
    twin: RunConfig,
    run_ranks: Callable[[Callable[[RankInfo], None], int], None],
    folder: Path,
    *,
    prepare: Callable[[], None] | None = None,
    steps: int = STEPS,
) -> list[Verdict]:
    """The twin's training against transformers' class and torch.optim.AdamW, on one rank.

    `run_ranks` runs a function on so many ranks; `prepare` runs in that rank before anything.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = witnessed(twin, folder=folder / "run", steps=steps)
    run_ranks(partial(train_both, config=config, folder=folder, prepare=prepare), 1)
    seen = torch.load(folder / FILE)
    return verdicts(Ours(**seen["ours"]), PlainTrace(**seen["theirs"]))


def witnessed(twin: RunConfig, *, folder: Path, steps: int) -> RunConfig:
    """The twin as far as the plain loop knows it: see CHOICES."""
    values = twin.model_dump(mode="json")
    values["output_directory"] = str(folder)
    model, optimizer = values["model"], values["optimizer"]
    model.update(vocab_size=VOCABULARY, vocab_size_multiple=64, init_std=INIT_STD)
    if model["moe"]:
        model["moe"].update(load_balancing="none", aux_loss_coefficient=0.0, z_loss_coefficient=0.0)
    adamw = optimizer["adamw"]
    adamw["weight_decay"] = adamw["weight_decay"] or WEIGHT_DECAY
    values["optimizer"] = {
        "matrices": "adamw",
        "adamw": adamw,
        "schedule": {"kind": "constant"},
        "clip_gradient_norm": optimizer["clip_gradient_norm"],
    }
    # Made-up tokens take the place of the data; what is left of its section is that they are plain.
    values["stage"] = "pretrain"
    values["data"] = {**BLEND, "tokenizer": values["data"]["tokenizer"]}
    values["training"]["steps"] = steps
    return run_from_mapping(values)


def verdicts(ours: Ours, theirs: PlainTrace) -> list[Verdict]:
    """Loss and gradient norm of every step, gradients of the first, weights after the last."""
    allowed = TOLERANCES[ours.dtype]
    steps = f"weights after {len(ours.loss)} steps, relative to the update"
    changes = {name: theirs.weights[name] - ours.start[name] for name in theirs.weights}
    norms = ours.gradient_norm, theirs.gradient_norm
    return [
        _curve("loss of every step", ours.loss, theirs.loss, allowed.loss),
        _curve("gradient norm of every step", *norms, allowed.gradient_norm),
        _parameters(
            "gradients", ours.gradients, theirs.gradients, theirs.gradients, allowed.gradients
        ),
        _parameters(steps, ours.weights, theirs.weights, changes, allowed.weights),
    ]


def _curve(what: str, found: list[float], expected: list[float], tolerance: float) -> Verdict:
    pairs = enumerate(zip(found, expected, strict=True), start=1)
    return worst_verdict(what, {f"step {i}": abs(a - b) / abs(b) for i, (a, b) in pairs}, tolerance)


def _parameters(
    what: str,
    found: dict[str, Tensor],
    expected: dict[str, Tensor],
    scales: dict[str, Tensor],
    tolerance: float,
) -> Verdict:
    """Worst norm(found - expected) / norm(scale), in the order of the model."""
    apart = {
        name: ((found[name] - tensor).norm() / scales[name].norm()).item()
        for name, tensor in expected.items()
    }
    return worst_verdict(what, apart, tolerance)
