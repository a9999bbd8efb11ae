"""Merge datasets into one, one after the other; their files stay as they are.

Example:
    {prog} --input data/a_text_document data/b_text_document \\
        --output-prefix data/ab_text_document
writes data/ab_text_document.bin and .idx, and .json where each of them has one. Datasets of
Megatron-LM are read, too. Prefixes are given without .bin.
"""

from __future__ import annotations

import argparse

from equilibrium_mcore.files.paths import user_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The datasets, and what they become."""
    add = parser.add_argument
    add("--input", type=user_path, nargs="+", required=True, help="prefixes, in this order")
    add("--output-prefix", type=user_path, required=True, help="path without .bin")
    add("--allow-repeats", action="store_true", help="the same data may come more than once")
    add("--overwrite", action="store_true", help="replace an existing dataset")


def run(options: argparse.Namespace) -> None:
    """Merge, print a summary."""
    from equilibrium_mcore.corpus.merge import merge_datasets

    header = merge_datasets(
        prefixes=options.input,
        output_prefix=options.output_prefix,
        overwrite=options.overwrite,
        allow_repeats=options.allow_repeats,
    )
    print(f"{options.output_prefix}: {header.documents:,} documents, {header.tokens:,} tokens")
