"""Answers of two models to the same questions, side by side, through transformers' pipeline.

    python examples/chat_answers.py --before runs/chat/before --after runs/chat/hugging_face \\
        --data runs/chat/data --run runs/chat/run --output runs/chat/answers.md

Half of the questions were trained on, half were held out. Greedy, on the CPU. The table goes to the
terminal and to a Markdown file; below it stands what can be counted: answers that end, and the loss
on held-out conversations before and after.
"""

from __future__ import annotations

import argparse
import textwrap
from itertools import islice
from pathlib import Path
from typing import NamedTuple

from equilibrium_mcore.cli.command import run_command
from equilibrium_mcore.data.jsonl import read_objects
from equilibrium_mcore.files.paths import report_path, user_path
from equilibrium_mcore.files.tables import markdown_table
from equilibrium_mcore.files.whole import write_whole
from equilibrium_mcore.training.metrics import METRICS_FILE, read_metrics


class Question(NamedTuple):
    """What is asked, what the documentation says, and whether it was trained on."""

    messages: list[dict[str, str]]
    expected: str
    part: str


def questions(folder: Path, each: int) -> list[Question]:
    """The first conversations of both files, up to their first question."""
    found = []
    for part in ("train", "validation"):
        for _, row in islice(read_objects(folder / f"{part}.jsonl"), each):
            messages = row["messages"]
            end = next(i for i, m in enumerate(messages) if m["role"] == "assistant")
            found.append(Question(messages[:end], messages[end]["content"], part))
    return found


def answers(folder: Path, asked: list[Question], max_new_tokens: int) -> list[tuple[str, bool]]:
    """What the model in `folder` says to each, and whether it ended by itself."""
    from transformers import pipeline
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()  # of loading weights: it would stand before the text
    talk = pipeline("text-generation", model=str(folder), trust_remote_code=True, device="cpu")
    said = []
    for question in asked:
        reply = talk(
            question.messages,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            return_full_text=False,
        )
        text = reply[0]["generated_text"]
        text = text if isinstance(text, str) else text[-1]["content"]
        count = len(talk.tokenizer(text)["input_ids"])
        said.append((text.strip(), count < max_new_tokens - 1))
    return said


def table(asked: list[Question], before: list, after: list) -> str:
    """Markdown: a row for each question."""
    rows = []
    for question, (first, _), (second, _) in zip(asked, before, after, strict=True):
        held_out = " (held out)" if question.part == "validation" else ""
        asks = question.messages[-1]["content"] + held_out
        rows.append((asks, question.expected, first, second))
    return markdown_table(("question", "documentation", "before", "after"), rows)


def summary(run: Path, before: list, after: list) -> list[str]:
    """What can be counted."""
    losses = [r["loss"] for r in read_metrics(run / METRICS_FILE) if r["kind"] == "validation"]
    ended = [sum(end for _, end in said) for said in (before, after)]
    return [
        f"loss on held-out answers: {losses[0]:.3f} nats a token before, {losses[-1]:.3f} after",
        f"answers that end by themselves: {ended[0]} of {len(before)} before, "
        f"{ended[1]} of {len(after)} after",
    ]


def print_answers(asked: list[Question], before: list, after: list) -> None:
    """One block for each question."""
    for question, (first, _), (second, _) in zip(asked, before, after, strict=True):
        held_out = " (held out)" if question.part == "validation" else ""
        print(f"\n  {question.messages[-1]['content']}{held_out}")
        for name, text in (
            ("documentation", question.expected),
            ("before", first),
            ("after", second),
        ):
            print(
                textwrap.fill(
                    " ".join(text.split()),
                    width=100,
                    initial_indent=f"    {name:<15}",
                    subsequent_indent=" " * 19,
                    max_lines=3,
                )
            )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Both models, the questions, and the table."""
    add = parser.add_argument
    add("--before", type=user_path, required=True, help="an exported folder with a chat template")
    add("--after", type=user_path, required=True, help="another one")
    add("--data", type=user_path, required=True, help="the folder of examples/stdlib_chats.py")
    add("--run", type=user_path, required=True, help="the fine-tuning's output directory")
    add("--output", type=report_path, required=True, help="the table as Markdown")
    add("--each", type=int, default=4, help="questions of each of the two files; default 4")
    add("--max-new-tokens", type=int, default=60)


def run(options: argparse.Namespace) -> None:
    """Ask both, print and write the table."""
    for folder in (options.before, options.after):
        if not (folder / "chat_template.jinja").is_file():
            raise FileNotFoundError(
                f"{folder} holds no chat_template.jinja: export it with "
                "tools/convert_checkpoint.py --chat-template chatml"
            )
    asked = questions(options.data, options.each)
    before = answers(options.before, asked, options.max_new_tokens)
    after = answers(options.after, asked, options.max_new_tokens)
    print_answers(asked, before, after)
    facts = summary(options.run, before, after)
    print("\n  " + "\n  ".join(facts))
    text = "\n".join(["# Before and after", "", table(asked, before, after), "", *facts, ""])
    write_whole(options.output, text)
    print(f"  the table: {options.output}")


if __name__ == "__main__":
    raise SystemExit(run_command(__doc__, add_arguments, run))
