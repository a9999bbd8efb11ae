"""Measure this device's roofs, then train a model on made-up tokens, and compare.

Prints a Markdown table for docs/reference/performance.md: matrix and copy roofs, and tokens/s,
model TFLOP/s, share of the roof and peak memory of real training steps.

`expert_rank` trains the model with the experts of one of 8 expert-parallel ranks, plain and with
fused kernels; `blocks` its last third; `details` profiles that third, and times single kernels.

Example:
    python tools/bench/gpu.py --part bf16 --steps 8 --json bf16.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

# Long and short tensors alternate over a step; segments that can grow keep memory from splintering.
os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from equilibrium_mcore.cli.command import run_command, wrong_command_line
from equilibrium_mcore.files.paths import report_path
from equilibrium_mcore.files.whole import write_whole
from equilibrium_mcore.parallel import accelerator

PARTS = ("roofs", "bf16", "fp8", "expert_rank", "blocks", "all", "details")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is measured, and how long."""
    parser.add_argument("--part", choices=PARTS, default="all", help="what to measure")
    parser.add_argument("--model", metavar="MODEL", help="default equilibrium_3b")
    parser.add_argument("--sequence-length", type=int, help="tokens per sequence; default 4096")
    parser.add_argument("--steps", type=int, help="measured steps, after the warmup; default 8")
    parser.add_argument("--rehearse", action="store_true", help="a tiny model, on any host")
    parser.add_argument("--json", type=report_path, metavar="OUT", help="write figures here too")


def run(options: argparse.Namespace) -> int:
    """Measure, print; 1 where a part could not be measured."""
    accelerator.quiet_libraries()
    accelerator.install()  # before megatron-core is imported
    if not options.rehearse and not accelerator.has_cuda():
        raise wrong_command_line(
            "this host has no CUDA device: --rehearse runs every part at a tiny size"
        )
    from tools.bench.measure.gpu import REHEARSAL, BenchmarkSettings, run_benchmark
    from tools.bench.measure.gpu_cases import PARTS as CASES
    from tools.bench.measure.gpu_details import details_table, measure_details
    from tools.bench.measure.gpu_report import markdown

    chosen = {
        name: value
        for name in ("model", "sequence_length", "steps")
        if (value := getattr(options, name)) is not None
    }
    plan = replace(REHEARSAL if options.rehearse else BenchmarkSettings(), **chosen)
    if options.part == "details":
        details = measure_details(plan, done=partial(_write, options.json))
        print(details_table(details))
        return 1 if any("not run" in row for row in details.values()) else 0
    report = run_benchmark(
        plan, cases=CASES[options.part], done=lambda r: _write(options.json, r.as_dict())
    )
    print(markdown(report))
    return 1 if report.not_run and not options.rehearse else 0


def _write(path: Path | None, values: dict[str, Any]) -> None:
    """Keep what is known so far: a limit of time may end the rest."""
    if path:
        write_whole(path, json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    raise SystemExit(run_command(__doc__, add_arguments, run))
