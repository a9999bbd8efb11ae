"""This project's preprocessing beside Megatron-LM's two tools: time, memory, equal bytes.

Example:
    git clone --depth 1 https://github.com/NVIDIA/Megatron-LM /tmp/Megatron-LM
    pip install gigatoken      # what its preprocess_data_fast.py needs
    python tools/bench/preprocess.py --folder /tmp/bench --megatron /tmp/Megatron-LM
collects 200 MB of text of this machine, trains a tokenizer on it, and lets the tools take turns,
each as a whole new process. Megatron-LM's preprocess_data.py takes minutes: it runs once unless
--slow-repetitions says otherwise. Without --megatron only this project's tool runs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from equilibrium_mcore.cli.command import TOLD, run_command
from equilibrium_mcore.files.paths import user_path
from tools.bench.measure.preprocess import run_benchmark

TOOL = Path(__file__).resolve().parents[1] / "preprocess_data.py"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The text, the tools, and how often each runs."""
    add = parser.add_argument
    add("--folder", type=user_path, required=True, help="for text, tokenizer and outputs")
    add("--megatron", type=user_path, help="a checkout of Megatron-LM")
    add("--input", type=user_path, dest="input_path", help="JSONL; default: text of this machine")
    add("--megabytes", type=float, default=200.0, help="of text that is collected (10^6 bytes)")
    add("--workers", type=int, default=2, help="of the tools that have workers")
    add("--repetitions", type=int, default=3, help="runs of each tool")
    add("--slow-repetitions", type=int, default=1, help="runs of Megatron-LM's plain tool")


def run(options: argparse.Namespace) -> None:
    """Run the benchmark, print its table."""
    print(run_benchmark(tool=TOOL, **vars(options)))


if __name__ == "__main__":
    told = (*TOLD, RuntimeError)  # a tool that fails, or whose bytes differ
    raise SystemExit(run_command(__doc__, add_arguments, run, told=told))
