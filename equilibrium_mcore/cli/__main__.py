"""Train hybrid Mamba-2 + MLA + MoE language models on Megatron-Core, from text to a release.

usage: equilibrium-mcore COMMAND [ARGUMENTS ...]
       equilibrium-mcore COMMAND --help

{commands}

examples:
  equilibrium-mcore count equilibrium_3b
  equilibrium-mcore preprocess --input code.jsonl --output-prefix data/code \\
      --tokenizer-type HuggingFaceTokenizer --tokenizer-model tokenizer --append-eod
  equilibrium-mcore sanity configs/runs/mine.yaml
  equilibrium-mcore run configs/runs/mine.yaml output_directory=runs/mine
  equilibrium-mcore convert --checkpoint runs/mine --output exported --verify

Exit status: 0 done; 1 a check failed, or the work did; 2 a wrong command line or configuration.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Sequence
from difflib import get_close_matches
from pathlib import Path

from equilibrium_mcore import __version__
from equilibrium_mcore.cli.command import WRONG, prepare_signals, run_subcommand
from equilibrium_mcore.config.installation import COMMANDS, PROGRAM

GROUPS = {
    "from text to datasets": (
        "prepare",
        "analyze",
        "preprocess",
        "merge",
        "tokenizer",
        "add-tokens",
        "try-filter",
        "perplexity-model",
        "quality-classifier",
    ),
    "before a run": ("count", "groups", "sanity", "certify", "store-targets"),
    "a run": ("train", "run", "resume", "pipeline"),
    "after it": (
        "ledger",
        "plot",
        "verify",
        "convert",
        "generate",
        "score-answers",
        "alignment-report",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Call the sub-command that the first word names; the exit status."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    if words[:1] == ["--version"]:
        print(f"{PROGRAM} {__version__}")
        return 0
    if not words or words[0] in ("-h", "--help", "help"):
        print(usage())
        return 0 if words else WRONG
    if words[0] not in COMMANDS:
        near = get_close_matches(words[0], COMMANDS, n=1)
        hint = f", did you mean {near[0]}" if near else ""
        print(
            f"error: {words[0]}: no such command{hint}? There are {', '.join(COMMANDS)}; "
            f"{PROGRAM} --help says what they do",
            file=sys.stderr,
        )
        return WRONG
    if arguments is None:
        prepare_signals(words[0])
    return run_subcommand(words[0], words[1:], program=f"{PROGRAM} {words[0]}")


def usage() -> str:
    """What `--help` prints: a sentence for each command."""
    width = max(map(len, COMMANDS))
    parts = [
        "\n".join([f"{group}:", *(f"  {name:<{width}}  {sentence(name)}" for name in names)])
        for group, names in GROUPS.items()
    ]
    return (__doc__ or "").replace("{commands}", "\n\n".join(parts)).strip()


def sentence(name: str) -> str:
    """The first sentence of a command's help; read, not imported, since imports take seconds."""
    source = Path(__file__).with_name(f"{name.replace('-', '_')}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").splitlines()[0].rstrip(".")


if __name__ == "__main__":
    sys.exit(main())
