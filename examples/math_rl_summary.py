"""Held-out accuracy of a run on its own answers, evaluation by evaluation, and some answers.

python examples/math_rl_summary.py runs/math_rl/grpo
"""

from __future__ import annotations

import argparse

from equilibrium_mcore.files.json_lines import read_log
from equilibrium_mcore.files.paths import user_path
from equilibrium_mcore.training.metrics import METRICS_FILE, read_metrics

SHOWN = 4


def main() -> None:
    """Read and print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=user_path, help="the run's output directory")
    folder = parser.parse_args().run
    for record in read_metrics(folder / METRICS_FILE):
        if record["kind"] == "evaluation":
            others = (
                f"{k} {v:.2f}" for k, v in record.items() if k.startswith(("pass", "sampled"))
            )
            print(f"  step {record['step']:>4}: accuracy {record['accuracy']:.2f}", *others)
    for sample in list(read_log(folder / "samples.jsonl"))[-SHOWN:]:
        print(f"  {sample['prompt']}{sample['answer']}  ({sample['verdict']})")


if __name__ == "__main__":
    main()
