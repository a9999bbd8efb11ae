"""The main of a worker process: builds its rewards, then judges one example a line.

Started by `pool.py`. Its real stdout is for replies; whatever a reward prints goes to stderr.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, TextIO

from equilibrium_mcore.processes.parents import end_with_parent
from equilibrium_mcore.verification.registry import build_rewards
from equilibrium_mcore.verification.scored import Example, Part, RewardError, shown


def main() -> None:
    """Serve until the pool closes stdin."""
    end_with_parent(int(sys.argv[2]))
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    tasks = os.fdopen(os.dup(0), encoding="utf-8")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    try:
        rewards = build_rewards(json.loads(tasks.readline()))
    except (RewardError, ImportError, OSError, ValueError) as error:
        _reply(replies, {"refused": str(error)})
        return
    _reply(replies, {"notes": [note for reward in rewards for note in reward.notes]})
    for line in tasks:
        task = json.loads(line)
        _reply(replies, _judge(rewards[task["reward"]], task["example"]))


def _judge(reward: Any, fields: Mapping[str, Any]) -> dict[str, Any]:
    """The reply to one task."""
    try:
        return asdict(reward.score(Example(**fields)))
    except RewardError as error:
        return {"fatal": str(error)}
    except Exception as error:  # whatever a verifier does not know how to treat is its error
        reason = shown(f"{type(error).__name__}: {error}")
        return asdict(Part(reward.name, 0.0, "error", reason=reason))


def _reply(stream: TextIO, reply: Mapping[str, Any]) -> None:
    stream.write(json.dumps(reply) + "\n")
    stream.flush()
