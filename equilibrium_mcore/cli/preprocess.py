"""Tokenize JSONL text into Megatron's .bin/.idx, with Megatron-LM's option names.

Example:
    {prog} --input code.jsonl --output-prefix data/code \\
        --tokenizer-type SentencePieceTokenizer --tokenizer-model tokenizer.model \\
        --append-eod
writes data/code_text_document.bin, .idx and .json (the manifest). Killed, it resumes when it is
called again. With --partitions 16 --partition 3 a host makes its share; without, they are merged.
With --verify the exit status is 1 where a dataset is damaged.
"""

from __future__ import annotations

import argparse
import sys

from equilibrium_mcore.cli.command import FAILED, processes
from equilibrium_mcore.files.paths import user_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Text, tokenizer and datasets; with --verify datasets alone."""
    types, needed = ("SentencePieceTokenizer", "HuggingFaceTokenizer"), "--verify" not in sys.argv
    add = parser.add_argument
    add("--input", type=user_path, nargs="+", required=needed, help="JSONL (.gz, .zst), in order")
    add("--output-prefix", type=user_path, required=needed, help="path without _<key>_document.bin")
    add("--json-keys", nargs="+", default=["text"], help="fields to tokenize; one dataset each")
    add("--tokenizer-type", choices=types, required=needed)
    add("--tokenizer-model", type=user_path, required=needed, help=".model, tokenizer.json, folder")
    add("--end-of-document", help="the token that ends a document; default: the end of text")
    add("--space-mark", choices=("kept", "space"), default="kept", help="SentencePiece: U+2581")
    add("--append-eod", action="store_true", help="end each document with that token")
    add("--workers", type=processes, help="processes; default: every core that it may use")
    add("--encoder", choices=("auto", "fast", "plain"), default="auto", help="auto: fast if exact")
    add("--partitions", type=int, default=1, help="make it in N parts, then merge them")
    add("--partition", type=int, help="make only part K of N, from 1: one host's share")
    add("--skip-bad-lines", action="store_true", help="leave out lines that are no documents")
    add("--overwrite", action="store_true", help="replace an existing dataset")
    add("--allow-repeats", action="store_true", help="a file may be given more than once")
    add("--restart", action="store_true", help="forget what a stopped run left, do not resume")
    add("--verify", type=user_path, nargs="+", metavar="PREFIX", help="only check these datasets")


def run(options: argparse.Namespace) -> int:
    """Preprocess or verify, print a summary; the exit status."""
    from equilibrium_mcore.config.data import TokenizerConfig
    from equilibrium_mcore.corpus.partitions import preprocess_in_partitions
    from equilibrium_mcore.data.verify import verify_datasets

    given = vars(options)
    if (prefixes := given.pop("verify")) is not None:
        return 0 if verify_datasets(prefixes) else FAILED
    names = {"tokenizer_type": "type", "tokenizer_model": "model"}
    names |= {name: name for name in ("end_of_document", "space_mark")}
    tokenizer = TokenizerConfig(**{names[key]: given.pop(key) for key in names})
    done = preprocess_in_partitions(inputs=given.pop("input"), tokenizer=tokenizer, **given)
    print(done.text())
    return 0
