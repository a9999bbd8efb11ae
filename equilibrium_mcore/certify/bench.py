"""Runs the twin on one rank and in its layouts, and compares what they did."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

# Every rank needs it, and a rank is forked from here: imported once, not in each for a second.
import torch._dynamo  # noqa: F401

from equilibrium_mcore.certify.compare import (
    compare,
    compare_float32,
    compare_states,
    compare_updates,
    main_weights,
    update_tolerance,
)
from equilibrium_mcore.certify.packing import compare_packing
from equilibrium_mcore.certify.rollouts import WITHOUT_ANSWERS, compare_rollouts, traced_rollouts
from equilibrium_mcore.certify.ties import Tie, find_tie
from equilibrium_mcore.certify.trace import Trace, read_trace, trace_rank
from equilibrium_mcore.certify.twin import STEPS, Layout, in_layout, make_twin
from equilibrium_mcore.certify.verdict import Verdict
from equilibrium_mcore.certify.witness import compare_with_witness
from equilibrium_mcore.checkpoint.directory import LATEST
from equilibrium_mcore.config.online_rules import JUDGED
from equilibrium_mcore.config.policy import PolicyConfig
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.files.whole import write_whole
from equilibrium_mcore.parallel.rank_job import RankInfo, TimeLimit
from equilibrium_mcore.parallel.rank_server import RankServer

ONE_RANK = Layout("one rank", {}, 1)


class Reference(NamedTuple):
    """What the twin did on one rank."""

    sharp: Trace  # in float64
    float32: Trace  # a step
    rollouts: dict | None = None  # of a policy: what one rank drew and learned


class Comparison(NamedTuple):
    """A layout against one rank."""

    verdicts: list[Verdict]
    tie: Tie | None


class Ranks(NamedTuple):
    """Where ranks come from, and what is done in them before anything is built."""

    server: RankServer
    prepare: Callable[[], None] | None
    everywhere: bool  # also in the ranks of the reference and of the witness
    limit_minutes: float

    def preparation(self, *, layout: bool) -> Callable[[], None] | None:
        """What runs first in the ranks of a layout, or in one rank by itself."""
        return self.prepare if layout or self.everywhere else None

    def run(self, phase: str, work: Callable[[RankInfo], None], world_size: int) -> None:
        """Raises RankError when one fails, or when they do not end within the limit."""
        limit = TimeLimit(
            minutes=self.limit_minutes,
            phase=f"certificate, {phase} on {world_size} ranks",
            raised_by="--time-limit MINUTES",
        )
        self.server.run(world_size, work, limit=limit)


class Bench:
    """Runs the twin in its layouts, with checkpoints passed between them."""

    def __init__(
        self,
        folder: Path,
        config: RunConfig,
        layouts: list[Layout],
        ranks: Ranks,
    ) -> None:
        self.folder, self.ranks = folder, ranks
        self.twin = make_twin(config, layouts, folder=folder / "reference")
        self._judged = config.stage == JUDGED
        for layout in layouts:  # said before anything is trained
            in_layout(self.twin, layout)
        checkpoints = folder / "reference" / "checkpoints"
        self._ends = checkpoints / "step_00000000", checkpoints / f"step_{STEPS:08d}"

    def reference(self) -> Reference:
        """The twin on one rank, once, and before any layout: it saves what they load.

        It recomputes nothing, so that what layouts recompute is compared with what was computed.
        """
        plain = self._keeping_all(self.twin)
        trace = self._trace("reference", plain, ONE_RANK, save_first=True, save_last=True)
        restart = self.twin.model_copy(update={"output_directory": self.folder / "updates"})
        trace.update = self._trace("updates", restart, ONE_RANK, steps=0, given=True).update
        rounded = self._keeping_all(self._starting(ONE_RANK, "float32"))
        float32 = self._trace("float32", rounded, ONE_RANK, steps=1, sharp=False)
        rollouts = self._rollouts("rollouts", ONE_RANK)[0] if self._answers else None
        return Reference(trace, float32, rollouts)

    @property
    def _answers(self) -> bool:
        """Whether the run learns from its own answers, by rewards or a judge."""
        objective = self.twin.objective
        rewarded = (
            isinstance(objective, PolicyConfig) and objective.advantage not in WITHOUT_ANSWERS
        )
        return rewarded or self._judged

    def _rollouts(self, name: str, layout: Layout, *, fault: bool = False) -> list[dict]:
        """Answers of the twin in a layout, and steps on them, from the reference's weights."""
        return traced_rollouts(
            self._starting(layout, name),
            partial(self.ranks.run, name),
            self.folder / f"{name}_trace",
            world_size=layout.world_size,
            prepare=self.ranks.preparation(layout=fault),
        )

    @staticmethod
    def _keeping_all(config: RunConfig) -> RunConfig:
        training = config.training.model_copy(update={"recompute": "none"})
        return config.model_copy(update={"training": training})

    def compare(self, layout: Layout, reference: Reference) -> Comparison:
        """All that is compared of one layout."""
        name = layout.name.replace(",", "_").replace("=", "")
        optimizer, last = self.twin.optimizer, self._ends[1]
        start = self._starting(layout, name)
        trace = self._trace(name, start, layout, save_last=True, fault=True)
        tie = find_tie(
            trace.choices,
            reference.sharp.choices,
            rounding=update_tolerance(optimizer),
            length=self.twin.training.sequence_length,
        )
        found = compare(trace, reference.sharp, optimizer=optimizer, tie=tie)
        found += self._rounded(layout, name, reference)
        # A save in one layout, a load in the other, both ways: the values themselves.
        resumed = in_layout(self.twin, layout, resume="must")
        resumed = self._resumable(resumed, last, name + "_loaded")
        loaded = self._trace(name + "_loaded", resumed, layout, steps=0, fault=True, given=True)
        found.append(compare_updates(loaded, reference.sharp, optimizer=optimizer))
        found += compare_states("saved by one rank, loaded in the layout", loaded, reference.sharp)
        back = self._resumable(
            self.twin.model_copy(
                update={"checkpoint": self.twin.checkpoint.model_copy(update={"resume": "must"})}
            ),
            self.folder / name / "checkpoints" / f"step_{STEPS:08d}",
            name + "_back",
        )
        returned = self._trace(name + "_back", back, ONE_RANK, steps=0)
        found += compare_states("saved in the layout, loaded by one rank", returned, trace)
        found += compare_packing(
            start,
            partial(self.ranks.run, f"{name}_packed"),
            self.folder / f"{name}_packed",
            prepare=self.ranks.preparation(layout=True),
        )
        if self._answers:
            here = self._rollouts(f"{name}_rollouts", layout, fault=True)
            found += compare_rollouts(here, reference.rollouts)
        return Comparison(found, tie)

    def witness(self) -> list[Verdict]:
        """The twin on one rank against transformers' class."""
        return compare_with_witness(
            self.twin,
            partial(self.ranks.run, "witness"),
            self.folder / "witness",
            prepare=self.ranks.preparation(layout=False),
        )

    def _rounded(self, layout: Layout, name: str, reference: Reference) -> list[Verdict]:
        """A step in float32, and what the optimizer takes up in bf16."""
        config = self._starting(layout, f"{name}_float32")
        once = self._trace(f"{name}_float32", config, layout, steps=1, sharp=False, fault=True)
        config = self._starting(layout, f"{name}_bf16", precision="bf16")
        loaded = self._trace(f"{name}_bf16", config, layout, steps=0, sharp=False, fault=True)
        return [*compare_float32(once, reference.float32), main_weights(loaded)]

    def _starting(self, layout: Layout, name: str, **training: object) -> RunConfig:
        """The twin in a layout and a folder of its own, with the reference's first weights."""
        config = in_layout(self.twin, layout, initial_weights=str(self._ends[0]))
        return config.model_copy(
            update={
                "output_directory": self.folder / name,
                "training": config.training.model_copy(update=training),
            }
        )

    def _resumable(self, config: RunConfig, checkpoint: Path, name: str) -> RunConfig:
        """`config` in a folder of its own whose latest checkpoint is `checkpoint`."""
        checkpoints = self.folder / name / "checkpoints"
        checkpoints.mkdir(parents=True)
        (checkpoints / checkpoint.name).symlink_to(checkpoint)
        write_whole(checkpoints / LATEST, checkpoint.name)
        return config.model_copy(update={"output_directory": self.folder / name})

    def _trace(
        self,
        name: str,
        config: RunConfig,
        layout: Layout,
        *,
        steps: int = STEPS,
        sharp: bool = True,
        save_first: bool = False,
        save_last: bool = False,
        given: bool = False,
        fault: bool = False,
    ) -> Trace:
        folder = self.folder / f"{name}_trace"
        work = partial(
            _traced,
            config=config,
            folder=folder,
            steps=steps,
            sharp=sharp,
            save_first=save_first,
            save_last=save_last,
            gradients_from=self._ends[0] if given else None,
            prepare=self.ranks.preparation(layout=fault),
        )
        self.ranks.run(name, work, layout.world_size)
        return read_trace(folder, layout.world_size)


def _traced(rank_info: RankInfo, *, prepare: Callable[[], None] | None, **arguments) -> None:
    if prepare is not None:
        prepare()
    trace_rank(rank_info, **arguments)
