"""LoRA in training: one rank's numbers in every layout, nothing else moves, resumed to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.parallel.rank_job import RankInfo
from tests.support.runs import MODEL, tiny_run, train_steps

TOLERANCE = 1e-4  # as tests/parallel/test_layouts.py
STEPS = 4
GQA = {
    **MODEL,
    "layer_pattern": "M-|*E",
    "mla": None,
    "attention": {"num_heads": 4, "num_query_groups": 2, "head_dim": 16, "qkv_bias": True},
    "moe": {**MODEL["moe"], "score_function": "sigmoid", "expert_bias": True},
}
DENSE = {**MODEL, "layer_pattern": "M-+-", "moe": None}
MIXED = {"tensor": 2, "sequence": True, "expert": 2}
LAYOUTS: dict[str, tuple[dict[str, Any], int, dict[str, Any]]] = {
    "hybrid, tp2+sp+ep2": (MODEL, 2, MIXED),
    "hybrid, pp2, vpp2": (MODEL, 2, {"pipeline": 2, "virtual_pipeline": 2}),
    "hybrid, cp2": (MODEL, 2, {"context": 2}),
    "hybrid, eight": (MODEL, 8, {**MIXED, "context": 2, "pipeline": 2}),
    "gqa, tp2+sp+ep2": (GQA, 2, MIXED),
    "gqa, dp2": (GQA, 2, {}),
    "dense, tp2 without sp": (DENSE, 2, {"tensor": 2}),
    "dense, tp2+sp": (DENSE, 2, {"tensor": 2, "sequence": True}),
}
IN_CI = ("hybrid, tp2+sp+ep2", "dense, tp2 without sp")
ALL = [name if name in IN_CI else pytest.param(name, marks=pytest.mark.slow) for name in LAYOUTS]


class Base:
    """Weights after two steps for each model, and what adapters make of them on one rank."""

    def __init__(self, ranks, data: dict, folder: Path) -> None:
        self.ranks, self.data, self.folder = ranks, data, folder
        self._curves: dict[str, dict] = {}

    def weights(self, model: dict) -> Path:
        path = self.folder / model["layer_pattern"].replace("|", "_")
        if not path.exists():
            self.ranks.run(1, train_steps, tiny_run(self.data, path, model=model), 2, True)
        return path

    def config(self, model: dict, output: Path, parallelism: dict, **changes: Any) -> RunConfig:
        return tiny_run(
            self.data,
            output,
            model=model,
            parallelism=parallelism,
            adapters={"rank": 4, "experts": bool(model["moe"])},
            checkpoint={
                "initial_weights": str(self.weights(model)),
                **changes.pop("checkpoint", {}),
            },
            **changes,
        )

    def train(self, model: dict, world_size: int, parallelism: dict) -> dict[str, Any]:
        layout = {"world_size": world_size, **parallelism}
        config = self.config(model, self.folder / "unused", layout, checkpoint={"resume": "never"})
        outcomes = self.ranks.run(world_size, train_steps, config, STEPS)
        squares: dict[str, float] = {}
        for outcome in outcomes:
            for name, square in outcome.pop("gradient_squares").items():
                squares[name] = squares.get(name, 0.0) + square
        assert all(outcome == outcomes[0] for outcome in outcomes), "ranks disagree"
        return {**outcomes[0], "gradients": {name: s**0.5 for name, s in squares.items()}}

    def curve(self, model: dict) -> dict[str, Any]:
        key = model["layer_pattern"]
        if key not in self._curves:
            self._curves[key] = self.train(model, 1, {})
        return self._curves[key]


@pytest.fixture(scope="module")
def base(ranks, data, tmp_path_factory) -> Base:
    return Base(ranks, data, tmp_path_factory.mktemp("lora"))


@pytest.mark.parametrize("name", ALL)
def test_trap_every_layout_has_the_numbers_of_one_rank(base, name):
    model, world_size, parallelism = LAYOUTS[name]
    found, expected = base.train(model, world_size, parallelism), base.curve(model)
    assert found["loss"] == pytest.approx(expected["loss"], rel=TOLERANCE)
    assert found["norm"] == pytest.approx(expected["norm"], rel=TOLERANCE)
    assert found["gradients"] == pytest.approx(expected["gradients"], rel=TOLERANCE, abs=1e-12)


def _train_and_look(rank_info: RankInfo, config: RunConfig) -> dict[str, Any]:
    """Three steps; what moved, and what takes memory."""
    from equilibrium_mcore.adapters.lora import adapters_of
    from equilibrium_mcore.training.setup import setup, teardown
    from equilibrium_mcore.training.step import train_step

    run = setup(config, rank_info)
    module = run.chunks[0].module
    state = {
        name: tensor.clone() for name, tensor in module.state_dict().items() if tensor is not None
    }
    for _ in range(3):
        train_step(run)
    after = module.state_dict()
    moved = {name for name, tensor in state.items() if not torch.equal(tensor, after[name])}
    found = {
        "adapters": len(adapters_of(module)),
        "moved": moved,
        "trainable": sum(p.numel() for p in module.parameters() if p.requires_grad),
        "buffers": sum(
            buffer.numel
            for buffer in [*run.chunks[0].buffers, *run.chunks[0].expert_parallel_buffers]
        ),
        "owned": {p.name for p in run.optimizer.parameters},
    }
    teardown(run)
    return found


def test_trap_a_frozen_base_moves_nothing_and_takes_no_room(base, tmp_path):
    """The model has a router's bias that training would move, and experts whose adapters train."""
    config = base.config(GQA, tmp_path / "run", {"world_size": 1})
    (found,) = base.ranks.run(1, _train_and_look, config)
    assert found["moved"] and all(".adapter." in name for name in found["moved"])
    assert len(found["moved"]) == 2 * found["adapters"] == len(found["owned"])
    assert found["trainable"] <= found["buffers"] < 1.2 * found["trainable"] + 10_000


