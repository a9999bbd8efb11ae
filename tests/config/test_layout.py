"""Figures that follow from a layout, against figures worked out by hand."""

from __future__ import annotations

import pytest

from equilibrium_mcore.config import layout
from equilibrium_mcore.config.pattern import balanced_cuts, cut_into, layers_of


def test_sizes_of_groups(build) -> None:
    config = build(
        {
            "parallelism": {"tensor": 2, "sequence": True, "pipeline": 2, "expert": 4},
            "training.global_batch_size": 24,
        },
        world_size=16,
    )
    assert layout.model_parallel_size(config.parallelism) == 4
    assert layout.data_parallel_size(config, 16) == 4
    assert layout.expert_data_parallel_size(config, 16) == 2
    assert layout.micro_batches_per_step(config, 16) == 6
    assert layout.global_batch_tokens(config) == 24 * 64


def test_world_size_is_launched_or_set_or_the_fewest_that_fit(build) -> None:
    config = build({"parallelism": {"context": 2, "expert": 8}})
    assert layout.resolve_world_size(config.parallelism) == 8
    assert layout.resolve_world_size(config.parallelism, 16) == 16
    config = build({"parallelism.world_size": 4})
    assert layout.resolve_world_size(config.parallelism) == 4


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        ({"WORLD_SIZE": "8"}, 8),
        ({"SLURM_NTASKS": "8"}, None),  # a batch script is one process, whatever it asked for
        ({"SLURM_NTASKS": "8", "SLURM_STEP_NUM_TASKS": "8"}, 8),
    ],
)
def test_launched_world_size(environment: dict, expected: int | None) -> None:
    assert layout.launched_world_size(environment) == expected


def test_divisors_ascend() -> None:
    assert layout.divisors(36) == [1, 2, 3, 4, 6, 9, 12, 18, 36]


def test_cut_into_drops_cuts_that_are_not_needed() -> None:
    assert cut_into("ME|ME|ME|+E", 1) == "MEMEME+E"
    assert cut_into("ME|ME|ME|+E", 2) == "MEME|ME+E"
    with pytest.raises(ValueError, match="4 segments"):
        cut_into("ME|ME|ME|+E", 3)


@pytest.mark.parametrize("pattern", ["MEMEMEME+E", "MMMMMMM", "*-*-*-*-*-*-", "+-+E+E+E+E", "EEE"])
def test_balanced_cuts_makes_the_stages_asked_for(pattern: str) -> None:
    for stages in range(1, len(pattern) + 1):
        segments = balanced_cuts(pattern, stages).split("|")
        assert len(segments) == stages
        assert all(segments)
        assert layers_of("".join(segments)) == pattern
    assert balanced_cuts("MEMEME+E", 2) == "MEME|ME+E"
