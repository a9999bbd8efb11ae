"""Print how many texts rewards judge in a second: numbers, expressions, code in a sandbox.

Each kind is judged by one worker, after a few texts that warm it up. Made-up texts of a line.

Example:
    python tools/bench/rewards.py --texts 2000
Expressions are a tenth and code a hundredth of the texts. The load of the machine is printed, since
seconds are those of the clock.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from equilibrium_mcore.cli.command import run_command
from equilibrium_mcore.config.rewards import parse_rewards
from equilibrium_mcore.files.tables import terminal_table
from equilibrium_mcore.verification.scored import Example
from equilibrium_mcore.verification.scorer import Scorer

CODE = "```python\ndef add(a, b):\n    return a + b\n```"
TESTS = ["assert add(1, 2) == 3", "assert add(2, 2) == 4"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """How many."""
    parser.add_argument("--texts", type=int, default=2000, help="numbers judged; default 2000")


def work(options: argparse.Namespace) -> None:
    """Judge each kind, print the table."""
    count = max(100, options.texts)
    numbers = [Example(rf"so \boxed{{{n % 9}/{n % 7 + 1}}}", "0.5") for n in range(count)]
    expressions = [
        Example(rf"so \boxed{{\sqrt{{{n}}}+x}}", r"x+\sqrt{12}") for n in range(count // 10)
    ]
    code = [Example(CODE, TESTS)] * max(1, count // 100)
    kinds = (
        ("math_answer", "numbers", numbers),
        ("math_answer", "expressions", expressions),
        ("code_tests", "code, two tests", code),
    )
    rows = [(name, len(texts), *_rates(kind, texts)) for kind, name, texts in kinds]
    head = ("texts", "count", "start, s", "texts/s", "verdicts")
    print(terminal_table(head, rows, align="lrrrl"))
    print(f"load {os.getloadavg()[0]:.0f} on {os.cpu_count()} cores")


def _rates(kind: str, texts: Sequence[Example]) -> tuple[str, str, str]:
    """Seconds until the worker was warm, texts per second, the verdicts that were given."""
    begun = time.perf_counter()
    with Scorer(parse_rewards({"rewards": [{"type": kind}], "reward_workers": 1})) as scorer:
        scorer.score(texts[:3])
        warm = time.perf_counter()
        scored = scorer.score(texts)
        done = time.perf_counter()
    verdicts = ", ".join(sorted({one.verdict for one in scored}))
    return f"{warm - begun:.2f}", f"{len(texts) / (done - warm):.0f}", verdicts


if __name__ == "__main__":
    raise SystemExit(run_command(__doc__, add_arguments, work))
