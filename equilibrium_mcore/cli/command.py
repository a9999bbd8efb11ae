"""What commands share: help from the docstring, errors in words, and what exit statuses mean.

A command is a docstring, a function that adds its arguments, and a function that does the work and
returns an exit status (None for 0):

    0      done
    1      the check or comparison that was asked for failed, or the work did (`error: ...`)
    2      a wrong command line or configuration: nothing was begun
    128+N  ended by signal N; Ctrl-C is 130

Commands import what takes long (torch, transformers) in their work, so that --help is quick.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Sequence
from importlib import import_module

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.installation import COMMANDS, PROGRAM
from equilibrium_mcore.config.load import HOSTS
from equilibrium_mcore.config.rule_kit import GPU_HOST, Host
from equilibrium_mcore.files.errors import in_words, refusal_behind
from equilibrium_mcore.training.signals import take_signals_at_once

FAILED, WRONG, INTERRUPTED = 1, 2, 130
# What is told in a line. Anything else is a fault of ours, and has a traceback.
TOLD = (ValueError, OSError, ImportError)

MOST_PROCESSES = 1024
TRAINS = ("train", "run", "resume")

Options = argparse.Namespace


def run_tool(name: str) -> int:
    """The file in tools/ of a sub-command: the same, under its own name."""
    prepare_signals(name)
    return run_subcommand(name, sys.argv[1:], program=f"python {COMMANDS[name]}")


def prepare_signals(name: str) -> None:
    """Of a process that trains: until there is something to save, a stop signal ends it at once."""
    if name in TRAINS:
        take_signals_at_once()


def run_subcommand(name: str, arguments: Sequence[str], *, program: str) -> int:
    """Run the sub-command `name`; the exit status. `program` is what its help calls it."""
    module = import_module(f"equilibrium_mcore.cli.{name.replace('-', '_')}")
    if hasattr(module, "main"):  # it has a command line of its own kind
        return module.main(arguments, program=program)
    return run_command(
        module.__doc__,
        module.add_arguments,
        module.run,
        arguments=arguments,
        program=program,
        told=getattr(module, "TOLD", TOLD),
    )


def run_command(
    doc: str | None,
    add_arguments: Callable[[argparse.ArgumentParser], object],
    work: Callable[[Options], int | None],
    *,
    arguments: Sequence[str] | None = None,
    program: str | None = None,
    told: tuple[type[BaseException], ...] = TOLD,
) -> int:
    """Parse the command line (that of this process unless given), do the work; the exit status.

    `told` are the errors of the work that are printed as one line, with status 1.
    """
    parser = argparse.ArgumentParser(
        prog=program,
        description=with_commands(doc or "", program),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_arguments(parser)
    options = parser.parse_intermixed_args(arguments)
    _refuse_double_dashes(parser, options)
    try:
        return work(options) or 0
    except ConfigError as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG
    except told as error:
        text = in_words(error) if isinstance(error, OSError) else error
        print(f"error: {text}", file=sys.stderr)
        return FAILED
    except RuntimeError as error:
        if (refusal := refusal_behind(error)) is None:
            raise
        print(f"error: {in_words(refusal)}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        return INTERRUPTED


def processes(text: str) -> int:
    """argparse's `type=` for a number of processes or threads."""
    if not re.fullmatch("[0-9]{1,9}", text) or not 1 <= int(text) <= MOST_PROCESSES:
        raise argparse.ArgumentTypeError(
            f"{text[:40]!r}: must be a whole number from 1 to {MOST_PROCESSES:,}"
        )
    return int(text)


def add_host(parser: argparse.ArgumentParser) -> None:
    """`--host`: by what `--check` judges."""
    text = "what --check judges by: this host, or one with a GPU and the fast packages (this)"
    parser.add_argument("--host", choices=HOSTS, help=text)


def judged_by(name: str | None, *, check: bool) -> Host:
    """The host that a config is judged by. Raises ConfigError where no check is asked for."""
    from equilibrium_mcore.parallel.host import describe_host

    if name is not None and not check:
        raise wrong_command_line("--host is for --check: a start is judged by the host it is on")
    return GPU_HOST if name == "gpu" else describe_host()


def _refuse_double_dashes(parser: argparse.ArgumentParser, options: Options) -> None:
    """argparse makes an empty list of the value in `--option=--`; end as for other wrong values."""
    for action in parser._actions:
        value = getattr(options, action.dest, None)
        values = value if isinstance(action, argparse._AppendAction) else [value]
        if action.nargs is None and any(isinstance(item, list) for item in values or ()):
            parser.error(f"argument {'/'.join(action.option_strings)}: -- is no value")


def with_commands(text: str, program: str | None) -> str:
    """`text` with the commands in it: {prog} is this one, {prepare} that of this name.

    They are called as this one is: as sub-commands, or as files in tools/.
    """

    def called(match: re.Match[str]) -> str:
        name = match[1]
        if name == "prog":
            return program or "%(prog)s"
        return (
            f"{PROGRAM} {name}"
            if (program or "").startswith(PROGRAM)
            else f"python {COMMANDS[name]}"
        )

    return re.sub(rf"\{{(prog|{'|'.join(COMMANDS)})\}}", called, text)


def wrong_command_line(problem: str) -> ConfigError:
    """The error for options that do not fit each other, where argparse cannot know it."""
    return ConfigError(problem, source="the command line")
