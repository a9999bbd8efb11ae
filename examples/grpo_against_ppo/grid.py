"""The cells of the comparison, a method at a rate, a KL and a seed, and the settings of each.

All methods draw as many answers. GRPO and its like pass over them twice, PPO once with its policy
and once with its critic, so that as many tokens are trained on.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from equilibrium_mcore.config.load import run_from_mapping
from equilibrium_mcore.config.references import merge
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.config.yaml_io import read_mapping

HERE = Path(__file__).resolve().parent
MINIBATCHES = 2  # of a rollout: at the second, old and new policy differ also in a single pass
WARMUP_ROLLOUTS = 5  # in which PPO's policy waits for its critic


@dataclass(frozen=True)
class Method:
    """What differs between methods."""

    stage: str
    objective: dict[str, Any]
    kl: dict[str, str]
    """Where a coefficient above 0 acts, and by which estimator."""
    samples: int
    """Answers to a prompt: a group, or 1 where no group is the baseline."""
    passes: int = 2
    critic: bool = False

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps of the policy."""
        return self.passes * MINIBATCHES


CRITIC = {"learning_rate": 1e-3, "warmup_steps": WARMUP_ROLLOUTS * MINIBATCHES}
METHODS = {
    "grpo": Method("grpo", {"preset": "grpo"}, {"estimator": "k3", "place": "loss"}, 8),
    "ppo": Method(
        "ppo",
        {"preset": "ppo", "critic": CRITIC},
        {"estimator": "k1", "place": "reward"},
        1,
        passes=1,
        critic=True,
    ),
    # Divided by the longest answer, so that a rate is about as large as with the others.
    "dr_grpo": Method(
        "grpo",
        {"preset": "dr_grpo", "constant_length": 4},
        {"estimator": "ratio_k3", "place": "loss"},
        8,
    ),
    "spo": Method("spo", {"preset": "spo"}, {"estimator": "ratio_k3", "place": "loss"}, 1),
}


class Cell(NamedTuple):
    """One run of the comparison."""

    method: str
    kl: float
    rate: float
    seed: int

    @property
    def place(self) -> Path:
        """Of its folder, in that of all cells."""
        return Path(self.method, f"kl_{self.kl:g}", f"rate_{self.rate:g}", f"seed_{self.seed}")

    def __str__(self) -> str:
        return f"{self.method} kl {self.kl:g} rate {self.rate:g} seed {self.seed}"


@dataclass(frozen=True)
class Grid:
    """Which cells there are."""

    methods: Sequence[str] = tuple(METHODS)
    kls: Sequence[float] = (0.0, 0.01)
    rates: Sequence[float] = (3e-5, 1e-4, 3e-4, 1e-3, 3e-3)
    seeds: Sequence[int] = (1, 2, 3)

    def cells(self) -> list[Cell]:
        """All of them, those of one seed before those of the next."""
        everything = itertools.product(self.seeds, self.rates, self.kls, self.methods)
        return [Cell(method, kl, rate, seed) for seed, rate, kl, method in everything]

    def sweep(self) -> list[Cell]:
        """Every rate, with the first seed and the first KL."""
        return Grid(self.methods, self.kls[:1], self.rates, self.seeds[:1]).cells()

    def rest(self, best: dict[str, float]) -> list[Cell]:
        """Every other KL and seed, at the best rate of each method."""
        return [cell for cell in self.cells() if cell.rate == best[cell.method]]


class Sizes(NamedTuple):
    """How long a cell is."""

    rollouts: int = 40
    answers: int = 128  # of a rollout
    evaluations: int = 10  # along a cell, beside the one before it


def settings(cell: Cell, sizes: Sizes, output: Path) -> RunConfig:
    """The whole run of a cell. Raises ConfigError for sizes that do not fit together."""
    method = METHODS[cell.method]
    per_rollout = method.steps_per_rollout
    every = max(1, sizes.rollouts // sizes.evaluations) * per_rollout
    kl = {
        "coefficient": cell.kl,
        **(method.kl if cell.kl else {"estimator": "k1", "place": "reward"}),
    }
    changes = {
        "stage": method.stage,
        "name": str(cell).replace(" ", "_"),
        "output_directory": str(output / "cells" / cell.place),
        "data": data_paths(output),
        "rollout": {
            "samples_per_prompt": method.samples,
            "minibatches": MINIBATCHES,
            "passes": method.passes,
        },
        "objective": {"type": "policy", "truncated": "score", **method.objective, "kl": kl},
        "evaluation": {"interval_steps": every},
        "checkpoint": {
            "initial_weights": str(output / "start"),
            "save_interval_steps": every,
            "keep_last": 1,
        },
        "training": {
            "seed": cell.seed,
            "steps": sizes.rollouts * per_rollout,
            "global_batch_size": sizes.answers // MINIBATCHES,
        },
        "optimizer": {"adamw": {"learning_rate": cell.rate}},
    }
    return run_from_mapping(merge(read_mapping(HERE / "cell.yaml"), changes), folder=HERE)


def start_settings(output: Path, steps: int | None) -> RunConfig:
    """The run that all cells start from."""
    data = output / "data"
    sources = [
        {
            "name": "sums",
            "train": [str(data / "sft.train.jsonl")],
            "validation": [str(data / "sft.validation.jsonl")],
        }
    ]
    changes: dict[str, Any] = {
        "output_directory": str(output / "start"),
        "data": {**data_paths(output), "sources": sources},
    }
    if steps is not None:
        changes["training"] = {"steps": steps}
        changes["optimizer"] = {"schedule": {"warmup_steps": min(10, steps // 2)}}
    return run_from_mapping(merge(read_mapping(HERE / "start.yaml"), changes), folder=HERE)


def data_paths(output: Path) -> dict[str, Any]:
    """Where the prompts and the tokenizer of an output folder are."""
    data = output / "data"
    sources = {part: [str(data / f"prompts.{part}.jsonl")] for part in ("train", "validation")}
    return {
        "tokenizer": {"model": str(output / "tokenizer.model")},
        "sources": [{"name": "sums", **sources}],
    }


def places(output: Path) -> Iterator[tuple[Cell, Path]]:
    """Cells that have a folder, by what their folders are called."""
    root = output / "cells"
    for path in sorted(root.glob("*/kl_*/rate_*/seed_*")):
        method, kl, rate, seed = path.relative_to(root).parts
        numbers = (text.partition("_")[2] for text in (kl, rate, seed))
        kl, rate, seed = numbers
        yield Cell(method, float(kl), float(rate), int(seed)), path
