"""Certifies that a run learns the same in every layout: the twin, its traces, the verdicts."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import megatron.core
import torch

import equilibrium_mcore
from equilibrium_mcore.certify.bench import Bench, Ranks
from equilibrium_mcore.certify.kernels import certify_kernels
from equilibrium_mcore.certify.twin import (
    ENGINE_RECOMPUTES,
    STEPS,
    Layout,
    check_layout,
    parse_layout,
    shrink_layout,
)
from equilibrium_mcore.certify.verdict import Verdict
from equilibrium_mcore.certify.witness import CHOICES, NAME
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.objectives import DistillationConfig
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.files.whole import write_whole
from equilibrium_mcore.parallel import process_groups
from equilibrium_mcore.parallel.host import describe_host
from equilibrium_mcore.parallel.rank_server import RankServer

TIME_LIMIT_MINUTES = 20.0  # of each phase; on 2 cores one takes seconds

NOT_CERTIFIED = {
    "layouts": (
        "NCCL, Transformer Engine, Triton and FP8 kernels: the twin runs their PyTorch references "
        "over gloo; on a GPU host --tier kernels compares the kernels with those",
        "rounding of bf16 training: the twin trains in float64, and a step of it in float32",
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
# A tie is left to chance: in another seed's numbers there is none.
SEEDS = 3


@dataclass
class Certificate:
    """The outcome for one run config."""

    run: str
    config_hash: str
    tier: str = "layouts"  # or "kernels", where the one layout is this host's device
    layouts: dict[str, list[Verdict]] = field(default_factory=dict)
    witnesses: dict[str, list[Verdict]] = field(default_factory=dict)
    seconds: float = 0.0
    ties: list[str] = field(default_factory=list)  # of routing, and what was made of them
    also_not_certified: list[str] = field(default_factory=list)  # of this run, beside the tier's

    @property
    def passed(self) -> bool:
        return not any(verdict.fails for verdicts in self._all.values() for verdict in verdicts)

    @property
    def not_certified(self) -> list[str]:
        """What the certificate says nothing about."""
        also = [*self.also_not_certified, *([CHOICES] if self.witnesses else [])]
        return [*NOT_CERTIFIED[self.tier], *also]

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
            "ties": self.ties,
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
                mark = "FAIL" if v.fails else "ok  " if v.passed else "warn"
                lines.append(
                    f"  {mark} {v.what:<{width}}  {v.difference:9.2e} "
                    f"(<= {v.tolerance:.0e})  {v.where}"
                )
        lines += self.ties
        lines.append("cannot certify:")
        lines += [f"  - {text}" for text in self.not_certified]
        failed = [v for verdicts in self._all.values() for v in verdicts if v.fails]
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
    for layout in named:
        check_layout(config, layout)
    return certify(
        config,
        each_once([*own, *named]),
        witness=witness,
        time_limit_minutes=time_limit_minutes,
        progress=progress,
    )


def each_once(layouts: Sequence[Layout]) -> list[Layout]:
    """Without those that were named before, in any wording."""
    kept: list[Layout] = []
    for layout in layouts:
        if not any(
            (layout.settings, layout.world_size) == (other.settings, other.world_size)
            for other in kept
        ):
            kept.append(layout)
    return kept


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
    when those of one phase do not end within `time_limit_minutes`; and ConfigError, before anything
    is trained, for a layout that the twin cannot have.
    """
    if witness and config.adapters is not None:
        raise ConfigError(
            "adapters with a witness: transformers' class has none, so there is nothing to compare "
            "them with; certify the run without the witness"
        )
    if witness and config.model.head != "output":
        raise ConfigError(
            f"model.head={config.model.head!r} with a witness, which is a language model: certify "
            "the run without the witness"
        )
    if witness and isinstance(config.objective, DistillationConfig):
        raise ConfigError(
            "objective.type='distillation' with a witness: its plain loop has no teacher; certify "
            "the run without the witness"
        )
    started = time.monotonic()
    certificate = Certificate(config.name, _hash(config))
    training = config.training
    if training.recompute == "selective" and ENGINE_RECOMPUTES in training.recompute_modules:
        certificate.also_not_certified.append(
            f"recomputation of {ENGINE_RECOMPUTES}, which only Transformer Engine's experts have"
        )
    with RankServer(prefix="certificate_") as server:  # before this process compares anything
        ranks = Ranks(server, prepare, everywhere, time_limit_minutes)
        for attempt in range(SEEDS):
            seed = training.seed + attempt
            changes = {"training": training.model_copy(update={"seed": seed})}
            bench = Bench(
                server.folder / f"seed_{seed}", config.model_copy(update=changes), layouts, ranks
            )
            tie = _certify_seed(bench, layouts, certificate, progress=progress)
            if tie is None:
                break
            more = attempt + 1 < SEEDS
            what_now = "certified from another seed" if more else "compared up to there"
            certificate.ties.append(f"{tie} (seed {seed}): {what_now}")
            progress(certificate.ties[-1])
        if witness:
            progress("the witness, transformers")
            certificate.witnesses[NAME] = bench.witness()
    certificate.seconds = time.monotonic() - started
    return certificate


def _certify_seed(
    bench: Bench,
    layouts: list[Layout],
    certificate: Certificate,
    *,
    progress: Callable[[str], None],
) -> str | None:
    """Fill the certificate's layouts; what a tie was, if there was one."""
    found = None
    progress("one rank, the reference")
    reference = bench.reference()
    for layout in layouts:
        progress(f"layout {layout.name}, {layout.world_size} ranks")
        verdicts, tie = bench.compare(layout, reference)
        certificate.layouts[layout.name] = verdicts
        if tie is not None and found is None:
            found = f"{layout.name}: {tie.text}"
    return found


def certify_device(
    config: RunConfig, *, progress: Callable[[str], None] = lambda text: None
) -> Certificate:
    """Certify the kernels of this host's device for `config`, in this process as one rank."""
    started = time.monotonic()
    certificate = Certificate(config.name, _hash(config), tier="kernels")
    with process_groups.one_rank(seed=config.training.seed) as groups:
        verdicts = certify_kernels(config, groups, progress=progress)
    certificate.layouts[describe_host().device_name] = verdicts
    certificate.seconds = time.monotonic() - started
    return certificate


def _hash(config: RunConfig) -> str:
    return hashlib.sha256(config.model_dump_json().encode()).hexdigest()


def write_certificate(certificate: Certificate, path: Path) -> None:
    """Write the JSON whole."""
    write_whole(path, json.dumps(certificate.as_dict(), indent=2) + "\n")
