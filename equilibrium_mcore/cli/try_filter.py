"""Try filters on a sample of a JSONL file: what each would drop, and why, with examples.

Examples:
    {prog} data/web.jsonl --filter type=language,languages=[en] \\
        --filter type=gopher_quality,min_words=30 --sample 500
    {prog} data/web.jsonl.gz --filters filters.yaml --markdown > report.md

--filter may be given several times and takes key=value pairs, whose values are YAML; filters.yaml
holds `filters:` with a list, as a data mixture does. Nothing is written. All filters with their
settings: docs/reference/filters.md.
"""

from __future__ import annotations

import argparse
import sys

from equilibrium_mcore.files.paths import user_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The text, the filters, the sample, and the form of the report."""
    add = parser.add_argument
    add("input", type=user_path, help="JSONL file, plain or .gz")
    add("--filter", action="append", default=[], metavar="type=...", help="a filter; repeatable")
    add("--filters", type=user_path, metavar="FILE.yaml", help="filters that come before those")
    add("--sample", type=int, default=1000, help="documents, drawn evenly; 0: all; default 1000")
    add("--seed", type=int, default=1234, help="decides which are drawn")
    add("--text-field", default="text", help="the key that holds the text; default text")
    add("--tokenizer-model", type=user_path, help=".model or tokenizer.json, for length in tokens")
    add("--examples", type=int, default=2, help="documents shown per reason; default 2")
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--json", dest="output_format", action="store_const", const="json")
    group.add_argument("--markdown", dest="output_format", action="store_const", const="markdown")
    parser.set_defaults(output_format="table")


def run(options: argparse.Namespace) -> None:
    """Try the filters, print the report."""
    from equilibrium_mcore.corpus.filters.trial_command import report_trial

    given = vars(options)
    report = report_trial(given.pop("input"), filter_arguments=given.pop("filter"), **given)
    sys.stdout.write(report)
