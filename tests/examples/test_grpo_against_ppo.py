"""The comparison of GRPO with PPO: cells are equal where they must be, and the table adds up."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from equilibrium_mcore.config.load import load_run
from equilibrium_mcore.training.metrics import METRICS_FILE, read_metrics

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "grpo_against_ppo"
CELLS = Path(__file__).parent / "grpo_against_ppo_cells"  # of a run of a few steps, without weights
SHORT = ["--rollouts", "3", "--answers", "32", "--kl", "0", "--rates", "1e-3", "--seeds", "1"]


@pytest.fixture(scope="module")
def example():
    """The example's modules, which import each other by their names."""
    names = ("grid", "cell_results", "table", "run", "jobs", "sums")
    path = list(sys.path)
    sys.path.insert(0, str(FOLDER))
    try:
        modules = {name: __import__(name) for name in names}
        yield type("Example", (), modules)
    finally:
        sys.path[:] = path
        for name in names:
            sys.modules.pop(name, None)


def test_methods_draw_as_many_answers_and_train_on_as_many_tokens(example, tmp_path):
    grid, sizes = example.grid, example.grid.Sizes(rollouts=6, answers=64, evaluations=3)
    drawn, trained, evaluated = set(), set(), set()
    for name, method in grid.METHODS.items():
        config = grid.settings(grid.Cell(name, 0.0, 1e-3, 1), sizes, tmp_path)
        rollout, training = config.rollout, config.training
        of_rollout = training.global_batch_size * rollout.minibatches
        per_rollout = rollout.minibatches * rollout.passes
        drawn.add((of_rollout, training.steps / per_rollout))
        models = 2 if config.objective.critic is not None else 1
        assert method.critic == (models == 2)
        trained.add(training.steps * training.global_batch_size * models)
        evaluated.add(config.evaluation.interval_steps / per_rollout)
    assert drawn == {(64, 6)}
    assert len(trained) == 1
    assert evaluated == {2}


def test_a_cell_is_written_whole_and_refused_with_other_settings(example, tmp_path):
    grid = example.grid
    for name in grid.METHODS:
        cell = grid.Cell(name, 0.01, 2e-3, 2)
        config = grid.settings(cell, grid.Sizes(), tmp_path)
        folder = Path(config.output_directory)
        example.run.write_once(config, folder / "cell.yaml")
        example.run.write_once(config, folder / "cell.yaml")
        assert load_run(folder / "cell.yaml") == config
        assert config.objective.kl.coefficient == 0.01
        assert config.optimizer.adamw.learning_rate == 2e-3 and config.training.seed == 2
        with pytest.raises(ValueError, match=r"cell\.yaml: was begun with other settings of .*tr"):
            longer = grid.settings(cell, grid.Sizes(rollouts=200), tmp_path)
            example.run.write_once(longer, folder / "cell.yaml")
    assert {cell.method for cell, _ in grid.places(tmp_path)} == set(grid.METHODS)
    assert {cell[1:] for cell, _ in grid.places(tmp_path)} == {(0.01, 2e-3, 2)}


def test_sweep_and_rest_are_each_cell_once(example):
    grid = example.grid.Grid(rates=(1.0, 2.0), seeds=(1, 2, 3))
    best = dict.fromkeys(example.grid.METHODS, 2.0)
    sweep, rest = grid.sweep(), grid.rest(best)
    assert len(set(sweep)) == len(sweep) == 2 * len(best)
    assert len(set(rest)) == len(rest) == len(best) * 2 * 3  # KLs and seeds
    assert set(sweep) | set(rest) <= set(grid.cells())
    assert {(cell.kl, cell.seed) for cell in sweep} == {(0.0, 1)}


def test_held_out_sums_are_in_no_order_in_training(example):
    training, held_out = example.sums.three_terms(seed=3, held_out=0.2)
    assert not {tuple(sorted(t)) for t in training} & {tuple(sorted(t)) for t in held_out}
    assert len(training) + len(held_out) == 10**3


