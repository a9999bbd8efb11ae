"""Show what a run has read: documents, tokens and epochs per source, and the text of a step.

Of a run with `data.order: ledger`, from the `ledger.jsonl` in its output directory. Figures are
those of the last checkpoint, or with --step those after that step.

Examples:
    {prog} runs/mine
    {prog} runs/mine --step 4213 --show     # the text of a loss spike
    {prog} runs/mine --compare runs/other   # where two runs part, and why
    {prog} runs/mine --document code:4711   # the steps that read a document
"""

from __future__ import annotations

import argparse
import json

from equilibrium_mcore.cli.command import wrong_command_line
from equilibrium_mcore.files.paths import user_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The run, and what is asked of its ledger."""
    add = parser.add_argument
    add("run", type=user_path, help="the run's output_directory")
    add("--step", type=int, metavar="N", help="name the documents of step N; the first is 1")
    add("--compare", type=user_path, metavar="OTHER", help="another run's output_directory")
    add("--document", metavar="SOURCE:N", help="the steps that read document N of a source")
    add("--position", type=int, metavar="P", help="name the documents of samples from position P")
    add("--count", type=int, default=1, help="with --position: how many samples; default 1")
    add("--show", action="store_true", help="with --step: the beginning of each document's text")
    add("--json", action="store_true", help="print JSON instead of text")


def run(options: argparse.Namespace) -> None:
    """Read the ledger, print."""
    from equilibrium_mcore.data.ledger.report import as_text, ledger_report

    if options.show and options.step is None and options.position is None:
        raise wrong_command_line("--show needs --step N or --position P: whose text is shown")
    values = ledger_report(
        options.run,
        step=options.step,
        compare=options.compare,
        document=options.document,
        position=options.position,
        count=options.count,
        show=options.show,
    )
    print(json.dumps(values, indent=2, ensure_ascii=False) if options.json else as_text(values))
