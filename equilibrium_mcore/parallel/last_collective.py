"""The collectives that this rank called last, as torch's flight recorder knows them.

Of ranks that hang, the one that is behind in a group, or called something else there, is the cause.
"""

from __future__ import annotations

import json
from typing import Any

import torch

# What each backend's recorder is read by: gloo's, and NCCL's.
_DUMPS = ("_dump_fr_trace_json", "_dump_nccl_trace_json")


def last_collectives() -> str:
    """A line for the last collective in each process group, the newest first.

    Each line has the name, sizes of inputs, the group, the collective's number in that group, and
    whether it returned. The text says so where torch recorded nothing.
    """
    newest: dict[tuple[str, ...], dict[str, Any]] = {}
    for entry in sorted(_entries(), key=lambda entry: entry["time_created_ns"]):
        newest[tuple(entry["process_group"])] = entry
    lines = [_line(entry) for entry in newest.values()][::-1]
    if not lines:
        return "no collective is on record here\n"
    return "the last collective in each process group, the newest first:\n" + "".join(lines)


def _entries() -> list[dict[str, Any]]:
    """What the recorders hold. They are torch's own, private and optional."""
    bindings = getattr(torch._C, "_distributed_c10d", None)
    found: list[dict[str, Any]] = []
    for name in _DUMPS:
        dump = getattr(bindings, name, None)
        if dump is not None:
            # Finished ones too, without stacks: those are in the same file.
            found += json.loads(dump(True, False)).get("entries", [])
    return found


def _line(entry: dict[str, Any]) -> str:
    name, description = (*entry["process_group"], "")[:2]
    group = f"{name} ({description})" if description else name
    number = entry["p2p_seq_id"] if entry["is_p2p"] else entry["collective_seq_id"]
    returned = "completed" if entry["retired"] or entry["state"] == "completed" else "NOT COMPLETED"
    sizes = ", ".join(map(str, entry["input_sizes"]))
    return f"  {entry['profiling_name']} {sizes}, number {number} of group {group}: {returned}\n"
