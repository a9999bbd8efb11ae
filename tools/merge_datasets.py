"""Merge datasets into one, one after the other; their files stay as they are.

Example:
    python tools/merge_datasets.py --input data/a_text_document data/b_text_document \\
        --output-prefix data/ab_text_document
writes data/ab_text_document.bin and .idx, and .json where each of them has one. Datasets of
Megatron-LM are read, too. Prefixes are given without .bin.
"""

from __future__ import annotations

import argparse
import sys

from equilibrium_mcore.corpus.merge import merge_datasets
from equilibrium_mcore.files.paths import user_path


def main() -> int:
    """Parse the command line, merge, print a summary."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--input", type=user_path, nargs="+", required=True, help="prefixes, in this order")
    add("--output-prefix", type=user_path, required=True, help="path without .bin")
    add("--overwrite", action="store_true", help="replace an existing dataset")
    add("--allow-repeats", action="store_true", help="the same data may come more than once")
    options = parser.parse_args()
    try:
        header = merge_datasets(
            prefixes=options.input,
            output_prefix=options.output_prefix,
            overwrite=options.overwrite,
            allow_repeats=options.allow_repeats,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{options.output_prefix}: {header.documents:,} documents, {header.tokens:,} tokens")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
