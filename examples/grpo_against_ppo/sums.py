"""Sums for fine-tuning, whose answers mostly stop too early, and for reinforcement learning.

    python examples/grpo_against_ppo/sums.py --output-directory runs/grpo_against_ppo/data

Writes `sft.train.jsonl` and `sft.validation.jsonl` ({"messages": ...}): sums of two numbers, and
sums of three of which two answers in three stop after the first addition; the prompts
`prompts.train.jsonl` and `prompts.validation.jsonl` ({"prompt", "truth"}), sums of three; and
`text.jsonl` for a tokenizer. What is held out is in no file for training, in no order of its terms.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
from collections.abc import Iterable, Sequence
from pathlib import Path

from equilibrium_mcore.files.paths import user_path
from equilibrium_mcore.files.whole import write_whole

LARGEST = 9  # of a term; the first of two goes up to twice this, as a sum of two does
SHOWN = (1, 1, 2)  # of each sum of three, additions that answers in the fine-tuning made
Terms = tuple[int, ...]


def two_terms() -> list[Terms]:
    """All sums of two numbers that a step of a longer sum can be."""
    return list(itertools.product(range(2 * LARGEST + 1), range(LARGEST + 1)))


def three_terms(seed: int, held_out: float) -> tuple[list[Terms], list[Terms]]:
    """Sums of three numbers: for training, and held out with every order of their terms."""
    kinds = list(itertools.combinations_with_replacement(range(LARGEST + 1), 3))
    draw = random.Random(seed)
    draw.shuffle(kinds)
    kept_back = set(kinds[: round(held_out * len(kinds))])
    everything = list(itertools.product(range(LARGEST + 1), repeat=3))
    draw.shuffle(everything)
    parts: tuple[list[Terms], list[Terms]] = ([], [])
    for terms in everything:
        parts[tuple(sorted(terms)) in kept_back].append(terms)
    return parts


def question(terms: Sequence[int]) -> str:
    """What is asked."""
    return "+".join(map(str, terms)) + "="


def conversation(terms: Sequence[int], steps: int | None = None) -> dict:
    """A question and its answer; with `steps`, what is reached after so many additions."""
    reached = terms if steps is None else terms[: steps + 1]
    turns = (("user", question(terms)), ("assistant", str(sum(reached))))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def prompt(terms: Sequence[int]) -> dict:
    """A question, and what its answer is judged by."""
    return {"prompt": question(terms), "truth": sum(terms)}


def texts(seed: int) -> Iterable[dict]:
    """Text that a small tokenizer can be made of: sums among words that mean nothing."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(3, 7))) for _ in range(300)]
    for _ in range(1000):
        asked = question([draw.randrange(10) for _ in range(3)])
        yield {"text": f"user assistant {' '.join(draw.choices(words, k=12))} {asked}"}


def write_lines(path: Path, rows: Iterable[dict]) -> None:
    """A JSONL file, whole."""
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


def write_data(folder: Path, *, seed: int = 0, held_out: float = 0.2) -> str:
    """All files; a line that says how many there are."""
    folder.mkdir(parents=True, exist_ok=True)
    training, kept_back = three_terms(seed, held_out)
    chats = [conversation(terms) for terms in two_terms()]
    chats += [conversation(terms, steps) for terms in training for steps in SHOWN]
    random.Random(seed).shuffle(chats)
    write_lines(folder / "sft.train.jsonl", chats)
    write_lines(folder / "sft.validation.jsonl", map(conversation, kept_back))
    write_lines(folder / "prompts.train.jsonl", map(prompt, training))
    write_lines(folder / "prompts.validation.jsonl", map(prompt, kept_back))
    write_lines(folder / "text.jsonl", texts(seed))
    return (
        f"{folder}: {len(chats):,} conversations, {len(training):,} sums of three to train on, "
        f"{len(kept_back):,} held out"
    )


def main() -> None:
    """Draw and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output-directory", type=user_path, required=True, help="the folder of the files")
    add("--held-out", type=float, default=0.2, help="share of the sums of three (0.2)")
    add("--seed", type=int, default=0, help="of the draw (0)")
    options = parser.parse_args()
    print(write_data(options.output_directory, seed=options.seed, held_out=options.held_out))


if __name__ == "__main__":
    main()
