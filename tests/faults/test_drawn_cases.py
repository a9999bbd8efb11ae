"""Drawn configs and misused commands: a few here, more with `-m slow`."""

from __future__ import annotations

import random

import pytest

from tests.faults.configs import config_case
from tests.faults.misuse import misuse_case

CASES = {"config": config_case, "misuse": misuse_case}


@pytest.mark.parametrize("kind", CASES)
def test_a_few_cases_hold(kind, tmp_path):
    for number in range(3):
        CASES[kind](random.Random(f"{kind} {number}"), tmp_path / str(number))


@pytest.mark.slow
@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("seed", range(5))
def test_more_cases_hold(kind, seed, tmp_path):
    for number in range(40):
        CASES[kind](random.Random(f"{kind} {seed} {number}"), tmp_path / str(number))
