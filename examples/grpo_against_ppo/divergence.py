"""How far each finished cell's policy is from where it started: KL on answers to held-out prompts.

Answers are drawn from the policy at the cell's temperature; its log p less that of the start is
averaged over their tokens. Written as divergence.json into the cell, unless it is there.

Example:
    python examples/grpo_against_ppo/divergence.py runs/grpo_against_ppo
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
REPOSITORY = HERE.parents[1]
sys.path[:0] = [str(HERE), str(REPOSITORY)]

from equilibrium_mcore.cli.command import run_command  # noqa: E402
from equilibrium_mcore.config.load import run_from_mapping  # noqa: E402
from equilibrium_mcore.config.yaml_io import read_mapping  # noqa: E402
from equilibrium_mcore.files.paths import user_path  # noqa: E402
from equilibrium_mcore.files.whole import write_whole  # noqa: E402
from equilibrium_mcore.parallel import accelerator  # noqa: E402

accelerator.quiet_libraries()
accelerator.install()

import numpy as np  # noqa: E402
from cell_results import CELL_FILE, DIVERGENCE_FILE, is_finished  # noqa: E402
from grid import places  # noqa: E402

from equilibrium_mcore.generation.interface import Prompt, Request  # noqa: E402
from equilibrium_mcore.online.answers import Answer  # noqa: E402
from equilibrium_mcore.online.engine import own_engine  # noqa: E402
from equilibrium_mcore.online.experience import packed_for, scored  # noqa: E402
from equilibrium_mcore.online.rollouts import sampling_of  # noqa: E402
from equilibrium_mcore.processes.threads import one_thread  # noqa: E402
from equilibrium_mcore.training.frozen import load_frozen  # noqa: E402
from equilibrium_mcore.training.schedule import evaluating  # noqa: E402
from equilibrium_mcore.training.scoring import log_probabilities  # noqa: E402
from equilibrium_mcore.training.setup import Run, run_alone  # noqa: E402

SAMPLES = 4  # answers to each held-out prompt


def divergence(run: Run, start: Path) -> float:
    """Nats per token between the run's weights and those of `start`, on its own answers."""
    samples = run.datasets.validation
    requests = [
        Request(Prompt.of(prompt.ids), sample)
        for prompt in samples.prompts
        for sample in range(SAMPLES)
    ]
    sampling = sampling_of(run.config.rollout, samples.stop_ids, seed=0, rollout=0)
    with evaluating(run.chunks):
        rollouts = own_engine(run).generate(requests, sampling)
    answers = [
        Answer(np.concatenate([one.request.prompt.ids, one.ids]), len(one.request.prompt.ids), n)
        for n, one in enumerate(rollouts)
    ]
    packed, at = packed_for(run, answers), run.config.rollout.temperature
    frozen = load_frozen(start, config=run.config, groups=run.groups)
    ours = scored(run, packed, lambda b: log_probabilities(run, b, temperature=at))
    theirs = scored(run, packed, lambda b: log_probabilities(run, b, temperature=at, chunks=frozen))
    moved = np.concatenate(ours).astype(np.float64) - np.concatenate(theirs)
    return float(moved.mean())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of which cells."""
    parser.add_argument("output", type=user_path, help="the folder that run.py wrote")


def run(options: argparse.Namespace) -> None:
    """Measure what is not measured yet."""
    output = options.output.absolute()
    os.chdir(REPOSITORY)
    for cell, folder in places(output):
        if (folder / DIVERGENCE_FILE).is_file() or not is_finished(folder):
            continue
        values = read_mapping(folder / CELL_FILE)
        start = values["checkpoint"]["initial_weights"]
        with tempfile.TemporaryDirectory(prefix="divergence_") as elsewhere, one_thread():
            values["output_directory"] = elsewhere
            values["checkpoint"]["initial_weights"] = str(folder)
            with run_alone(run_from_mapping(values)) as alone:
                found = divergence(alone, Path(start))
        write_whole(folder / DIVERGENCE_FILE, json.dumps({"nats_per_token": found}) + "\n")
        print(f"{cell}: {found:.3f} nats per token from the start", flush=True)


if __name__ == "__main__":
    raise SystemExit(run_command(__doc__, add_arguments, run))
