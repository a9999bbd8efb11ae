"""Certifies that a run learns the same in every layout: the twin, its traces, the verdicts."""

from __future__ import annotations

import hashlib
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import megatron.core
import torch

import equilibrium_mcore
from equilibrium_mcore.certify.bench import Bench
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
from equilibrium_mcore.config.schema import ParallelismConfig, RunConfig
from equilibrium_mcore.files.whole import write_whole
from equilibrium_mcore.parallel import process_groups
from equilibrium_mcore.parallel.host import describe_host
from equilibrium_mcore.parallel.launch import Place

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
    seconds: float = 0.0
    ties: list[str] = field(default_factory=list)  # of routing, and what was made of them
    also_not_certified: list[str] = field(default_factory=list)  # of this run, beside the tier's

    @property
    def passed(self) -> bool:
        return not any(verdict.fails for verdicts in self.layouts.values() for verdict in verdicts)

    @property
    def not_certified(self) -> list[str]:
        """What the certificate says nothing about."""
        return [*NOT_CERTIFIED[self.tier], *self.also_not_certified]

    def as_dict(self) -> dict:
        """Plain values for JSON."""
        return {
            "run": self.run,
            "config_hash": self.config_hash,
            "tier": self.tier,
            "passed": self.passed,
            "layouts": {
                name: [
                    {
                        "what": v.what,
                        "worst_relative_difference": v.difference,
                        "tolerance": v.tolerance,
                        "where": v.where,
                        "passed": v.passed,
                        "only_warns": v.warns,
                    }
                    for v in verdicts
                ]
                for name, verdicts in self.layouts.items()
            },
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
        for name, verdicts in self.layouts.items():
            lines.append(f"layout {name}" if self.tier == "layouts" else f"device {name}")
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
        failed = [v for verdicts in self.layouts.values() for v in verdicts if v.fails]
        if failed:
            lines.append(f"NOT the same numbers: first in {failed[0].what}, at {failed[0].where}")
        else:
            lines.append(f"{AGREEMENT[self.tier]} ({self.seconds:.0f} s)")
        return "\n".join(lines)


def certify_run(
    config: RunConfig,
    *,
    tier: str,
    layouts: Sequence[str] = (),
    world_size: int | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Certificate:
    """The certificate of a tier; for `layouts`, of the run's own one and of those named.

    Raises ConfigError for a layout that cannot be.
    """
    if tier == "kernels":
        return certify_device(config, progress=progress)
    own = shrink_layout(config, world_size)
    named = [parse_layout(text, base=config.parallelism) for text in layouts]
    for layout in named:
        check_layout(config, layout)
    return certify(config, own + named, progress=progress)


def certify(
    config: RunConfig,
    layouts: list[Layout],
    *,
    prepare: Callable[[], None] | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Certificate:
    """Certify `layouts` of `config` on CPU ranks that this process forks.

    `prepare` runs in every rank of a layout, but not of the reference, before anything is built;
    tests plant faults with it. Raises RuntimeError when ranks fail, and ConfigError, before
    anything is trained, for a layout that the twin cannot have.
    """
    started = time.monotonic()
    certificate = Certificate(config.name, _hash(config))
    training = config.training
    if training.recompute == "selective" and ENGINE_RECOMPUTES in training.recompute_modules:
        certificate.also_not_certified.append(
            f"recomputation of {ENGINE_RECOMPUTES}, which only Transformer Engine's experts have"
        )
    for attempt in range(SEEDS):
        seed = training.seed + attempt
        tried = config.model_copy(update={"training": training.model_copy(update={"seed": seed})})
        tie = _certify_seed(tried, layouts, certificate, prepare=prepare, progress=progress)
        if tie is None:
            break
        what_now = "certified from another seed" if attempt + 1 < SEEDS else "compared up to there"
        certificate.ties.append(f"{tie} (seed {seed}): {what_now}")
        progress(certificate.ties[-1])
    certificate.seconds = time.monotonic() - started
    return certificate


def _certify_seed(
    config: RunConfig,
    layouts: list[Layout],
    certificate: Certificate,
    *,
    prepare: Callable[[], None] | None,
    progress: Callable[[str], None],
) -> str | None:
    """Fill the certificate's layouts; what a tie was, if there was one."""
    found = None
    with tempfile.TemporaryDirectory(prefix="certificate_") as folder:
        bench = Bench(Path(folder), config, layouts, prepare)
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
    with tempfile.TemporaryDirectory(prefix="certificate_") as folder:
        place = Place(0, 1, 0, f"file://{Path(folder) / 'rendezvous'}")
        groups = process_groups.join(place, ParallelismConfig(), seed=config.training.seed)
        try:
            verdicts = certify_kernels(config, groups, progress=progress)
        finally:
            process_groups.destroy()
    certificate.layouts[describe_host().device_name] = verdicts
    certificate.seconds = time.monotonic() - started
    return certificate


def _hash(config: RunConfig) -> str:
    return hashlib.sha256(config.model_dump_json().encode()).hexdigest()


def write_certificate(certificate: Certificate, path: Path) -> None:
    """Write the JSON, whole."""
    write_whole(path, json.dumps(certificate.as_dict(), indent=2) + "\n")
