"""What a rule is, and the facts about a host that some rules ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from equilibrium_mcore.config.schema import RunConfig


@dataclass(frozen=True)
class Host:
    """What this machine has, as far as a config can ask for it. Filled in by `parallel/`."""

    has_cuda: bool = False
    has_transformer_engine: bool = False
    has_mamba_ssm: bool = False
    device_name: str = "CPU"
    compute_capability: tuple[int, int] | None = None
    memory_gib: float | None = None  # of a host without a GPU


# A host with the fast packages; which GPU it has is not known.
GPU_HOST = Host(
    has_cuda=True, has_transformer_engine=True, has_mamba_ssm=True, device_name="a GPU host"
)


class Subject(NamedTuple):
    """What a rule looks at. Only the sections that the rule declared may be read."""

    config: RunConfig
    world_size: int | None = None
    host: Host | None = None


RuleFunction = Callable[[Subject], Iterator[str]]


class Rule(NamedTuple):
    """A check, and the top-level sections that it reads."""

    needs: frozenset[str]
    function: RuleFunction


class RuleTable(list):
    """Rules in the order of their declaration."""

    def rule(self, *needs: str) -> Callable[[RuleFunction], RuleFunction]:
        """Declare a rule that reads these sections of the run."""

        def declare(function: RuleFunction) -> RuleFunction:
            self.append(Rule(frozenset(needs), function))
            return function

        return declare


def choices(values: Iterable[int], limit: int = 12) -> str:
    """Legal values for a message: `1, 2, 4, 8`; a long list is shortened in its middle."""
    values = list(values)
    if len(values) > limit:
        head = ", ".join(str(v) for v in values[: limit - 2])
        return f"{head}, ..., {values[-1]}"
    return ", ".join(str(v) for v in values) or "none"
