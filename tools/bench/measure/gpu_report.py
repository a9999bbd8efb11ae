"""What `gpu.py` found, as values and as a Markdown table for `docs/reference/performance.md`."""

from __future__ import annotations

import platform
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version

import torch

from equilibrium_mcore.files.tables import markdown_table

PACKAGES = ("megatron-core", "transformer-engine", "mamba-ssm", "causal-conv1d", "triton")
TRAINING_COLUMNS = (
    "case",
    "precision",
    "model, blocks",
    "sequence",
    "micro batch",
    "sequences/step",
    "tokens/s",
    "model TFLOP/s",
    "of roof",
    "optimizer",
    "Muon",
    "peak memory",
    "loss",
)


@dataclass(frozen=True)
class Roofs:
    """The best that this device did on plain work."""

    bf16_tflops: float  # a large square product, operands bfloat16, sums float32
    fp8_tflops: float | None  # the same with float8_e4m3 operands; None where it cannot
    copy_gb_per_second: float  # device to device, bytes read and bytes written counted


@dataclass(frozen=True)
class TrainingFigures:
    """Medians over the measured steps."""

    precision: str
    model: str
    micro_batch_size: int
    sequence_length: int
    sequences_per_step: int
    measured_steps: int
    seconds_per_step: float
    tokens_per_second: float
    model_tflops: float
    share_of_roof: float  # of the measured roof of the same precision
    optimizer_share: float  # of the time of a step
    muon_share: float  # of the time of a step: momentum and Newton-Schulz
    peak_memory_gib: float
    first_loss: float
    last_loss: float
    case: str = ""
    blocks: str = ""  # kept of all, e.g. "24 of 24"
    estimated_memory_gib: float = 0.0


@dataclass
class Report:
    """Everything that a call measured."""

    device: str
    versions: dict[str, str]
    roofs: Roofs
    training: list[TrainingFigures] = field(default_factory=list)
    not_run: dict[str, str] = field(default_factory=dict)  # part -> reason

    def as_dict(self) -> dict:
        """Plain values, for JSON."""
        return asdict(self)


def versions() -> dict[str, str]:
    """Versions of what the figures depend on; packages that are not here are left out."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    if torch.version.cuda and torch.backends.cuda.is_built():
        found["cuda"] = torch.version.cuda
    return found


def markdown(report: Report) -> str:
    """The tables of `docs/reference/performance.md`, filled."""
    roofs = report.roofs
    fp8 = "-" if roofs.fp8_tflops is None else f"{roofs.fp8_tflops:,.4g} TFLOP/s"
    lines = [
        f"Device: {report.device}. "
        + ", ".join(f"{name} {number}" for name, number in report.versions.items())
        + ".",
        "",
        markdown_table(
            ("roof", "measured"),
            [
                ("matrix product, bf16", f"{roofs.bf16_tflops:,.4g} TFLOP/s"),
                ("matrix product, fp8", fp8),
                ("copy, read + written", f"{roofs.copy_gb_per_second:,.4g} GB/s"),
            ],
            align="lr",
        ),
    ]
    if not report.training and not report.not_run:
        return "\n".join(lines)
    rows = [_row(figures) for figures in report.training]
    rows += [[case, "", f"not run: {why}", *"-" * 10] for case, why in report.not_run.items()]
    return "\n".join([*lines, "", markdown_table(TRAINING_COLUMNS, rows, align="lllrrrrrrrrrl")])


def _row(f: TrainingFigures) -> list[str]:
    return [
        f.case,
        f.precision,
        f"{f.model}, {f.blocks}",
        str(f.sequence_length),
        str(f.micro_batch_size),
        str(f.sequences_per_step),
        f"{f.tokens_per_second:,.0f}",
        f"{f.model_tflops:,.4g}",
        f"{f.share_of_roof:.1%}",
        f"{f.optimizer_share:.1%}",
        f"{f.muon_share:.1%}",
        f"{f.peak_memory_gib:.1f} GiB",
        f"{f.first_loss:.3f} to {f.last_loss:.3f}",
    ]
