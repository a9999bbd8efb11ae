"""The kinds of accidents, how many of each make a whole campaign, and one case of one of them."""

from __future__ import annotations

import importlib
import random
import subprocess
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.faults import damaged, kills, scenarios, signals, storage
from tests.faults.bench import Bench, BrokenPromiseError, SkippedError

Result = dict[str, Any]  # a line of the file of results
Told = str | tuple[str, int]  # what happened, and how many accidents that were, if not one
Scenario = Callable[[Bench, random.Random, str], Told]


@dataclass(frozen=True)
class Kind:
    """Accidents of one kind: what a whole campaign has of them, and the scenarios, drawn evenly."""

    target: int
    scenarios: tuple[Scenario, ...]
    needs_bench: bool = True  # else a scenario gets a folder in place of the bench


def _of_module(module: str, function: str) -> Scenario:
    """A case that needs no run: `function(rng, folder)` of a module here."""

    def case(folder: Path, rng: random.Random, name: str) -> str:
        place = folder / name
        place.mkdir(parents=True)
        return getattr(importlib.import_module(f"tests.faults.{module}"), function)(rng, place)

    case.__name__ = function
    return case


KINDS: dict[str, Kind] = {
    "kills": Kind(
        200,
        (
            kills.chain_of_kills,
            kills.chain_of_kills,
            kills.chain_of_kills,
            kills.chain_of_tool_kills,
            scenarios.parent_killed,
            scenarios.rank_killed,
            scenarios.killed_saving_beside_training,
            scenarios.spike_killed_and_resumed,
        ),
    ),
    "signals": Kind(
        20,
        (signals.chain_of_signals, scenarios.stopped_by_signal, scenarios.stopped_while_starting),
    ),
    "storage": Kind(60, storage.SCENARIOS),
    "damaged": Kind(
        60,
        (
            *(damaged.a_file_damaged,) * 8,
            scenarios.newest_damaged,
            scenarios.newest_damaged_and_wanted,
        ),
    ),
    "configs": Kind(500, (_of_module("configs", "config_case"),), needs_bench=False),
    "misuses": Kind(300, (_of_module("misuse", "misuse_case"),), needs_bench=False),
}


def run_case(bench: Callable[[], Bench], folder: Path, seed: int, kind: str, number: int) -> Result:
    """One case: everything in it is drawn from seed, kind and number."""
    rng = random.Random(f"{seed} {kind} {number}")
    began, outcome, count = time.monotonic(), "held", 1
    scenario = rng.choice(KINDS[kind].scenarios)
    place = bench() if KINDS[kind].needs_bench else folder
    try:
        told = scenario(place, rng, f"{kind}_{number}")
        what, count = told if isinstance(told, tuple) else (told, 1)
    except SkippedError as skipped:
        outcome, what = "skipped", str(skipped)
    except BrokenPromiseError as broken:
        outcome, what = "broken", str(broken)
    except Exception:  # of the campaign itself, or of what it calls in this process
        outcome, what = "broken", traceback.format_exc()
    return {
        "kind": kind,
        "number": number,
        "seed": seed,
        "outcome": outcome,
        "scenario": scenario.__name__,
        "count": count,
        "what": what,
        "seconds": round(time.monotonic() - began, 1),
        "commit": commit(),
    }


def commit() -> str:
    """The commit of the code that is tested, marked where the files differ from it."""
    words = ("git", "describe", "--always", "--dirty", "--exclude=*")
    done = subprocess.run(words, cwd=Path(__file__).parent, capture_output=True, text=True)
    return done.stdout.strip()
