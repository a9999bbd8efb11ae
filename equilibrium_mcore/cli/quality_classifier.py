"""Train the classifier of the filter `educational` from good and bad documents.

What the filter then looks for is what tells the two files apart: take them from the same kind of
source, and look at what it drops with {try-filter}.

Example:
    {prog} --positive data/textbooks.jsonl \\
        --negative data/random_web.jsonl --output data/educational.safetensors
    {try-filter} data/web.jsonl \\
        --filter type=educational,model=data/educational.safetensors,min_score=0.5
"""

from __future__ import annotations

import argparse

from equilibrium_mcore.files.paths import user_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The documents, the model, and how it is trained and measured."""
    add = parser.add_argument
    add("--positive", type=user_path, nargs="+", required=True, help="JSONL of what to keep")
    add("--negative", type=user_path, nargs="+", required=True, help="JSONL of what to drop")
    add("--output", type=user_path, required=True, help="the model, .safetensors")
    add("--text-field", default="text", help="the key that holds the text; default text")
    add("--bits", type=int, default=18, help="binary logarithm of the features; default 18 (1 MB)")
    add("--held-out-share", type=float, default=0.1, help="documents to measure on; default 0.1")
    add("--max-documents", type=int, default=100_000, help="of each kind; default 100000")
    add("--seed", type=int, default=1234, help="decides what is drawn and held out")
    add("--overwrite", action="store_true", help="replace an existing model")


def run(options: argparse.Namespace) -> None:
    """Train, print what was measured."""
    from equilibrium_mcore.corpus.filters.train_classifier import train_quality_classifier

    done = train_quality_classifier(**vars(options))
    print(f"{done.path}: {done.positives:,} positive, {done.negatives:,} negative documents")
    print(
        f"accuracy on {done.held_out:,} held-out documents: {done.accuracy:.3f} "
        f"(always the more frequent kind: {done.baseline:.3f}); {done.seconds:.1f} s"
    )
    for threshold, (positives, negatives) in done.kept.items():
        print(f"  min_score {threshold:g} keeps {positives:.1%} positive, {negatives:.1%} negative")
