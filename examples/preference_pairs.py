"""Pairs for preference training, of conversations: each question with its own answer and another's.

    python examples/preference_pairs.py --input runs/chat/data/train.jsonl \\
        --output runs/dpo/data/train.jsonl

The chosen answer is the conversation's, the rejected one that of a conversation drawn by the seed.
Such pairs teach to answer the question that was asked, and nothing of taste.
"""

from __future__ import annotations

import argparse
import json
import random

from equilibrium_mcore.files.paths import user_path
from equilibrium_mcore.files.whole import write_whole


def make_pairs(rows: list[dict], *, seed: int) -> list[dict]:
    """One pair for each conversation of one question; answers that are the same are left out."""
    draw, pairs = random.Random(seed), []
    answers = [row["messages"][-1]["content"] for row in rows]
    for row, answer in zip(rows, answers, strict=True):
        other = draw.choice(answers)
        if other != answer:
            prompt = row["messages"][:-1]
            pairs.append({"prompt": prompt, "chosen": answer, "rejected": other})
    return pairs


def main() -> None:
    """Read, draw, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--input", type=user_path, required=True, help="conversations, JSONL with messages")
    add("--output", type=user_path, required=True, help="the file of pairs to write")
    add("--seed", type=int, default=0, help="of the draw (0)")
    options = parser.parse_args()
    lines = options.input.read_text(encoding="utf-8").splitlines()
    pairs = make_pairs([json.loads(line) for line in lines], seed=options.seed)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
    write_whole(options.output, text)
    print(f"{options.output}: {len(pairs):,} pairs of {len(lines):,} conversations")


if __name__ == "__main__":
    main()
