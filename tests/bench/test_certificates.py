"""The campaign of random certificates: what it draws, and what it says of a case's end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import defaultdict
from pathlib import Path

import pytest

from equilibrium_mcore.config.pattern import CUT, LAYER_KINDS
from tools.bench.random_runs import cases, table
from tools.bench.random_runs.draw import draw, drawn_settings
from tools.bench.random_runs.layouts import MAX_RANKS
from tools.bench.random_runs.settings import DRAWN, EXEMPT, SPECIAL, is_exempt, leaves

ROOT = Path(__file__).parents[2]
COUNT = 100


@pytest.fixture(scope="module")
def drawn():
    """A whole campaign's cases; no rank is started for them."""
    return [draw(0, number) for number in range(COUNT)]


# --------------------------------------------------------------------------------- what is drawn


def test_every_setting_is_drawn_or_exempt_with_a_reason():
    settings = set(leaves())
    forgotten = {key for key in settings if not (key in DRAWN or key in SPECIAL or is_exempt(key))}
    assert not forgotten, f"draw them, or say in EXEMPT why not: {sorted(forgotten)}"
    assert settings >= {*DRAWN, *SPECIAL}, "settings that are no longer there"
    for key, reason in EXEMPT.items():
        assert any(leaf == key or leaf.startswith(f"{key}.") for leaf in settings), key
        assert reason
    twice = [key for key in (*DRAWN, *SPECIAL) if is_exempt(key)]
    assert not twice and not set(DRAWN) & set(SPECIAL)


def test_every_value_is_certified_somewhere(drawn):
    """In a hundred cases, whatever the rules refused."""
    seen = defaultdict(set)
    for case in drawn:
        for key, value in drawn_settings(case).items():
            seen[key].add(json.dumps(value))
    for key, values in DRAWN.items():
        if key == "training.seed":
            continue
        missing = {json.dumps(value) for value in values} - seen[key]
        # What is tied to rare layers may miss one of several in a hundred.
        assert len(missing) <= (key in RARE), f"{key}: never {missing}"
    for key in SPECIAL:
        assert len(seen[key]) > 1, f"{key}: always {seen[key]}"
    letters = {letter for case in drawn for letter in case.config.model.layer_pattern}
    assert letters == {*LAYER_KINDS, CUT}


RARE = ("training.recompute_modules",)


def test_most_proposals_are_allowed_and_the_refused_are_counted(drawn):
    refused = [text for case in drawn for text in case.refused]
    assert 0 < len(refused) < 0.3 * (COUNT + len(refused))


def test_layouts_have_several_ranks_and_at_most_four(drawn):
    worlds = {case.layout.world_size for case in drawn}
    assert worlds == {2, 4} and max(worlds) <= MAX_RANKS
    assert {case.threads for case in drawn} == {1, 2, 4}
    assert len({case.layout.name for case in drawn}) > 20


def test_a_case_is_the_same_whenever_it_is_drawn(drawn):
    assert draw(0, 17) == drawn[17]
    assert draw(1, 17) != drawn[17]


# ----------------------------------------------------------------------------- what came of a case


def result(number: int, outcome: str, **values) -> cases.Result:
    given = {
        "seconds": 1.0,
        "layout": "tp=2",
        "optimizer": "muon",
        "threads": 2,
        "refused": [],
        "drawn": {"training.seed": number},
    }
    return cases.Result(number, outcome, **given | values)


def test_finished_cases_are_kept_and_another_seed_is_refused(tmp_path):
    path = tmp_path / "results.json"
    kept = cases.Results(0, path)
    kept.add(result(3, "passed", differences={"gradients": (1e-7, 5e-5)}))
    again = cases.Results(0, path)
    assert again.by_number.keys() == {3} and again.by_number[3].outcome == "passed"
    with pytest.raises(ValueError, match="--seed 0"):
        cases.Results(1, path)
    path.write_text("{}")
    with pytest.raises(ValueError, match="name another"):
        cases.Results(0, path)


def test_the_table_names_every_case_that_did_not_pass():
    found = [
        result(0, "passed", differences={"gradients": (1e-7, 5e-5), "weights loaded": (0, 0)}),
        result(1, "hang", detail="... layout tp=2|x", refused=["model.moe.top_k=9 is more"]),
        result(2, "false alarm", optimizer="soap", differences={"gradients": (float("nan"), 5e-5)}),
    ]
    text = table.as_markdown(found, seed=7)
    assert "| hang | 1 |" in text and "| passed | 1 |" in text and "| crash | 0 |" in text
    for number in (1, 2):
        assert f"`python {cases.TOOL} --seed 7 --case {number}`" in text
    assert "--case 0`" not in text
    assert "| gradients | 1.0e-07 | inf | 5e-05 |" in text and "weights loaded" not in text
    assert "Of 4 proposals 1 were refused" in text and "| model.moe.top_k | 1 |" in text


def test_a_case_in_time_ends_by_its_status_and_a_longer_one_with_its_group(tmp_path):
    pids = tmp_path / "pids"
    # A child that outlives its parent unless the group is ended, as a rank would.
    script = (
        "import subprocess, sys, pathlib, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        f"pathlib.Path({str(pids)!r}).write_text(str(child.pid))\n"
        "time.sleep(600)\n"
    )
    stop = threading.Event()
    quick = subprocess.Popen([sys.executable, "-c", "exit(3)"], start_new_session=True)
    assert cases._wait(quick, time.monotonic() + 60, stop) == 3
    slow = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
    deadline = time.monotonic() + 60
    while not (pids.exists() and pids.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert cases._wait(slow, time.monotonic(), stop) is None
    child = Path(f"/proc/{pids.read_text()}/stat")
    while child.exists() and child.read_text().split()[2] != "Z" and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not child.exists() or child.read_text().split()[2] == "Z"


def test_the_tool_shows_a_case_as_a_run(tmp_path):
    from equilibrium_mcore.config.load import load_run

    command = [sys.executable, str(ROOT / cases.TOOL), "--seed", "0", "--case", "5", "--show"]
    job = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert job.returncode == 0, job.stderr
    (tmp_path / "run.yaml").write_text(job.stdout)
    assert load_run(tmp_path / "run.yaml") == draw(0, 5).config


def test_an_override_that_decides_nothing_is_refused_and_no_crash():
    wrong = next(n for n in range(10 * COUNT) if _decides_nothing(draw(0, n)))
    command = [sys.executable, "-W", "ignore", str(ROOT / cases.TOOL), "--case", str(wrong)]
    job = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert cases.OUTCOMES[job.returncode] == "refused when built", job.stderr
    assert "decides no parameter" in job.stderr


def _decides_nothing(case) -> bool:
    """An override of channel mixers in a run that has none."""
    patterns = [override.pattern for override in case.config.optimizer.overrides]
    return any("linear_fc" in p for p in patterns) and not (
        set(case.config.model.layer_pattern) & set("-E")
    )


@pytest.mark.slow
def test_a_case_is_certified_by_a_process_of_its_own(tmp_path):
    results = cases.Results(0, tmp_path / "results.json")
    seen = []
    cases.run_cases(results, [3], jobs=1, limit_seconds=300, progress=seen.append)
    assert [r.number for r in seen] == [3] and results.by_number[3].outcome == "passed", seen
    assert "gradients" in results.by_number[3].differences
    assert os.path.getsize(tmp_path / "results.json")
