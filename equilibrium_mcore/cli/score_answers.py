"""Score texts against true answers or unit tests: verdicts counted, values, reasons.

Each line of the JSONL file has `text` (all that a model wrote) or `answer` (the answer alone), and
`truth`: the true answer, or a list of tests. Nothing of a text runs outside of a sandbox.

Examples:
    {prog} answers.jsonl --reward type=math_answer
    {prog} answers.jsonl --reward type=math_answer,units=optional,relative_tolerance=0.001
    {prog} solutions.jsonl --reward type=code_tests,credit=share --output scored.jsonl
    {prog} samples.jsonl --rewards rewards.yaml

where a line is one of
    {"text": "3 + 4 is 7, so \\\\boxed{7}", "truth": "7"}
    {"answer": "1/2", "truth": "0.5"}
    {"text": "```python\\ndef one():\\n    return 1\\n```", "truth": ["assert one() == 1"]}
and rewards.yaml holds what a run has, too:
    rewards:
      - {type: math_answer, weight: 1.0}
      - {type: format, tags: [think, answer], weight: 0.1}

Verdicts: ok, wrong; unparsed: no answer that could be read; timeout: it took too long to judge;
error: the verifier or its data failed, which is no opinion on the text. Too many errors stop it,
with status 1. Without the extra `verification` (math-verify), expressions that are no plain
numbers, intervals, sets or words are unparsed. All rewards with their settings:
docs/reference/rewards.md.
"""

from __future__ import annotations

import argparse
import sys

from equilibrium_mcore.files.paths import user_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The texts, the rewards, where the scores go."""
    add = parser.add_argument
    add("input", type=user_path, help="JSONL file, plain, .gz or .zst")
    add("--reward", action="append", default=[], metavar="type=...", help="a reward; repeatable")
    add("--rewards", type=user_path, metavar="FILE.yaml", help="rewards that come before those")
    add("--output", type=user_path, metavar="FILE.jsonl", help="a line with the score of each text")
    add("--text-field", default="text", help="the key of the text; default text")
    add("--answer-field", default="answer", help="the key of an answer alone; default answer")
    add("--truth-field", default="truth", help="the key of the truth; default truth")
    add("--examples", type=int, default=2, help="lines shown per verdict but ok; default 2")


def run(options: argparse.Namespace) -> int:
    """Score, print."""
    from equilibrium_mcore.data.jsonl import read_objects
    from equilibrium_mcore.verification.score_file import Fields, read_config, score_records

    report = score_records(
        read_objects(options.input),
        read_config(options.rewards, options.reward),
        source=options.input,
        fields=Fields(options.text_field, options.answer_field, options.truth_field),
        output=options.output,
        examples=options.examples,
    )
    sys.stdout.write(report.text)
    if report.stopped:
        print(f"error: {report.stopped}", file=sys.stderr)
    return 1 if report.stopped else 0
