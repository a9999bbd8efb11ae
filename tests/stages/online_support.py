"""Runs on their own answers, at the size of a test: prompts, settings, and what ranks run."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.parallel.launch import RankInfo
from tests.data.chat.support import write_rows
from tests.support.runs import MODEL, tiny_run

SMALL = {
    **MODEL,
    "layer_pattern": "ME|+E",
    "moe": {**MODEL["moe"], "load_balancing": "none"},
}
LONGEST = 8  # characters of an answer from which it costs more


def prompt_rows(count: int, seed: int) -> list[dict]:
    """Words to be continued, of which no answer is true."""
    draw = random.Random(seed)
    return [
        {"prompt": "say " + "".join(draw.choices("abcdefgh", k=draw.randint(2, 9))), "truth": n}
        for n in range(count)
    ]


def prompts_section(data: dict, folder: Path) -> dict[str, Any]:
    """The `data` section of a run on prompts."""
    files = {
        part: [str(write_rows(folder / f"{part}.jsonl", prompt_rows(count, seed)))]
        for part, count, seed in (("train", 11, 1), ("validation", 3, 2))
    }
    return {
        "type": "prompts",
        "name": "words",
        "tokenizer": data["tokenizer"],
        "template": "plain",
        "sources": [{"name": "made_up", **files}],
        "document_multiple": 4,
    }


def online_run(prompts: dict, weights: Path, output: Path, **changes: Any) -> RunConfig:
    """A short run whose answers are worth more the fewer characters they have."""
    training = {
        "sequence_length": 64,
        "micro_batch_size": 1,
        "global_batch_size": 8,
        "steps": 4,
        "precision": "fp32",
        **changes.pop("training", {}),
    }
    rollout = {"samples_per_prompt": 4, "max_new_tokens": 6, **changes.pop("rollout", {})}
    changes = {
        "stage": "grpo",
        "model": SMALL,
        "objective": {"type": "policy", **changes.pop("objective", {})},
        "parallelism": {"world_size": 1},
        "rewards": [{"type": "length", "unit": "characters", "max_length": 60, "soft_from": 1}],
        **changes,
    }
    checkpoint = {"initial_weights": str(weights), **changes.pop("checkpoint", {})}
    return tiny_run(
        prompts, output, training=training, rollout=rollout, checkpoint=checkpoint, **changes
    )


def stage_rank(rank_info: RankInfo, config: RunConfig) -> None:
    """What `python -m equilibrium_mcore.train` runs in a rank, by the slow engine."""
    from equilibrium_mcore.stages.online import online_rank
    from tests.support.slow_engine import SlowEngine

    online_rank(rank_info, config=config, engine_of=SlowEngine)


def records(folder: Path, kind: str = "train") -> list[dict[str, Any]]:
    """Lines of `metrics.jsonl`."""
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]
