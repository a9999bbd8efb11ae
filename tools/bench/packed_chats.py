"""Print how fast conversations are trained on: packed, one in a sequence, and one at a time.

Made-up conversations of the lengths that --median and --spread say go through the same model on
this host, in one process, in three ways that take turns:

    packed                        what stage sft does: sequences filled with whole examples
    one example in a sequence     the same code with window 1: the rest is padding
    transformers, one at a time   the exported class on each example by itself, without padding

All train on every token; tokens/s are tokens of examples, not positions.

Examples:
    python tools/bench/packed_chats.py
    python tools/bench/packed_chats.py --sequence-length 512 --median 80
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from equilibrium_mcore.cli.command import run_command
from equilibrium_mcore.config.load import load_run
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.files.tables import terminal_table
from equilibrium_mcore.parallel import accelerator

SEQUENCES = 8  # of a step
WAYS = ("packed", "one example in a sequence", "transformers, one at a time")


def made_up(config: RunConfig, *, median: float, spread: float) -> Any:
    """Examples with log-normal lengths, all of whose tokens are the model's to produce."""
    from equilibrium_mcore.data.chat.examples import Example, Examples

    draw = np.random.default_rng(config.training.seed)
    lengths = np.exp(draw.normal(np.log(median), spread, size=4096)).astype(int)
    lengths = lengths.clip(4, config.training.sequence_length)
    return Examples.of(
        [
            Example(
                draw.integers(0, config.model.vocab_size, n).astype(np.int32),
                np.ones(n, bool),
                "made_up",
                number,
            )
            for number, n in enumerate(lengths)
        ]
    )


@contextlib.contextmanager
def stage_steps(config: RunConfig, examples: Any) -> Iterator[list[Callable[[], int]]]:
    """Functions that train a step of the stage and give its tokens: packed, and with window 1."""
    from equilibrium_mcore.data.blend import Datasets
    from equilibrium_mcore.data.chat.dataset import ConversationDataset
    from equilibrium_mcore.training.setup import Run, run_alone
    from equilibrium_mcore.training.step import train_step

    def dataset(window: int) -> ConversationDataset:
        return ConversationDataset(
            examples,
            sequence_length=config.training.sequence_length,
            samples=10**9,
            seed=config.training.seed,
            vocab_size=config.model.vocab_size,
            pad_id=0,
            window=window,
        )

    def step(run: Run, stream: Any) -> int:
        run.stream = stream
        return train_step(run).tokens

    packed, alone = dataset(config.data.window), dataset(1)
    with run_alone(config, datasets=Datasets(packed, None, None)) as run:
        streams = [run.stream_of(samples, consumed_samples=0) for samples in (packed, alone)]
        yield [partial(step, run, stream) for stream in streams]


def plain_steps(config: RunConfig, examples: Any) -> Callable[[], int]:
    """The same with transformers' class and AdamW: as many examples a step as are packed."""
    import torch

    from equilibrium_mcore.hugging_face.config_json import config_values
    from equilibrium_mcore.hugging_face.model_code.configuration_equilibrium import (
        EquilibriumConfig,
    )
    from equilibrium_mcore.hugging_face.model_code.modeling_equilibrium import (
        EquilibriumForCausalLM,
    )

    values = config_values(config.model, sequence_length=config.training.sequence_length)
    model = EquilibriumForCausalLM(EquilibriumConfig(**values))
    update = torch.optim.AdamW(model.parameters(), lr=1e-4)
    mean = float(examples.lengths.mean())
    count = max(1, int(SEQUENCES * config.training.sequence_length / mean))
    stream = _each(examples)

    def step() -> int:
        update.zero_grad()
        tokens = 0
        for _ in range(count):
            ids = torch.from_numpy(next(stream)).long()[None]
            logits = model(ids, use_cache=False).logits[0, :-1]
            torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="sum").backward()
            tokens += ids.numel() - 1
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        update.step()
        return tokens

    return step


def _each(examples: Any) -> Iterator[np.ndarray]:
    ends = np.cumsum(examples.lengths)
    while True:
        for end, length in zip(ends, examples.lengths, strict=True):
            yield np.array(examples.ids[end - length : end])


def race(ways: dict[str, Callable[[], int]], rounds: int) -> dict[str, float]:
    """Tokens a second: the median over rounds in which each way takes a step. One warms up."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, step in ways.items():
            start = time.perf_counter()
            tokens = step()
            if number:
                rates[name].append(tokens / (time.perf_counter() - start))
    return {name: statistics.median(found) for name, found in rates.items()}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, the lengths of the examples, and how often they race."""
    add = parser.add_argument
    add("--run", default="configs/runs/chat.yaml", help="whose model is trained")
    add("--sequence-length", type=int, default=1024)
    add("--median", type=float, default=200.0, help="tokens of the median example; default 200")
    add("--spread", type=float, default=0.7, help="standard deviation of log length; default 0.7")
    add("--rounds", type=int, default=5, help="steps of each way; default 5")


def run(options: argparse.Namespace) -> None:
    """Race, print."""
    with tempfile.TemporaryDirectory() as folder:
        config = load_run(
            options.run,
            [
                "parallelism={world_size: 1}",
                f"training.sequence_length={options.sequence_length}",
                "training.micro_batch_size=1",
                f"training.global_batch_size={SEQUENCES}",
                "training.epochs=null",
                "training.steps=1000",
                "training.validation_interval_steps=0",
                "checkpoint.initial_weights=null",
                f"output_directory={Path(folder) / 'run'}",
            ],
        )
        accelerator.quiet_libraries()
        accelerator.install()  # before megatron-core is imported
        examples = made_up(config, median=options.median, spread=options.spread)
        with stage_steps(config, examples) as steps:
            ways = dict(zip(WAYS, [*steps, plain_steps(config, examples)], strict=True))
            rates = race(ways, options.rounds)
    print(
        f"{config.model.name}, sequences of {options.sequence_length:,}, examples of "
        f"{float(examples.lengths.mean()):.0f} tokens on average, {options.rounds} rounds"
    )
    rows = [(name, f"{r:,.0f}", f"{r / rates[WAYS[1]]:.2f} x") for name, r in rates.items()]
    print(terminal_table(("", "tokens/s", "speed"), rows, align="lr"))


if __name__ == "__main__":
    raise SystemExit(run_command(__doc__, add_arguments, run))
