"""Every accident once: the campaign itself is `python -m tests.faults`."""

from __future__ import annotations

import random

import pytest

from tests.faults.bench import Bench
from tests.faults.scenarios import SCENARIOS


@pytest.fixture(scope="module")
def bench(tmp_path_factory) -> Bench:
    return Bench(tmp_path_factory.mktemp("faults") / "runs")


@pytest.mark.parametrize("name", ["parent_killed", "newest_damaged"])
def test_a_run_survives(bench, name):
    SCENARIOS[name](bench, random.Random(1), name)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", SCENARIOS)
def test_a_run_survives_more(bench, name, seed):
    SCENARIOS[name](bench, random.Random(f"{name} {seed}"), f"{name}_{seed}")
