"""Is the table's choice better? Muon as it is, MLA's maps joined, and Mamba's dt given to AdamW.

Trains a small hybrid with the same data and seeds in each form and prints losses and differences to
the table's form, seed by seed: pairs, because seeds differ more than forms do. First it prints what
joining does to an update: the root mean square of each map's rows, joined over by itself.

Example:
    python examples/optimizer_shootout/ablations.py --steps 150 --seeds 3
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(REPOSITORY))

from equilibrium_mcore.cli.command import run_command  # noqa: E402
from equilibrium_mcore.config.load import load_run  # noqa: E402
from equilibrium_mcore.parallel import accelerator  # noqa: E402

accelerator.quiet_libraries()
accelerator.install()

import torch  # noqa: E402

from equilibrium_mcore.optim.muon import Muon  # noqa: E402
from equilibrium_mcore.optim.newton_schulz import orthogonalise  # noqa: E402
from equilibrium_mcore.optim.parts import split_rows  # noqa: E402
from equilibrium_mcore.training.setup import run_alone  # noqa: E402
from equilibrium_mcore.training.step import train_step, validation_loss  # noqa: E402


def joined(*weights: str) -> list[str]:
    """The override that treats these weights as one matrix each."""
    rows = ", ".join(f'{{pattern: "*.{name}.weight", split: false}}' for name in weights)
    return [f"optimizer.overrides=[{rows}]"]


FORMS = {
    "table": [],
    "mla_joined": joined("linear_q_up_proj", "linear_kv_*_proj"),
    "q_up_joined": joined("linear_q_up_proj"),
    "kv_up_joined": joined("linear_kv_up_proj"),
    "kv_down_joined": joined("linear_kv_down_proj"),
    "dt_adamw": [],
}


def dt_by_adamw(optimizer: Muon, rate: float) -> None:
    """Let Adam choose the direction of in_proj's dt rows; for one rank."""
    seconds: dict[torch.Tensor, torch.Tensor] = {}
    plain = optimizer.directions

    def directions(batch):
        chosen = plain(batch)
        for main, direction in chosen.items():
            parts = optimizer._info[main].treatment.parts
            if parts is None or "dt" not in parts.names:
                continue
            rows = slice(main.shape[0] - parts.sizes[-1], None)
            gradient, momentum = main.grad[rows], optimizer.state[main]["momentum"][rows]
            second = seconds.setdefault(main, torch.zeros_like(gradient))
            second.lerp_(gradient.square(), 0.05)
            steps = optimizer.steps
            first = momentum / (1 - optimizer.momentum_decay**steps)
            adam = first / ((second / (1 - 0.95**steps)).sqrt() + 1e-8)
            direction[rows] = adam * (rate / optimizer.param_groups[0]["peak_lr"])
        return chosen

    optimizer.directions = directions


def sizes_if_joined(optimizer: Muon) -> dict[str, dict[str, float]]:
    """For every matrix of several maps: size of each map's update, joined over by itself."""
    found: dict[str, dict[str, float]] = {}
    settings = {"steps": 5, "coefficients": "quintic", "precision": "highest"}
    for main, parameter in optimizer._info.items():
        parts = parameter.treatment.parts
        ending = parameter.name.split(".", 3)[-1]
        if parts is None or ".local_experts." in parameter.name or ending in found:
            continue
        momentum = optimizer.state[main]["momentum"]
        whole = orthogonalise(momentum[None], **settings)[0] * max(momentum.shape) ** 0.5
        joined = split_rows(whole, parts)
        found[ending] = {}
        for name, part, mine in zip(parts.names, split_rows(momentum, parts), joined, strict=True):
            apart = orthogonalise(part[None], **settings)[0] * max(part.shape) ** 0.5
            ratio = mine.square().mean() / apart.square().mean()
            found[ending][name] = round(ratio.item() ** 0.5, 3)
    return found


def final_loss(form: str, seed: int, steps: int) -> float:
    """Validation loss of one run, in this process."""
    with tempfile.TemporaryDirectory(prefix="ablation_") as folder:
        config = load_run(
            "configs/runs/quickstart.yaml",
            [
                f"output_directory={folder}/run",
                "model.layer_pattern=ME|+E",
                "parallelism={world_size: 1}",
                f"training.seed={seed}",
                f"training.steps={steps}",
                "training.sequence_length=128",
                "training.micro_batch_size=8",
                "training.global_batch_size=8",
                "training.validation_batches=8",
                *FORMS[form],
            ],
        )
        with run_alone(config) as run:
            if form == "dt_adamw":
                muon = next(o for o in run.optimizer._optimizers if isinstance(o, Muon))
                dt_by_adamw(muon, config.optimizer.adamw.learning_rate)
            for _ in range(steps):
                train_step(run)
            if (form, seed) == ("table", 1):
                muon = next(o for o in run.optimizer._optimizers if isinstance(o, Muon))
                print(json.dumps({"joined over by itself": sizes_if_joined(muon)}), flush=True)
            return validation_loss(run)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How long, how often, and which forms."""
    parser.add_argument("--steps", type=int, default=150, help="steps of 1,024 tokens")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--forms", nargs="+", choices=FORMS, default=list(FORMS))


def run(options: argparse.Namespace) -> None:
    """Train every form with every seed, print."""
    os.chdir(REPOSITORY)
    for seed in range(1, options.seeds + 1):
        losses = {form: final_loss(form, seed, options.steps) for form in options.forms}
        apart = {form: loss - losses[options.forms[0]] for form, loss in losses.items()}
        print(json.dumps({"seed": seed, "loss": losses, "minus_first_form": apart}), flush=True)


if __name__ == "__main__":
    raise SystemExit(run_command(__doc__, add_arguments, run))
