"""Train a SentencePiece tokenizer on JSONL text: BPE, byte fallback, exact round trip.

Example:
    {prog} --input code.jsonl prose.jsonl \\
        --output runs/quickstart/tokenizer/tokenizer.model --vocab-size 4096
"""

from __future__ import annotations

import argparse
import sys

from equilibrium_mcore.cli.command import processes
from equilibrium_mcore.corpus.train_tokenizer import CHAT_TOKENS, train_tokenizer
from equilibrium_mcore.files.paths import user_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The text, the model, and what is in its vocabulary."""
    add = parser.add_argument
    add("--input", type=user_path, nargs="+", required=True, help="JSONL files")
    add("--output", type=user_path, required=True, help="the .model file to write")
    add("--vocab-size", type=int, default=4096)
    add("--json-key", default="text", help="the field that holds the text")
    add("--max-megabytes", type=float, default=10.0, help="how much text to sample")
    add("--special-tokens", nargs="*", default=CHAT_TOKENS, help="control tokens to reserve")
    add("--seed", type=int, default=1234)
    add("--threads", type=processes, default=None, help="default: all cores")
    add("--overwrite", action="store_true", help="replace an existing model")


def run(options: argparse.Namespace) -> None:
    """Train, print a summary."""
    print(f"training a vocabulary of {options.vocab_size} ...", file=sys.stderr, flush=True)
    given = vars(options)
    summary = train_tokenizer(inputs=given.pop("input"), **given)
    print(
        f"{summary.path}: {summary.vocab_size} tokens from {summary.trained_bytes / 1e6:.1f} MB in "
        f"{summary.seconds:.1f} s; {summary.bytes_per_token:.2f} bytes per token on "
        f"{summary.held_out_bytes / 1e6:.2f} MB held out"
    )
