"""Report on a mixture: shares, lengths, tokens, duplicates, what was dropped; time and cost.

Of a prepared folder all of it; of a mixture that is not prepared, what its file says.

Examples:
    {prog} data/mine
    {prog} data/mine --output reports/mine
    {prog} equilibrium/pretrain --model equilibrium_3b \\
        --gpus 64 --peak-tflops 989 --mfu 0.4 --price 2.5
With --output: report.md, report.json, datasets.csv, and PNGs of shares, drops and lengths.
"""

from __future__ import annotations

import argparse

from equilibrium_mcore.files.paths import user_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What is reported on, where to, and the cluster whose cost is estimated."""
    add = parser.add_argument
    add("subject", metavar="FOLDER|MIXTURE", help="what was prepared, or a mixture")
    add("overrides", nargs="*", metavar="key=value", help="settings of a mixture")
    add("--output", type=user_path, metavar="DIR", help="write the report's files here too")
    add("--model", help="estimate training of this model: a file, or a name in configs/models")
    add("--gpus", type=int, default=8, help="devices (default 8)")
    add("--peak-tflops", type=float, help="dense peak of one, e.g. 989 for an H100 SXM in bf16")
    add("--mfu", type=float, default=0.4, help="assumed share of the peak (default 0.4)")
    add("--price", type=float, help="of one GPU hour, in any currency")


def run(options: argparse.Namespace) -> None:
    """Print the report."""
    from equilibrium_mcore.corpus.mixtures.cost_report import mixture_report

    given = vars(options)
    print(mixture_report(given.pop("subject"), given.pop("overrides"), **given), end="")
