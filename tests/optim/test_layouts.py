"""Updates, curves and resumed state do not depend on the layout, for every optimizer.

The update itself is compared in float64 on given gradients: those of a checkpoint's own tensors,
which megatron-core's checkpointing lays out over ranks, independent of the code under test.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from equilibrium_mcore.checkpoint import directory
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.hugging_face.reader import CheckpointReader
from equilibrium_mcore.parallel.launch import RankInfo
from tests.parallel.test_layouts import LAYOUTS
from tests.support.runs import tiny_run, train_steps

# Minutes of many ranks; tests/parallel holds the layouts of the default optimizers.
pytestmark = pytest.mark.slow

MATRIX = {"learning_rate": 2e-3}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "muon": {"muon": {**MATRIX, "extra_scale": 0.2}},
    "soap": {"soap": {**MATRIX, "basis_interval_steps": 2}},
    "cosmos": {"cosmos": {**MATRIX, "rank": 8}},
}
SOME = ("tp2_sp", "ep2", "tp2_cp2_pp2_ep2")
CASES = [("muon", layout) for layout in LAYOUTS] + [
    (name, layout) for name in ("soap", "cosmos") for layout in SOME
]


def optimizer_section(name: str, **changes: Any) -> dict[str, Any]:
    """The section `optimizer` of a run with this optimizer of matrices."""
    return {
        "matrices": name,
        **OPTIMIZERS[name],
        "adamw": {"learning_rate": 2e-3},
        "schedule": {"kind": "constant", "warmup_steps": 1},
        **changes,
    }


# ------------------------------------------------------------------------------- single updates


def _update_given_gradients(
    rank_info: RankInfo, config: RunConfig, gradients: Path, dtype: torch.dtype
) -> None:
    """Three updates from the initial weights, with gradients made of two checkpoints; saved."""
    from equilibrium_mcore.checkpoint.sharded import load_weights
    from equilibrium_mcore.optim.optimizer import HybridOptimizer
    from equilibrium_mcore.training.callbacks import LogCallback
    from equilibrium_mcore.training.saving import CheckpointCallback
    from equilibrium_mcore.training.setup import setup, teardown

    run = setup(config, rank_info)
    run.optimizer = HybridOptimizer(run.chunks, run.groups, config, main_dtype=dtype)
    start = [p.model.detach().clone() for p in run.optimizer.parameters]
    load_weights(gradients, config=config, chunks=run.chunks, optimizer=None, groups=run.groups)
    other = [p.model.detach().clone() for p in run.optimizer.parameters]
    initial = config.checkpoint.initial_weights
    load_weights(
        initial, config=config, chunks=run.chunks, optimizer=run.optimizer, groups=run.groups
    )
    for first, second in ((0.0, 1.0), (-0.7, 1.0), (0.3, -0.5)):
        for parameter, a, b in zip(run.optimizer.parameters, start, other, strict=True):
            parameter.gradient.copy_(first * a + second * b)
        run.optimizer.step()
    CheckpointCallback(config, LogCallback(config)).on_end(run, reason="stop")
    teardown(run)


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a run's latest checkpoint, from the optimizer where it keeps them wider."""
    reader = CheckpointReader(directory.latest_checkpoint(folder), main_weights=True)
    return {name: reader.read(name) for name in reader.names()}


