"""Is the table's choice better? Muon as it is, MLA's maps joined, and Mamba's dt given to AdamW.

Trains a small hybrid with the same data and seeds in each form and prints losses and differences to
the table's form, seed by seed: pairs, because seeds differ more than forms do.

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

from equilibrium_mcore.config.load import load_run  # noqa: E402
from equilibrium_mcore.parallel import accelerator  # noqa: E402

accelerator.quiet_libraries()
accelerator.install()

import torch  # noqa: E402

from equilibrium_mcore.optim.muon import Muon  # noqa: E402
from equilibrium_mcore.parallel import process_groups  # noqa: E402
from equilibrium_mcore.parallel.launch import Place  # noqa: E402
from equilibrium_mcore.training.setup import setup  # noqa: E402
from equilibrium_mcore.training.step import train_step, validation_loss  # noqa: E402

JOINED = (
    'optimizer.overrides=[{pattern: "*.linear_q_up_proj.weight", split: false}, '
    '{pattern: "*.linear_kv_*_proj.weight", split: false}]'
)
FORMS = {"table": [], "mla_joined": [JOINED], "dt_adamw": []}


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
        try:
            run = setup(config, Place(0, 1, 0, f"file://{folder}/rendezvous"))
            if form == "dt_adamw":
                muon = next(o for o in run.optimizer._optimizers if isinstance(o, Muon))
                dt_by_adamw(muon, config.optimizer.adamw.learning_rate)
            for _ in range(steps):
                train_step(run)
            return validation_loss(run)
        finally:
            process_groups.destroy()


def main() -> int:
    """Parse the command line, train every form with every seed, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=150, help="steps of 1,024 tokens")
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    os.chdir(REPOSITORY)
    for seed in range(1, options.seeds + 1):
        losses = {form: final_loss(form, seed, options.steps) for form in FORMS}
        apart = {form: loss - losses["table"] for form, loss in losses.items()}
        print(json.dumps({"seed": seed, "loss": losses, "minus_table": apart}), flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
