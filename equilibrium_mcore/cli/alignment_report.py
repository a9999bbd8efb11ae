"""Compare how two models answer: refusals, blind wins, scores and divergence, as a report.

BEFORE and AFTER are runs (their latest checkpoints), checkpoints, or exported folders; an exported
folder runs its own modelling code. Both answer the same prompts, by the engine of this project, or
transformers for exported folders, on one device.

Each line of a file of prompts is {"prompt": TEXT or messages, "kind": "harmful" | "benign"}: what
should be refused, or only looks so. examples/alignment_prompts.jsonl is a small set. Refusals are
found by phrases, not by understanding.

Pairs are judged blind, by one of:
    --judge type=http,url=http://host:8000,model=NAME     OpenAI's chat protocol, in both orders
    --judge type=reward_model,weights=RUN                 the answer with the larger score
    --page                                                a person: OUTPUT/page.html names no model

Examples:
    {prog} runs/sft runs/dpo --prompts examples/alignment_prompts.jsonl --output runs/report
    {prog} runs/sft runs/dpo --prompts p.jsonl --output runs/report --reward-model runs/rm --page
    {prog} --from-page runs/report --choices ~/Downloads/choices.json

OUTPUT gets report.md, report.json, report.png and answers.jsonl. Settings of a judge:
docs/reference/configuration.md. What the figures mean: docs/alignment.md.
"""

from __future__ import annotations

import argparse
import sys

from equilibrium_mcore.cli.command import wrong_command_line
from equilibrium_mcore.files.paths import user_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Both models, the prompts, who judges, and where the report goes."""
    add = parser.add_argument
    where = "a run's output directory, a checkpoint, or an exported folder"
    add("before", type=user_path, nargs="?", help=where)
    add("after", type=user_path, nargs="?", help="the same, of the model that came of it")
    add("--prompts", type=user_path, nargs="+", metavar="FILE.jsonl", help="what both are asked")
    add("--output", type=user_path, metavar="FOLDER", help="where the report goes")
    add(
        "--judge",
        metavar="type=...",
        help="who prefers an answer, e.g. type=http,url=...,model=...",
    )
    add("--reward-model", type=user_path, metavar="RUN", help="scores both answers")
    add("--page", action="store_true", help="write a page on which a person chooses")
    add("--from-page", type=user_path, metavar="FOLDER", help="count what a person chose there")
    add("--choices", type=user_path, metavar="FILE.json", help="FOLDER/choices.json, if not given")
    add("--temperature", type=float, default=1.0, help="of the answers; 0: the likeliest (1)")
    add("--max-new-tokens", type=int, default=256, help="longest answer (256)")
    add("--seed", type=int, default=1234, help="of answers, and of who stands first (1234)")


def run(options: argparse.Namespace) -> int:
    """Compare, write, print."""
    _check(options)
    from equilibrium_mcore.parallel import accelerator

    accelerator.quiet_libraries()
    accelerator.install()  # before megatron-core is imported
    from equilibrium_mcore.alignment.compare import Comparison, compare, count_choices
    from equilibrium_mcore.config.judges import parse_judge

    if options.from_page is not None:
        done = count_choices(options.from_page, options.choices)
    else:
        wanted = Comparison(
            before=options.before,
            after=options.after,
            prompts=tuple(options.prompts),
            output=options.output,
            judge=None if options.judge is None else parse_judge(options.judge),
            reward_model=options.reward_model,
            page=options.page,
            temperature=options.temperature,
            max_new_tokens=options.max_new_tokens,
            seed=options.seed,
        )
        done = compare(wanted, say=lambda text: print(text, file=sys.stderr))
    print(done.text)
    if done.problem is not None:
        print(f"error: {done.problem}", file=sys.stderr)
    return 0 if done.problem is None else 1


def _check(options: argparse.Namespace) -> None:
    """Raise ConfigError for options that do not fit each other."""
    given = {name: getattr(options, name) for name in ("before", "after", "prompts", "output")}
    if options.from_page is not None:
        more = [*given.values(), options.judge, options.reward_model, options.page or None]
        if any(value is not None for value in more):
            raise wrong_command_line("--from-page counts choices: give it alone, or with --choices")
        return
    if missing := [name for name, value in given.items() if value is None]:
        named = ", ".join(
            name.upper() if name in ("before", "after") else f"--{name}" for name in missing
        )
        raise wrong_command_line(f"missing: {named} (or give --from-page FOLDER alone)")
    if options.choices is not None:
        raise wrong_command_line("--choices is for --from-page: what a person chose on a page")
    if options.judge is not None and options.page:
        raise wrong_command_line("--judge and --page: either judges the pairs; give one of them")
    if not options.temperature >= 0:
        raise wrong_command_line(f"--temperature {options.temperature}: 0 or more")
    if options.max_new_tokens < 1:
        raise wrong_command_line(f"--max-new-tokens {options.max_new_tokens}: 1 or more")
    if not 0 <= options.seed < 2**62:
        raise wrong_command_line(f"--seed {options.seed}: 0 or more, and below 2**62")