def test_table_of_cells_of_a_real_run(example, tmp_path):
    shutil.copytree(CELLS, tmp_path / "cells")
    results, unfinished = example.cell_results.read_cells(tmp_path)
    folders = {cell.method: path for cell, path in example.grid.places(tmp_path)}
    assert {result.method for result in results} == set(folders) and unfinished == 0
    for result in results:
        records = read_metrics(folders[result.method] / METRICS_FILE)
        steps = [r for r in records if r["kind"] == "train"]
        assert result.accuracy == [r["accuracy"] for r in records if r["kind"] == "evaluation"]
        assert result.answers == [0, 32, 64, 96]
        assert result.cpu_seconds[-1] == pytest.approx(
            sum(r["cpu_seconds_per_step"] for r in steps)
        )
        assert np.all(np.diff(result.cpu_seconds) > 0)
    by_method = {result.method: result for result in results}
    grpo, ppo = by_method["grpo"], by_method["ppo"]
    assert grpo.dead_groups is not None and ppo.dead_groups is None
    assert ppo.explained_variance is not None and grpo.explained_variance is None
    table = example.table.write_report(results, tmp_path)
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "results.json").read_text())
    assert [one["accuracy"] for one in written] == [r.accuracy for r in results]
    row = next(line for line in table.splitlines() if line.startswith("| ppo | 0 |"))
    assert f"| {ppo.cpu_seconds[-1]:.0f} |" in row


def test_table_counts_collapses_and_takes_the_best_rate(example, tmp_path):
    shutil.copytree(CELLS, tmp_path / "cells")
    results, _ = example.cell_results.read_cells(tmp_path)
    one = next(result for result in results if result.method == "grpo")
    rising = [0.2, 0.4, 0.6, 0.8]
    change = lambda **values: type(one)(**{**vars(one), "accuracy": rising, **values})  # noqa: E731
    cells = [
        change(rate=1e-3),
        change(rate=4e-3, accuracy=[0.2, 0.7, 0.2, 0.2]),
        change(rate=1e-3, seed=2, accuracy=[0.2, 0.9, 0.4, 0.4]),
        change(rate=4e-3, seed=2, accuracy=[0.2, 0.9, 1.0, 1.0]),  # of no sweep
    ]
    assert [cell.collapsed for cell in cells] == [False, True, True, False]
    assert example.cell_results.best_rates(cells) == {"grpo": 1e-3}
    table = example.table.markdown(cells, unfinished=3)
    row = next(line for line in table.splitlines() if line.startswith("| grpo | 0 |"))
    assert "| 0.001 | 2 |" in row and "| 1 of 2 |" in row
    assert "55 ± 15" in row  # at the end
    assert "4 cells (3 more are not finished)" in table


def _run(*arguments: str, output: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / "run.py"), "--output", str(output), *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.slow
def test_cells_end_to_end_and_again(example, tmp_path):
    output, other = tmp_path / "whole", tmp_path / "in two parts"
    arguments = ["--small", "--methods", "grpo", "ppo", "--start-steps", "6", *SHORT]
    done = _run(*arguments, output=output)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-2000:]
    assert "| grpo | 0 |" in done.stdout and "| ppo | 0 |" in done.stdout
    folders = {cell.method: path for cell, path in example.grid.places(output)}
    whole = {name: (path / METRICS_FILE).read_bytes() for name, path in folders.items()}
    again = _run(*arguments, output=output)  # finished cells are kept
    assert again.returncode == 0 and "2 cells, 2 of them finished already" in again.stdout
    assert whole == {name: (path / METRICS_FILE).read_bytes() for name, path in folders.items()}

    # A cell that was stopped goes on, and comes to the same.
    shutil.copytree(output, other, ignore=shutil.ignore_patterns("cells"))
    cell = example.grid.Cell("ppo", 0.0, 1e-3, 1)
    config = example.grid.settings(cell, example.grid.Sizes(3, 32), other)
    folder = Path(config.output_directory)
    example.run.write_once(config, folder / "cell.yaml")
    command = [sys.executable, "-m", "equilibrium_mcore.train", str(folder / "cell.yaml")]
    stopped = subprocess.run([*command, "training.stop_after_steps=3"], cwd=ROOT, env=os.environ)
    assert stopped.returncode == 0 and not example.cell_results.is_finished(folder)
    done = _run("--small", "--methods", "ppo", *SHORT, output=other)
    assert done.returncode == 0, done.stderr[-3000:] + done.stdout[-2000:]
    events = [r["event"] for r in read_metrics(folder / METRICS_FILE) if r["kind"] == "event"]
    assert "resume" in events and example.cell_results.is_finished(folder)
    assert _curve(folder) == _curve(folders["ppo"])


def _curve(folder: Path) -> list[tuple]:
    """What does not depend on the time that it took; where a run stops, it evaluates once more."""
    names = ("kind", "step", "loss", "accuracy", "reward", "explained_variance", "gradient_norm")
    records = [r for r in read_metrics(folder / METRICS_FILE) if r["kind"] != "event"]
    records = [r for r in records if r["kind"] == "train" or r["step"] % 2 == 0]
    return [tuple(record.get(name) for name in names) for record in records]
