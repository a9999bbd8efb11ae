"""Sums for fine-tuning and for reinforcement learning: conversations, and prompts with the truth.

    python examples/arithmetic.py --output-directory runs/math_rl/data

Writes `sft.train.jsonl`, `sft.validation.jsonl` ({"messages": ...}) and `prompts.train.jsonl`,
`prompts.validation.jsonl` ({"prompt", "truth"}), and `text.jsonl` for a tokenizer. No sum that is
held out is in a file for training, nor is the one with its two numbers swapped.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterable
from pathlib import Path

from equilibrium_mcore.files.paths import user_path
from equilibrium_mcore.files.whole import write_whole


def sums(largest: int, seed: int, held_out: int) -> tuple[list[tuple[int, int]], ...]:
    """Pairs of numbers from 0 to `largest`, shuffled: for training, and held out."""
    pairs = [(a, b) for a in range(largest + 1) for b in range(a, largest + 1)]
    random.Random(seed).shuffle(pairs)
    for_training = [(a, b) for a, b in pairs[held_out:]]
    both_ways = for_training + [(b, a) for a, b in for_training if a != b]
    random.Random(seed + 1).shuffle(both_ways)
    return both_ways, pairs[:held_out]


def question(a: int, b: int) -> str:
    """What is asked."""
    return f"{a}+{b}="


def write_lines(path: Path, rows: Iterable[dict]) -> None:
    """A JSONL file, whole."""
    write_whole(path, "".join(json.dumps(row) + "\n" for row in rows))


def conversation(a: int, b: int) -> dict:
    """A question and its answer."""
    turns = (("user", question(a, b)), ("assistant", str(a + b)))
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def texts(seed: int) -> Iterable[dict]:
    """Text that a tokenizer of 512 pieces can be made of: sums among words that mean nothing."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefghijklmnop", k=draw.randint(3, 7))) for _ in range(300)]
    for _ in range(1000):
        said = " ".join(draw.choices(words, k=12))
        asked = question(draw.randrange(99), draw.randrange(99))
        yield {"text": f"user assistant {said} {asked}"}


def main() -> None:
    """Draw and write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--output-directory", type=user_path, required=True, help="the folder of the files")
    add("--largest", type=int, default=49, help="largest number of a sum (49)")
    add("--held-out", type=int, default=100, help="sums that are held out (100)")
    add("--seed", type=int, default=0, help="of the draw (0)")
    options = parser.parse_args()
    folder = options.output_directory
    folder.mkdir(parents=True, exist_ok=True)
    training, held_out = sums(options.largest, options.seed, options.held_out)
    for part, pairs in (("train", training), ("validation", held_out)):
        write_lines(folder / f"sft.{part}.jsonl", (conversation(a, b) for a, b in pairs))
        prompts = ({"prompt": question(a, b), "truth": a + b} for a, b in pairs)
        write_lines(folder / f"prompts.{part}.jsonl", prompts)
    write_lines(folder / "text.jsonl", texts(options.seed))
    print(f"{folder}: {len(training):,} sums to train on, {len(held_out):,} held out")


if __name__ == "__main__":
    main()