def _scores_of_the_reference(rank_info: RankInfo, config: RunConfig) -> list[torch.Tensor]:
    """log p after two steps: of the adapted model, without its adapters, and of a frozen copy."""
    from equilibrium_mcore.training.frozen import load_frozen
    from equilibrium_mcore.training.reference import Reference
    from equilibrium_mcore.training.scoring import log_probabilities
    from equilibrium_mcore.training.setup import setup, teardown
    from equilibrium_mcore.training.step import train_step

    run = setup(config, rank_info)
    for _ in range(2):
        train_step(run)
    batches = run.stream.next_batches(1)
    weights = config.checkpoint.initial_weights
    copy = load_frozen(weights, config=config, groups=run.groups)
    found = [
        log_probabilities(run, batches),
        Reference(run).log_probabilities(run, batches),
        log_probabilities(run, batches, chunks=copy),
    ]
    teardown(run)
    return [values[0] for values in found]


def test_trap_a_reference_without_adapters_is_the_base_and_no_second_model(base, tmp_path):
    """To the bit, after steps that moved the policy away from it."""
    config = base.config(DENSE, tmp_path / "run", {"world_size": 1})
    ((policy, reference, copy),) = base.ranks.run(1, _scores_of_the_reference, config)
    assert torch.equal(reference, copy)
    assert (policy - reference).abs().max() > 1e-4


def test_a_resumed_run_is_the_straight_one_to_the_bit(base, tmp_path):
    layout = {"world_size": 2, **MIXED}
    straight = base.config(MODEL, tmp_path / "straight", layout)
    (whole, _) = base.ranks.run(2, train_steps, straight, 4)
    config = base.config(MODEL, tmp_path / "run", layout)
    base.ranks.run(2, train_steps, config, 2, True)
    (rest, _) = base.ranks.run(2, train_steps, config, 2)
    assert rest["start"] == 2 and rest["loss"] == whole["loss"][2:]
    assert rest["norm"] == whole["norm"][2:]


def _evaluate(rank_info: RankInfo, config: RunConfig) -> float:
    from equilibrium_mcore.training.setup import setup, teardown
    from equilibrium_mcore.training.step import validation_loss

    run = setup(config, rank_info)
    loss = validation_loss(run)
    teardown(run)
    return loss


def test_weights_with_adapters_start_a_run_as_their_sum(base, tmp_path):
    """Saved on one rank with adapters; loaded without, and beneath new ones, in another layout."""
    validates = {"validation_interval_steps": 99, "validation_batches": 1}
    tuned = base.config(MODEL, tmp_path / "tuned", {"world_size": 1}, training=validates)
    base.ranks.run(1, train_steps, tuned, 4, True)
    (with_adapters,) = base.ranks.run(1, _evaluate, tuned)
    weights = {"initial_weights": str(tmp_path / "tuned"), "resume": "never"}
    layout = {"world_size": 2, **MIXED}
    plain = tiny_run(
        base.data,
        tmp_path / "next",
        model=MODEL,
        parallelism=layout,
        checkpoint=weights,
        training=validates,
    )
    again = base.config(MODEL, tmp_path / "again", layout, checkpoint=weights, training=validates)
    none = base.config(MODEL, tmp_path / "none", {}, training=validates)
    (start,) = base.ranks.run(1, _evaluate, none)
    for config in (plain, again):
        losses = base.ranks.run(2, _evaluate, config)
        assert losses == pytest.approx([with_adapters] * 2, rel=1e-5)
        assert losses[0] != pytest.approx(start, rel=1e-5)


def test_other_adapters_cannot_resume(base, tmp_path):
    config = base.config(DENSE, tmp_path / "run", {"world_size": 1})
    base.ranks.run(1, train_steps, config, 1, True)
    other = config.model_copy(update={"adapters": config.adapters.model_copy(update={"rank": 8})})
    from tests.support.pool import RankError

    with pytest.raises(RankError, match="adapters=.*'rank': 8.* differs from the checkpoint's"):
        base.ranks.run(1, train_steps, other, 1)
