"""Certifies that a run learns the same in every layout: the twin, its traces, the verdicts."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import megatron.core
import torch

import equilibrium_mcore
from equilibrium_mcore.certify.compare import (
    Verdict,
    compare,
    compare_states,
    compare_updates,
    main_weights,
)
from equilibrium_mcore.certify.kernels import certify_kernels
from equilibrium_mcore.certify.packing import compare_packing
from equilibrium_mcore.certify.trace import Trace, read_trace, trace_rank
from equilibrium_mcore.certify.twin import (
    STEPS,
    Layout,
    in_layout,
    make_twin,
    parse_layout,
    shrink_layout,
)
from equilibrium_mcore.certify.witness import CHOICES, NAME, compare_with_witness
from equilibrium_mcore.config.schema import ParallelismConfig, RunConfig
from equilibrium_mcore.files.whole import write_whole
from equilibrium_mcore.parallel import process_groups
from equilibrium_mcore.parallel.host import describe_host
from equilibrium_mcore.parallel.rank_job import Place, TimeLimit
from equilibrium_mcore.parallel.rank_server import RankServer

TIME_LIMIT_MINUTES = 20.0  # of each phase; on 2 cores one takes seconds

NOT_CERTIFIED = {
    "layouts": (
        "NCCL, Transformer Engine, Triton and FP8 kernels: the twin runs their PyTorch references "
        "over gloo; on a GPU host --tier kernels compares the kernels with those",
        "rounding of bf16 training: the twin trains in float32",
        "activation recomputation, which the twin leaves out",
    ),
    "kernels": (
        "layouts, which --tier layouts certifies, and NCCL between devices",
        "whole models, where rounding flips a choice of experts now and then: tests/gpu",
    ),
}
AGREEMENT = {
    "layouts": "the same numbers in every layout",
    "kernels": "the kernels of this host agree with PyTorch's reference",
}


@dataclass
class Certificate:
    """The outcome for one run config."""

    run: str
    config_hash: str
    tier: str = "layouts"  # or "kernels", where the one layout is this host's device
    layouts: dict[str, list[Verdict]] = field(default_factory=dict)
    witnesses: dict[str, list[Verdict]] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def passed(self) -> bool:
        return all(verdict.passed for verdicts in self._all.values() for verdict in verdicts)

    @property
    def not_certified(self) -> list[str]:
        return [*NOT_CERTIFIED[self.tier], *([CHOICES] if self.witnesses else [])]

    @property
    def _all(self) -> dict[str, list[Verdict]]:
        """Verdicts by the line that stands above them."""
        kind = "layout" if self.tier == "layouts" else "device"
        return {f"{kind} {name}": found for name, found in self.layouts.items()} | self.witnesses

    def as_dict(self) -> dict:
        """Plain values for JSON."""
        return {
            "run": self.run,
            "config_hash": self.config_hash,
            "tier": self.tier,
            "passed": self.passed,
            "layouts": {name: _plain(found) for name, found in self.layouts.items()},
            "witnesses": {name: _plain(found) for name, found in self.witnesses.items()},
            "not_certified": self.not_certified,
            "steps": STEPS,
            "seconds": round(self.seconds, 1),
            "versions": {
                "equilibrium_mcore": equilibrium_mcore.__version__,
                "megatron-core": megatron.core.__version__,
                "torch": torch.__version__,
            },
        }

    def table(self) -> str:
        """What, worst relative difference, where, verdict: one line each."""
        lines = []
        for name, verdicts in self._all.items():
            lines.append(name)
            width = max(len(v.what) for v in verdicts)
            for v in verdicts:
                mark = "ok  " if v.passed else "FAIL"
                lines.append(
                    f"  {mark} {v.what:<{width}}  {v.difference:9.2e} "
                    f"(<= {v.tolerance:.0e})  {v.where}"
                )
        lines.append("cannot certify:")
        lines += [f"  - {text}" for text in self.not_certified]
        failed = [v for verdicts in self._all.values() for v in verdicts if not v.passed]
        if failed:
            lines.append(f"NOT the same numbers: first in {failed[0].what}, at {failed[0].where}")
        else:
            lines.append(f"{AGREEMENT[self.tier]} ({self.seconds:.0f} s)")
        return "\n".join(lines)


def _plain(verdicts: list[Verdict]) -> list[dict]:
    return [
        {
            "what": v.what,
            "worst_relative_difference": v.difference,
            "tolerance": v.tolerance,
            "where": v.where,
            "passed": v.passed,
        }
        for v in verdicts
    ]


def certify_run(
    config: RunConfig,
    *,
    tier: str,
    layouts: Sequence[str] = (),
    witness: bool = False,
    world_size: int | None = None,
    time_limit_minutes: float = TIME_LIMIT_MINUTES,
    progress: Callable[[str], None] = lambda text: None,
) -> Certificate:
    """The certificate of a tier; for `layouts`, of the run's own one and of those named.

    Raises ConfigError for a layout that cannot be, and what `certify` raises.
    """
    if tier == "kernels":
        return certify_device(config, progress=progress)
    own = shrink_layout(config, world_size)
    named = [parse_layout(text, base=config.parallelism) for text in layouts]
    return certify(
        config,
        own + named,
        witness=witness,
        time_limit_minutes=time_limit_minutes,
        progress=progress,
    )


def certify(
    config: RunConfig,
    layouts: list[Layout],
    *,
    prepare: Callable[[], None] | None = None,
    time_limit_minutes: float = TIME_LIMIT_MINUTES,
    everywhere: bool = False,
    witness: bool = False,
    progress: Callable[[str], None] = lambda text: None,
) -> Certificate:
    """Certify `layouts` of `config` on CPU ranks that a helper process forks.

    `prepare` runs in every rank of a layout before anything is built, and only with `everywhere` in
    those of the reference and the witness; tests plant faults with it. With `witness` the twin is
    compared with transformers' class too. Raises RankError when ranks fail, and with their stacks
    when those of one phase do not end within `time_limit_minutes`.
    """
    started = time.monotonic()
    certificate = Certificate(config.name, _hash(config))
    with RankServer(prefix="certificate_") as server:  # before this process compares anything
        bench = _Bench(server, config, layouts, prepare, everywhere, time_limit_minutes)
        progress("one rank, the reference")
        reference = bench.reference()
        for layout in layouts:
            progress(f"layout {layout.name}, {layout.world_size} ranks")
            certificate.layouts[layout.name] = bench.verdicts(layout, reference)
        if witness:
            progress("the witness, transformers")
            certificate.witnesses[NAME] = bench.witness()
    certificate.seconds = time.monotonic() - started
    return certificate


def certify_device(
    config: RunConfig, *, progress: Callable[[str], None] = lambda text: None
) -> Certificate:
    """Certify the kernels of this host's device for `config`, in this process as one rank."""
    started = time.monotonic()
    certificate = Certificate(config.name, _hash(config), tier="kernels")
    groups = process_groups.join(Place.alone(), ParallelismConfig(), seed=config.training.seed)
    try:
        verdicts = certify_kernels(config, groups, progress=progress)
    finally:
        process_groups.destroy()
    certificate.layouts[describe_host().device_name] = verdicts
    certificate.seconds = time.monotonic() - started
    return certificate


