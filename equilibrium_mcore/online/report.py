"""What a rollout was like: figures for the curves, and answers to read."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from equilibrium_mcore.data.tokenizer import Tokenizer
from equilibrium_mcore.files.json_lines import JsonLinesLog, json_line, read_log
from equilibrium_mcore.files.whole import write_whole
from equilibrium_mcore.online.judge import text_of
from equilibrium_mcore.online.rollouts import Gathered, Group

SAMPLES_FILE = "samples.jsonl"
FAILURES = ("unparsed", "timeout", "error")


def figures_of(gathered: Gathered) -> dict[str, float]:
    """Means over all answers that were asked for, with those of groups that were replaced.

    `reward` and its parts before weights; `answer_tokens`; `cut_off`, `unparsed`, `timeout` and
    `error`, shares of the answers; `dead_groups`, the share of groups with one reward.
    """
    groups = gathered.asked
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    verdicts = [verdict for group in groups for verdict in group.verdicts]
    judged = [verdict for verdict in verdicts if verdict.verdict != "error"]
    figures = {"reward": _mean([verdict.reward for verdict in judged])}
    for name in verdicts[0].parts:
        figures[f"reward_{name}"] = _mean([verdict.parts[name] for verdict in judged])
    lengths = [len(rollout.ids) for rollout in rollouts]
    return {
        **figures,
        "answer_tokens": _mean(lengths),
        "answer_tokens_most": float(max(lengths)),
        "cut_off": _mean([rollout.finish == "length" for rollout in rollouts]),
        "dead_groups": _mean([group.is_dead for group in groups]),
        **{name: _mean([v.verdict == name for v in verdicts]) for name in FAILURES},
    }


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else 0.0


class SamplesFile:
    """`samples.jsonl`: some answers of every rollout. On the first rank alone."""

    def __init__(self, folder: Path, tokenizer: Tokenizer, *, shown: int, after_step: int) -> None:
        """Goes on after `after_step`: what stands there of later steps is made again."""
        path = folder / SAMPLES_FILE
        if path.is_file():
            broken: list[str] = []
            kept = [
                r for r in read_log(path, broken=broken.append) if r.get("step", 0) <= after_step
            ]
            write_whole(path, b"".join(json_line(record, ascii_only=True) for record in kept))
        self._log, self._tokenizer, self._shown = JsonLinesLog(path), tokenizer, shown

    def __call__(self, gathered: Gathered, step: int) -> None:
        """Append the first answers of the first groups, for the step that they are made for."""
        for group in gathered.asked[: self._shown]:
            self._log.append(self._record(group, step))

    def _record(self, group: Group, step: int) -> dict[str, Any]:
        rollout, verdict = group.rollouts[0], group.verdicts[0]
        return {
            "step": step,
            "prompt": group.prompt.text,
            "truth": group.prompt.truth,
            "answer": text_of(self._tokenizer, rollout.ids),
            "read_as": verdict.answer_text,
            "verdict": verdict.verdict,
            "reward": verdict.reward,
            "parts": verdict.parts,
            "rewards_of_group": [one.reward for one in group.verdicts],
            "tokens": len(rollout.ids),
            "finish": rollout.finish,
        }

    def close(self) -> None:
        """Close the file."""
        self._log.close()
