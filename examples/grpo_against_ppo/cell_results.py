"""What a cell's folder says: accuracy along the run, its cost, and whether it was stable."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from grid import METHODS, Cell, places

from equilibrium_mcore.checkpoint.directory import latest_checkpoint
from equilibrium_mcore.config.yaml_io import read_mapping
from equilibrium_mcore.training.metrics import METRICS_FILE, read_metrics

CELL_FILE, DIVERGENCE_FILE = "cell.yaml", "divergence.json"
LAST = 2  # evaluations whose mean is the end of a curve


@dataclass(frozen=True)
class CellResult:
    """What one cell did. Lists are of its evaluations, the first before any update."""

    method: str
    kl: float
    rate: float
    seed: int
    answers: list[int]  # drawn by then
    accuracy: list[float]  # of greedy answers to the held-out prompts
    cpu_seconds: list[float]  # of training by then, without evaluations and saves
    update_tokens: int  # that policy and critic were trained on, passes counted
    peak_gib: float  # of the process
    state_mib: float | None  # of its checkpoint: weights and optimizer state, the critic's too
    dead_groups: float | None  # share, over the run; None where an answer has no group
    explained_variance: float | None  # of the critic, over the last quarter
    divergence: float | None  # nats per token from the start, at the end; see divergence.py

    @property
    def cell(self) -> Cell:
        return Cell(self.method, self.kl, self.rate, self.seed)

    @property
    def end(self) -> float:
        """Accuracy at the end: the mean of the last evaluations."""
        return float(np.mean(self.accuracy[-LAST:]))

    @property
    def collapsed(self) -> bool:
        """Whether it ended below its start, or below half of the best that it had been."""
        return self.end < self.accuracy[0] or self.end < max(self.accuracy) / 2

    def at_answers(self, answers: float) -> float:
        """Accuracy after so many, between evaluations by a straight line."""
        return float(np.interp(answers, self.answers, self.accuracy))

    def at_seconds(self, seconds: float) -> float:
        """Accuracy after so much CPU time."""
        return float(np.interp(seconds, self.cpu_seconds, self.accuracy))


def is_finished(folder: Path) -> bool:
    """Whether the cell in the folder ran to its last step."""
    path = folder / METRICS_FILE
    records = read_metrics(path) if path.is_file() else []
    return bool(records) and records[-1].get("event") == "end"  # after its last save


def read_cell(cell: Cell, folder: Path) -> CellResult | None:
    """The result of a finished cell, else None."""
    if not is_finished(folder):
        return None
    config, method = read_mapping(folder / CELL_FILE), METHODS[cell.method]
    records = read_metrics(folder / METRICS_FILE)
    steps = [r for r in records if r["kind"] == "train"]
    evaluations = [r for r in records if r["kind"] == "evaluation"]
    per_step = config["training"]["global_batch_size"] / config["rollout"]["passes"]
    at = [r["step"] for r in evaluations]
    return CellResult(
        *cell,
        answers=[round(step * per_step) for step in at],
        accuracy=[r["accuracy"] for r in evaluations],
        cpu_seconds=_until(at, steps),
        update_tokens=steps[-1]["tokens"] * (2 if method.critic else 1),
        peak_gib=max(r["memory_gib"] for r in steps),
        state_mib=_mib(latest_checkpoint(folder)),
        dead_groups=_mean(steps, "dead_groups") if method.samples > 1 else None,
        explained_variance=_mean(steps[-len(steps) // 4 :], "explained_variance"),
        divergence=_divergence(folder),
    )


def read_cells(output: Path) -> tuple[list[CellResult], int]:
    """The finished cells, and how many have a folder and are not finished."""
    found = [read_cell(cell, folder) for cell, folder in places(output)]
    finished = [result for result in found if result is not None]
    return finished, len(found) - len(finished)


def best_rates(results: Sequence[CellResult]) -> dict[str, float]:
    """Of each method: the rate of the sweep that ended highest.

    The sweep is what has every rate: the first seed with the first KL.
    """
    first = {
        r.method: min((x.seed, x.kl) for x in results if x.method == r.method) for r in results
    }
    best: dict[str, CellResult] = {}
    for result in results:
        if (result.seed, result.kl) != first[result.method]:
            continue
        if result.method not in best or result.end > best[result.method].end:
            best[result.method] = result
    return {method: result.rate for method, result in best.items()}


def _until(at: Sequence[int], steps: Sequence[dict[str, Any]]) -> list[float]:
    """CPU seconds of the steps up to each of `at`; a record is the mean over those before it."""
    ends = np.array([0, *(r["step"] for r in steps)])
    spent = np.diff(ends) * np.array([r["cpu_seconds_per_step"] for r in steps])
    return [float(value) for value in np.interp(at, ends, np.concatenate([[0.0], spent.cumsum()]))]


def _mean(records: Sequence[dict[str, Any]], name: str) -> float | None:
    values = [r[name] for r in records if r.get(name) is not None]
    return float(np.mean(values)) if values else None


def _mib(checkpoint: Path | None) -> float | None:
    if checkpoint is None:
        return None
    return sum(p.stat().st_size for p in checkpoint.rglob("*") if p.is_file()) / 2**20


def _divergence(folder: Path) -> float | None:
    path = folder / DIVERGENCE_FILE
    return (
        json.loads(path.read_text(encoding="utf-8"))["nats_per_token"] if path.is_file() else None
    )
