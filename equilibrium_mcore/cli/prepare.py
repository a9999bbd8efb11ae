"""Prepare a mixture for training: read, filter, deduplicate, sample, split, tokenize.

Writes indexed datasets, a blend that a run names as `data:`, and a manifest. Killed, it resumes
where it was when it is called again. Posttrain phases become JSONL of one form instead, and
conversations a file that fine-tuning names as `data:`.

Examples:
    {prog} pretrain/phase1/mixture1 --output data/phase1 --dry-run
    {prog} mine.yaml --output data/mine --workers 8 --total-tokens 2e9
    {prog} mine.yaml --output data/trial --sample 1000
    {prog} equilibrium/pretrain --output eq --local wikipedia=wiki.parquet
    {prog} mine.yaml --output data/mine datasets.0.max_epochs=2
"""

from __future__ import annotations

import argparse
import signal
import sys

from equilibrium_mcore.cli.command import processes
from equilibrium_mcore.files.paths import user_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The mixture, its folder, and what is other than in its file."""
    add = parser.add_argument
    add("mixture", metavar="MIXTURE", help="a YAML file, or its name in configs/data")
    add("overrides", nargs="*", metavar="key=value", help="settings of the mixture")
    add("--output", type=user_path, required=True, help="folder for the result and its work")
    add("--workers", type=processes, default=1, help="processes")
    add("--local", action="append", default=[], metavar="NAME=PATH", help="read a dataset here")
    add("--total-tokens", help="instead of metadata.total_tokens, e.g. 2e9")
    add("--temperature", type=float, help="instead of sampling.temperature of every dataset")
    add("--tokenizer-type", choices=("SentencePieceTokenizer", "HuggingFaceTokenizer"))
    add("--tokenizer-model", type=user_path, help=".model, tokenizer.json, or its folder")
    add("--dry-run", action="store_true", help="check, print the plan; the Hub is not asked")
    add("--sample", type=int, metavar="N", help="a trial with about N rows of each dataset")
    add("--skip-bad-rows", action="store_true", help="leave out rows that are no documents")
    add("--overwrite", action="store_true", help="replace another mixture in the folder")
    add("--keep-work", action="store_true", help="keep the shards, to prepare other shares of them")
    add("--ignore-disk", action="store_true", help="start although the disk may be too small")


def run(options: argparse.Namespace) -> None:
    """Prepare, print the summary."""
    from equilibrium_mcore.corpus.mixtures import command

    # So that a terminated run removes what it wrote to temporary files; whole shards stay.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    given = vars(options)
    print(command.run(given.pop("mixture"), given.pop("overrides"), **given))