class Updates:
    """Updates on one rank, to compare with."""

    def __init__(self, ranks, data: dict, folder: Path) -> None:
        self.ranks, self.data, self.folder = ranks, data, folder
        for name, seed in (("start", 1), ("gradients", 2)):
            config = tiny_run(data, folder / name, training={"seed": seed})
            ranks.run(1, train_steps, config, 1, True)
        self.start = read_weights(folder / "start")
        self._known: dict[tuple, dict[str, torch.Tensor]] = {}

    def of(self, name: str, layout: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
        """The update of every parameter, whole."""
        if (name, layout, dtype) not in self._known:
            world_size, parallelism = {**LAYOUTS, "one": (1, {})}[layout]
            output = self.folder / f"{name}_{layout}_{dtype}"
            config = tiny_run(
                self.data,
                output,
                parallelism={"world_size": world_size, **parallelism},
                optimizer=optimizer_section(name),
                checkpoint={"initial_weights": str(self.folder / "start")},
            )
            gradients = self.folder / "gradients"
            self.ranks.run(world_size, _update_given_gradients, config, gradients, dtype)
            after = read_weights(output)
            self._known[name, layout, dtype] = {
                key: value - self.start[key].to(dtype) for key, value in after.items()
            }
        return self._known[name, layout, dtype]


@pytest.fixture(scope="module")
def updates(ranks, data, tmp_path_factory) -> Updates:
    return Updates(ranks, data, tmp_path_factory.mktemp("updates"))


def worst_difference(found: dict, reference: dict) -> tuple[float, str]:
    """The largest norm of a parameter's difference over the norm of its update, and whose."""
    assert found.keys() == reference.keys()
    return max(
        (((found[name] - update).norm() / update.norm()).item(), name)
        for name, update in reference.items()
        if update.norm() > 0
    )


@pytest.mark.parametrize(("name", "layout"), CASES)
def test_an_update_is_the_same_in_every_layout(updates, name, layout):
    reference = updates.of(name, "one", torch.float64)
    assert sum(update.norm() > 0 for update in reference.values()) > 60
    apart, where = worst_difference(updates.of(name, layout, torch.float64), reference)
    assert apart < 1e-9, where


# -------------------------------------------------------------------------------------- curves

CURVES = {
    "soap": optimizer_section("soap"),
    "cosmos": optimizer_section("cosmos"),
    "schedule_free": optimizer_section("muon", schedule_free={}),
}


def _curve(ranks, data, output: Path, start: Path, name: str, layout: str) -> list[float]:
    world_size, parallelism = {**LAYOUTS, "one": (1, {})}[layout]
    config = tiny_run(
        data,
        output,
        parallelism={"world_size": world_size, **parallelism},
        optimizer=CURVES[name],
        checkpoint={"initial_weights": str(start), "resume": "never"},
    )
    return ranks.run(world_size, train_steps, config, 5)[0]["loss"]


@pytest.mark.parametrize("name", CURVES)
def test_a_curve_is_the_same_in_every_layout(updates, ranks, data, tmp_path, name):
    start = updates.folder / "start"
    one = _curve(ranks, data, tmp_path, start, name, "one")
    assert one[-1] < one[0]
    for layout in ("tp2_sp", "ep2"):
        curve = _curve(ranks, data, tmp_path, start, name, layout)
        assert curve == pytest.approx(one, rel=1e-4), layout


# -------------------------------------------------------------------------------------- resume


def _state_values(rank_info: RankInfo, config: RunConfig, steps: int, save: bool) -> dict[str, Any]:
    """Resume if there is something, train, save; losses, and sums over the optimizer's state."""
    from equilibrium_mcore.training.callbacks import LogCallback
    from equilibrium_mcore.training.saving import CheckpointCallback
    from equilibrium_mcore.training.setup import setup, teardown
    from equilibrium_mcore.training.step import train_step, validation_loss

    run = setup(config, rank_info)
    validation = validation_loss(run) if steps == 0 else None
    losses = [train_step(run).loss for _ in range(steps)]
    if save:
        validation = validation_loss(run)
        CheckpointCallback(config, LogCallback(config)).on_end(run, reason="stop")
    optimizer = run.optimizer
    optimizer.init_state()
    whole = {
        f"{parameter.name}/{key}": value.clone()
        for parameter in optimizer.parameters
        if parameter.is_owned
        for key, value in optimizer.whole_state_of(parameter).items()
    }
    teardown(run)
    return {"loss": losses, "validation": validation, "whole": whole}


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("way", [("tp2_sp", "one"), ("one", "tp2_sp")], ids=lambda way: way[0])
def test_state_saved_in_one_layout_goes_on_in_another(ranks, data, tmp_path, name, way):
    layouts = {**LAYOUTS, "one": (1, {})}

    def run(folder: str, layout: str, steps: int, save: bool, **more: Any) -> dict[str, Any]:
        world_size, parallelism = layouts[layout]
        config = tiny_run(
            data,
            tmp_path / folder,
            parallelism={"world_size": world_size, **parallelism},
            optimizer=CURVES[name],
            training={"validation_interval_steps": 5, "validation_batches": 1},
            **more,
        )
        return ranks.run(world_size, _state_values, config, steps, save)[0]

    first, second = way
    straight = run("straight", first, 6, False)
    half = run("half", first, 3, True)
    loaded = run("half", second, 0, False)
    rest = run("half", second, 3, False)
    same = run("half", first, 3, False)
    assert same["loss"] == straight["loss"][3:]  # to the bit, though validation was in between
    assert rest["loss"] == pytest.approx(straight["loss"][3:], rel=1e-4)
    assert loaded["validation"] == pytest.approx(half["validation"], rel=1e-5)
    # What was validated is what was saved as the model: with averages, not where it trains.
    weights = {"initial_weights": str(tmp_path / "half")}
    fresh = run("fresh", second, 0, False, checkpoint=weights)
    assert fresh["validation"] == pytest.approx(half["validation"], rel=1e-5)
    for key in half["whole"].keys() & loaded["whole"].keys():
        assert torch.equal(half["whole"][key], loaded["whole"][key]), key
    assert bool(half["whole"]) == (name in ("soap", "cosmos"))


def test_bf16_averages_are_resumed(ranks, data, tmp_path):
    """In bfloat16 the model has rounded averages; the optimizer's own are what goes on."""

    def run(folder: str, steps: int, save: bool = False) -> list[float]:
        config = tiny_run(
            data,
            tmp_path / folder,
            optimizer=CURVES["schedule_free"],
            training={"precision": "bf16"},
        )
        return ranks.run(1, train_steps, config, steps, save)[0]["loss"]

    straight = run("straight", 4)
    assert run("half", 2, True) == straight[:2]
    assert run("half", 2) == straight[2:]