def _hash(config: RunConfig) -> str:
    return hashlib.sha256(config.model_dump_json().encode()).hexdigest()


class _Bench:
    """Runs the twin in its layouts, with checkpoints passed between them."""

    def __init__(
        self,
        server: RankServer,
        config: RunConfig,
        layouts: list[Layout],
        prepare: Callable[[], None] | None,
        everywhere: bool,
        limit_minutes: float,
    ) -> None:
        self.folder, self.prepare, self.everywhere = server.folder, prepare, everywhere
        self._server, self._limit_minutes = server, limit_minutes
        folder = self.folder
        self.twin = make_twin(config, layouts, folder=folder / "reference")
        checkpoints = folder / "reference" / "checkpoints"
        self._ends = checkpoints / "step_00000000", checkpoints / f"step_{STEPS:08d}"

    def reference(self) -> Trace:
        one = Layout("one rank", {}, 1)
        trace = self._trace("reference", self.twin, one, save_first=True, save_last=True)
        restart = self.twin.model_copy(update={"output_directory": self.folder / "updates"})
        trace.update = self._trace("updates", restart, one, steps=0, given=True).update
        return trace

    def verdicts(self, layout: Layout, reference: Trace) -> list[Verdict]:
        name = layout.name.replace(",", "_").replace("=", "")
        first, last = self._ends
        start = in_layout(self.twin, layout, initial_weights=str(first))
        start = start.model_copy(update={"output_directory": self.folder / name})
        trace = self._trace(name, start, layout, save_last=True, fault=True)
        found = compare(trace, reference, optimizer=self.twin.optimizer)
        sharp = start.model_copy(
            update={
                "training": start.training.model_copy(update={"precision": "bf16"}),
                "output_directory": self.folder / f"{name}_bf16",
            }
        )
        found.append(main_weights(self._trace(f"{name}_bf16", sharp, layout, steps=0, fault=True)))
        # A save in one layout, a load in the other, both ways: the values themselves.
        resumed = in_layout(self.twin, layout, resume="must")
        resumed = self._resumable(resumed, last, name + "_loaded")
        loaded = self._trace(name + "_loaded", resumed, layout, steps=0, fault=True, given=True)
        found.append(compare_updates(loaded, reference, optimizer=self.twin.optimizer))
        found += compare_states("saved by one rank, loaded in the layout", loaded, reference)
        back = self._resumable(
            self.twin.model_copy(
                update={"checkpoint": self.twin.checkpoint.model_copy(update={"resume": "must"})}
            ),
            self.folder / name / "checkpoints" / f"step_{STEPS:08d}",
            name + "_back",
        )
        one = Layout("one rank", {}, 1)
        returned = self._trace(name + "_back", back, one, steps=0)
        found += compare_states("saved in the layout, loaded by one rank", returned, trace)
        found += compare_packing(
            start,
            partial(self._ranks, f"{name}_packed"),
            self.folder / f"{name}_packed",
            prepare=self.prepare,
        )
        return found

    def witness(self) -> list[Verdict]:
        return compare_with_witness(
            self.twin,
            partial(self._ranks, "witness"),
            self.folder / "witness",
            prepare=self.prepare if self.everywhere else None,
        )

    def _resumable(self, config: RunConfig, checkpoint: Path, name: str) -> RunConfig:
        """`config` in a folder of its own whose latest checkpoint is `checkpoint`."""
        checkpoints = self.folder / name / "checkpoints"
        checkpoints.mkdir(parents=True)
        (checkpoints / checkpoint.name).symlink_to(checkpoint)
        (checkpoints / "latest").write_text(checkpoint.name)
        return config.model_copy(update={"output_directory": self.folder / name})

    def _trace(
        self,
        name: str,
        config: RunConfig,
        layout: Layout,
        *,
        steps: int = STEPS,
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
            save_first=save_first,
            save_last=save_last,
            gradients_from=self._ends[0] if given else None,
            prepare=self.prepare if fault or self.everywhere else None,
        )
        self._ranks(name, work, layout.world_size)
        return read_trace(folder, layout.world_size)

    def _ranks(self, phase: str, work: Callable[[Place], None], world_size: int) -> None:
        limit = TimeLimit(
            minutes=self._limit_minutes,
            phase=f"certificate, {phase} on {world_size} ranks",
            raised_by="--time-limit MINUTES",
        )
        self._server.run(world_size, work, limit=limit)


def _traced(place: Place, *, prepare: Callable[[], None] | None, **arguments) -> None:
    if prepare is not None:
        prepare()
    trace_rank(place, **arguments)


def write_certificate(certificate: Certificate, path: Path) -> None:
    """Write it as JSON, whole."""
    write_whole(path, json.dumps(certificate.as_dict(), indent=2) + "\n")
