"""Every setting that changes numbers is certified in a layout, without a false alarm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.certify.settings import CASES

ROOT = Path(__file__).parents[2]
MINUTES = 90  # for all cases, on a machine that does other things too


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> dict[str, dict]:
    """The certificates of all cases, made in one process that forks ranks."""
    output = tmp_path_factory.mktemp("settings") / "said.json"
    subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.certify.settings", str(output)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        check=True,
        timeout=60 * MINUTES,
    )
    return json.loads(output.read_text())


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_the_same_numbers(said, name):
    certificate = said[name]
    assert "error" not in certificate, certificate["error"]
    (verdicts,) = certificate["layouts"].values()
    failed = [v for v in verdicts if not v["passed"] and not v["only_warns"]]
    assert not failed
    assert certificate["passed"] and not certificate["ties"]
