"""The same tokens in every layout, and the log-probabilities of the training forward."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.generation.support import (
    GROUPED,
    HYBRID,
    TOLERANCE,
    answer,
    config_of,
    save_rough,
)

LAYOUTS: dict[str, dict[str, Any]] = {
    "dp2": {"world_size": 2},
    "cp2": {"world_size": 2, "context": 2},
    "pp2": {"world_size": 2, "pipeline": 2},
    "pp2_vpp2": {"world_size": 2, "pipeline": 2, "virtual_pipeline": 2},
    "ep2": {"world_size": 2, "expert": 2},
    "tp2_sp_cp2_pp2_ep2": {
        "world_size": 8,
        "tensor": 2,
        "sequence": True,
        "context": 2,
        "pipeline": 2,
        "expert": 2,
    },
}
MIXED = {"world_size": 2, "tensor": 2, "sequence": True, "expert": 2}
GROUPED_LAYOUTS = {name: LAYOUTS[name] for name in ("cp2", "pp2")}


class Reference:
    """Weights, and what one rank answers with them."""

    def __init__(self, ranks, folder: Path, model: dict) -> None:
        self.ranks, self.folder, self.model = ranks, folder, model
        ranks.run(1, save_rough, config_of(folder / "start", model, {"world_size": 1}))
        self.one = self.answers({"world_size": 1})

    def answers(self, layout: dict) -> dict[str, Any]:
        """Of every rank the same."""
        config = config_of(self.folder / "unused", self.model, layout, self.folder / "start")
        first, *others = self.ranks.run(layout["world_size"], answer, config)
        assert all(other["found"] == first["found"] for other in others), "ranks disagree"
        return first


@pytest.fixture(scope="module")
def hybrid(ranks, tmp_path_factory) -> Reference:
    return Reference(ranks, tmp_path_factory.mktemp("hybrid"), HYBRID)


@pytest.fixture(scope="module")
def grouped(ranks, tmp_path_factory) -> Reference:
    return Reference(ranks, tmp_path_factory.mktemp("grouped"), GROUPED)


def assert_the_same(found: dict[str, Any], reference: dict[str, Any]) -> None:
    assert max(found["differences"].values()) < TOLERANCE
    assert all(found["modes"])
    for name, rollouts in reference["found"].items():
        ends = {finish for _, _, finish in rollouts}
        assert ends == {"end", "length"} or name == "greedy"
        for (ids, logprobs, finish), (here, logprobs_here, finish_here) in zip(
            rollouts, found["found"][name], strict=True
        ):
            assert (here, finish_here) == (ids, finish)
            np.testing.assert_allclose(logprobs_here, logprobs, atol=TOLERANCE)


def test_one_rank_agrees_with_its_training_forward(hybrid, grouped):
    for reference in (hybrid.one, grouped.one):
        assert_the_same(reference, reference)


def test_trap_generation_differs_from_training_in_a_mixed_layout(hybrid):
    assert_the_same(hybrid.answers(MIXED), hybrid.one)


def test_grouped_attention_in_a_mixed_layout(grouped):
    assert_the_same(grouped.answers(MIXED), grouped.one)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_the_same_tokens_in_every_layout(hybrid, name):
    assert_the_same(hybrid.answers(LAYOUTS[name]), hybrid.one)


@pytest.mark.slow
@pytest.mark.parametrize("name", GROUPED_LAYOUTS)
def test_grouped_attention_in_every_layout(grouped, name):
    assert_the_same(grouped.answers(GROUPED_LAYOUTS[name]), grouped.one)
