"""Damage to a checkpoint's folder, as disks, copies and people do it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

LATEST = "latest"


@dataclass(frozen=True)
class Damage:
    """Something that is done to a checkpoint; `do` returns the name of the file that it befalls."""

    do: Callable[[Path, random.Random], str]
    harmful: bool = True  # the checkpoint cannot be resumed from afterwards

    @property
    def name(self) -> str:
        return self.do.__name__


def flip_a_bit(checkpoint: Path, rng: random.Random) -> str:
    path = _any_file(checkpoint, rng)
    content = bytearray(path.read_bytes())
    place = rng.randrange(len(content))
    content[place] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return path.name


def cut_short(checkpoint: Path, rng: random.Random) -> str:
    path = _any_file(checkpoint, rng)
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])
    return path.name


def remove_a_file(checkpoint: Path, rng: random.Random) -> str:
    path = _any_file(checkpoint, rng)
    path.unlink()
    return path.name


def swap_two_files(checkpoint: Path, rng: random.Random) -> str:
    first, second = rng.sample(sorted(checkpoint.glob("*.distcp")), 2)
    content = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(content)
    return first.name if first.name < second.name else second.name


def state_of_another_step(checkpoint: Path, rng: random.Random) -> str:
    other = sorted(p for p in checkpoint.parent.iterdir() if p.name.startswith("step_"))[0]
    (checkpoint / "state.json").write_bytes((other / "state.json").read_bytes())
    return "state.json"


def lose_latest(checkpoint: Path, rng: random.Random) -> str:
    (checkpoint.parent / LATEST).unlink()
    return LATEST


def empty_latest(checkpoint: Path, rng: random.Random) -> str:
    (checkpoint.parent / LATEST).write_text("")
    return LATEST


DAMAGES = (
    Damage(flip_a_bit),
    Damage(cut_short),
    Damage(remove_a_file),
    Damage(swap_two_files),
    Damage(state_of_another_step),
    Damage(lose_latest, harmful=False),
    Damage(empty_latest, harmful=False),
)


def _any_file(checkpoint: Path, rng: random.Random) -> Path:
    """One of its files, each as likely as any other, however small."""
    return rng.choice(sorted(p for p in checkpoint.iterdir() if p.is_file() and p.stat().st_size))
