"""Print how fast a run's own engine generates, beside the exported class's `generate`.

Made-up prompts of 24 to 64 tokens are continued by both in this process, in turns;
nothing ends an answer early. Rates are of CPU time, so other work on the machine hardly matters.

Examples:
    python tools/bench/rollouts.py
    python tools/bench/rollouts.py --rows 128 --new-tokens 64
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from equilibrium_mcore.cli.command import run_command
from equilibrium_mcore.config.load import load_run
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.files.tables import terminal_table
from equilibrium_mcore.parallel import accelerator

PROMPTS = (24, 64)
OWN, THEIRS = "own engine", "exported class, generate"


def made_up(config: RunConfig, rows: int) -> list[np.ndarray]:
    """Prompts of lengths between the two of `PROMPTS`."""
    random = np.random.default_rng(config.training.seed)
    lengths = random.integers(PROMPTS[0], PROMPTS[1] + 1, rows)
    return [random.integers(1, config.model.vocab_size, n).astype(np.int32) for n in lengths]


def own(run: Any, prompts: list[np.ndarray], new_tokens: int) -> Callable[[], int]:
    """A function that generates by the run's engine and gives the number of new tokens."""
    from equilibrium_mcore.generation.engine import OwnEngine
    from equilibrium_mcore.generation.interface import Prompt, Request, Sampling

    engine = OwnEngine.of(run, rows_at_once=len(prompts))
    requests = [Request(Prompt.of(ids)) for ids in prompts]
    sampling = Sampling(seed=1, max_new_tokens=new_tokens, stop_ids=())

    def generate() -> int:
        return sum(len(rollout.ids) for rollout in engine.generate(requests, sampling))

    return generate


def theirs(config: RunConfig, prompts: list[np.ndarray], new_tokens: int) -> Callable[[], int]:
    """The same by transformers' `generate`, padded on the left."""
    import torch

    from equilibrium_mcore.hugging_face.config_json import config_values
    from equilibrium_mcore.hugging_face.model_code.configuration_equilibrium import (
        EquilibriumConfig,
    )
    from equilibrium_mcore.hugging_face.model_code.modeling_equilibrium import (
        EquilibriumForCausalLM,
    )

    values = config_values(config.model, sequence_length=config.training.sequence_length)
    model = EquilibriumForCausalLM(EquilibriumConfig(**values)).eval()
    longest = max(map(len, prompts))
    ids = torch.zeros(len(prompts), longest, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids[row, longest - len(prompt) :] = torch.from_numpy(prompt)
    mask = (ids > 0).long()
    settings = {"do_sample": True, "top_k": 0, "pad_token_id": 0, "eos_token_id": None}

    def generate() -> int:
        with torch.inference_mode():
            answers = model.generate(
                ids, attention_mask=mask, max_new_tokens=new_tokens, **settings
            )
        return (answers.shape[1] - longest) * len(prompts)

    return generate


def race(ways: dict[str, Callable[[], int]], rounds: int) -> dict[str, float]:
    """New tokens a CPU second: the median over rounds in which each way takes a turn."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, generate in ways.items():
            start = time.process_time()
            tokens = generate()
            rates[name].append(tokens / (time.process_time() - start))
    return {name: statistics.median(found) for name, found in rates.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, how much is generated, and how often."""
    add = parser.add_argument
    add("--run", default="configs/runs/quickstart.yaml", help="whose model generates")
    add("--rows", type=int, default=32, help="answers at once; default 32")
    add("--new-tokens", type=int, default=256, help="of each answer; default 256")
    add("--rounds", type=int, default=3, help="turns of each way; default 3")
    add("--threads", type=int, help="of PyTorch, for both ways; default: what it takes by itself")


def run(options: argparse.Namespace) -> None:
    """Race, print."""
    with tempfile.TemporaryDirectory() as folder:
        config = load_run(
            options.run,
            [
                "parallelism={world_size: 1}",
                "training.validation_interval_steps=0",
                "checkpoint.initial_weights=null",
                f"output_directory={Path(folder) / 'run'}",
            ],
        )
        accelerator.quiet_libraries()
        accelerator.install()  # before megatron-core is imported
        import torch

        from equilibrium_mcore.certify.tokens import made_up_datasets
        from equilibrium_mcore.training.setup import run_alone

        if options.threads is not None:
            torch.set_num_threads(options.threads)
        threads = torch.get_num_threads()
        prompts = made_up(config, options.rows)
        with run_alone(config, datasets=made_up_datasets(config)) as alone:
            ways = {
                OWN: own(alone, prompts, options.new_tokens),
                THEIRS: theirs(config, prompts, options.new_tokens),
            }
            race(ways, 1)  # warms up
            rates = race(ways, options.rounds)
    print(
        f"{config.model.name}, {options.rows} rows, {options.new_tokens} new tokens, "
        f"{options.rounds} rounds, threads: {threads}; load {os.getloadavg()[0]:.0f} on "
        f"{os.cpu_count()} cores"
    )
    rows = [(name, f"{r:,.0f}", f"{r / rates[THEIRS]:.2f} x") for name, r in rates.items()]
    print(terminal_table(("", "tokens per CPU second", "speed"), rows, align="lrr"))


if __name__ == "__main__":
    raise SystemExit(run_command(__doc__, add_arguments, run))
