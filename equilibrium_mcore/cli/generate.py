"""Talk with a model in the terminal: a checkpoint, a run, or an exported folder.

Without --prompt lines are read from standard input, one after the other: texts to continue, or with
--chat turns of one conversation. /exit or Ctrl-D ends the talk, Ctrl-C an answer. A run or a
checkpoint answers by the modules that trained it, on one device; the same question in the same
place with the same --seed has the same answer. An exported folder runs its own modelling code, so
use it on folders that you made.

Examples:
    {prog} runs/quickstart/hugging_face --prompt "def read_lines(path):"
    {prog} runs/sft --chat --system "Be brief."
    echo "What is a list?" | {prog} chat --chat --temperature 0
"""

from __future__ import annotations

import argparse

from equilibrium_mcore.cli.command import wrong_command_line
from equilibrium_mcore.files.paths import user_path
from equilibrium_mcore.hugging_face.sampling import Sampling


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The model, what it is asked, and how it answers."""
    add, default = parser.add_argument, Sampling()
    where = "an exported folder, a run's output directory (its latest checkpoint), or a checkpoint"
    add("path", type=user_path, help=where)
    add("--chat", action="store_true", help="questions and answers, by the model's chat template")
    add("--prompt", help="answer this alone")
    add("--system", help="what the conversation begins with (--chat)")
    add("--temperature", type=float, default=default.temperature, help="0: always the likeliest")
    add("--top-p", type=float, default=default.top_p, help="share of the likeliest tokens (0.9)")
    add("--max-new-tokens", type=int, default=default.max_new_tokens, help="of an answer (256)")
    add("--seed", type=int, default=1234, help="of the drawing of tokens (1234)")


def run(options: argparse.Namespace) -> None:
    """Talk."""
    from equilibrium_mcore.hugging_face.talk import talk

    given = vars(options)
    if given["system"] is not None and not given["chat"]:
        raise wrong_command_line("--system begins a conversation: give --chat with it")
    names = ("temperature", "top_p", "max_new_tokens")
    sampling = Sampling(**{name: given.pop(name) for name in names})
    talk(given.pop("path"), sampling=sampling, **given)
