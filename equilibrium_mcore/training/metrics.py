"""What a run measures, and where it is written: console, `metrics.jsonl`, TensorBoard, W&B.

`metrics.jsonl` in the run's directory is the record that everything else reads: one JSON object
per line, distinguished by `kind`: `train`, `validation`, `evaluation` or `event`. A number that is
not finite, or not known, is null there. Only one rank makes a `MetricsWriter`.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, get_args

from equilibrium_mcore.config.installation import command
from equilibrium_mcore.files.archive import move_to_archive
from equilibrium_mcore.files.json_lines import JsonLinesLog, json_line, read_log
from equilibrium_mcore.files.whole import write_whole

METRICS_FILE = "metrics.jsonl"
EventName = Literal[
    "start",
    "resume",
    "stop",
    "signal",
    "end",
    # of checkpoints: docs/reference/checkpoints.md
    "verified",
    "unverified",
    "damaged",
    "latest_lost",
    "left_alone",
    "renamed",
    # of settings that differ from those that the checkpoint or the weights were saved under
    "settings_changed",
    "vocabulary_grown",
    "anomaly",
    "rollback",
]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class TrainRecord:
    """One interval of training; rates are means over the steps since the last record."""

    kind: ClassVar[str] = "train"
    step: int
    tokens: int
    """Tokens since the start of the run, over all ranks."""
    loss: float
    """Mean cross-entropy per token, in nats."""
    perplexity: float | None = None
    """`perplexity_of(loss)`; None where the objective's loss has none."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """What else the objective logs, by name; beside `loss` in the file, not inside `figures`."""
    aux_loss: float | None = None
    """Load-balancing loss; None where no loss balances experts."""
    learning_rate: float
    """Of the weight matrices."""
    learning_rate_adamw: float
    """Of everything else, its default kind."""
    gradient_norm: float
    """Before clipping."""
    tokens_per_second: float
    """Over all ranks."""
    model_tflops_per_device: float
    """Model FLOPs (`models.flops`), in TFLOP/s per device."""
    utilization: float | None = None
    """Share of the device's peak, 0 to 1; None when the peak is not configured."""
    memory_gib: float
    """`memory_gib()` of the writing rank."""
    seconds_per_step: float
    cpu_seconds_per_step: float | None = None
    """CPU time of the writing rank's process, all its threads; None in records of before."""


@dataclass(frozen=True, kw_only=True)
class ValidationRecord:
    """One validation; entropies are of the same tokens under counts of the training split."""

    kind: ClassVar[str] = "validation"
    step: int
    loss: float
    """Mean cross-entropy per token, in nats; the entropies are in nats too."""
    perplexity: float | None = None
    """As of a training record."""
    figures: Mapping[str, float] = field(default_factory=dict)
    """As of a training record."""
    unigram_entropy: float | None = None
    bigram_entropy: float | None = None


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord:
    """Held-out prompts that the policy answered."""

    kind: ClassVar[str] = "evaluation"
    step: int
    figures: Mapping[str, float] = field(default_factory=dict)
    """As of a training record; `accuracy` is that of greedy answers."""


@dataclass(frozen=True, kw_only=True)
class EventRecord:
    """Something that happened to the run after `step` steps."""

    kind: ClassVar[str] = "event"
    event: EventName
    step: int
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.event not in get_args(EventName):
            raise ValueError(
                f"event={self.event!r} must be one of {', '.join(get_args(EventName))}"
            )


Record = TrainRecord | ValidationRecord | EvaluationRecord | EventRecord


def perplexity_of(loss: float) -> float | None:
    """exp(loss) of a mean cross-entropy in nats per token; None where it is no finite number."""
    try:
        perplexity = math.exp(loss)
    except OverflowError:  # beyond a loss of 709.78
        return None
    return perplexity if math.isfinite(perplexity) else None


def record_values(record: Record) -> dict[str, Any]:
    """A line of `metrics.jsonl` as plain values; numbers that are not finite are None."""
    return _finite({"kind": record.kind, **_values(record)})


def _values(record: Record) -> dict[str, Any]:
    """The record's fields by name, and the objective's figures as if they were fields.

    Raises ValueError for a figure that has the name of a field.
    """
    values = dataclasses.asdict(record)
    figures = values.pop("figures", {})
    twice = sorted(values.keys() & figures.keys())
    if twice:
        raise ValueError(f"figures {', '.join(twice)}: {record.kind} records have these names")
    return values | figures


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, in order.

    A last line cut short (the run was killed while writing, or is writing now) is left out. A
    broken line before the last raises ValueError; a missing file FileNotFoundError.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(
            f"{path} does not exist. Training writes it: "
            f"{command('run')} RUN.yaml puts it into the run's output_directory"
        )
    return list(read_log(path, keys=("kind", "step")))


# ------------------------------------------------------------------------------- for the terminal


def format_record(record: Record, *, total_steps: int) -> str:
    """The console line of a record; numbers are padded, so that lines below each other align."""
    width = len(str(total_steps))
    start = f"step {record.step:>{width}}/{total_steps}"
    if isinstance(record, EventRecord):
        details = ", ".join(f"{key} {value}" for key, value in record.details.items())
        return f"{start} | {record.event}" + (f": {details}" if details else "")
    if isinstance(record, EvaluationRecord):
        parts = [f"{name} {value:.3f}" for name, value in record.figures.items()]
        return " | ".join([f"{start} | evaluation", *parts])
    if isinstance(record, ValidationRecord):
        parts = [f"validation loss {record.loss:.3f}"]
        if record.perplexity is not None:
            parts.append(f"perplexity {record.perplexity:,.2f}")
        for name in ("unigram_entropy", "bigram_entropy"):
            value = getattr(record, name)
            if value is not None:
                parts.append(f"{name.replace('_', ' ')} {value:.3f}")
        parts += [f"{name} {value:.3f}" for name, value in record.figures.items()]
        return " | ".join([start, *parts])
    parts = [start, f"tokens {human(record.tokens):>5}", f"loss {record.loss:6.3f}"]
    if record.aux_loss is not None:
        parts.append(f"aux {record.aux_loss:.3f}")
    parts += [f"{name} {value:.3f}" for name, value in record.figures.items()]
    parts += [
        f"lr {record.learning_rate:.1e}",
        f"grad {record.gradient_norm:6.2f}",
        f"{human(record.tokens_per_second):>5} tok/s",
        f"{_tflops(record.model_tflops_per_device):>5} TFLOP/s",
    ]
    if record.utilization is not None:
        parts.append(f"{record.utilization:5.1%}")
    return " | ".join([*parts, f"{record.memory_gib:4.1f} GiB"])


def human(count: float) -> str:
    """A count in at most five characters: 950, 5.1k, 32.8k, 1.2M, 120M, 1.3B, 2.5T."""
    for unit in ("", "k", "M", "B", "T"):
        # 999.5 would be shown as 1000, so it belongs to the next unit.
        if abs(count) < 999.5 or unit == "T":
            break
        count /= 1000
    return f"{count:.1f}{unit}" if unit and abs(count) < 99.95 else f"{count:.0f}{unit}"


def _tflops(value: float) -> str:
    """Three decimals on a laptop, none on a GPU."""
    return f"{value:.3f}" if value < 1 else f"{value:.1f}" if value < 100 else f"{value:.0f}"


def memory_gib() -> float:
    """Peak memory of this rank so far in GiB: its GPU's, or without one the process's resident."""
    # Here, because it imports torch, for which reading and plotting metrics need not wait.
    from equilibrium_mcore.parallel import accelerator

    return accelerator.memory_gib()


# ------------------------------------------------------------------------------------- the writers


class JsonlWriter:
    """Appends records to `metrics.jsonl`."""

    def __init__(self, path: Path, *, resumed_step: int | None = None) -> None:
        """Open `path`: for a run that starts (None), or one that resumes after `resumed_step`.

        Going on keeps the records up to that step and drops later ones, which are trained again:
        the file has each step once. A start moves an older file to the folder's archive.
        """
        self.path = path
        self.dropped_records = 0
        if path.exists():
            if resumed_step is None:
                move_to_archive(path.parent, [path.name])
            else:
                self._drop_after(resumed_step)
        self._log = JsonLinesLog(path)

    def _drop_after(self, step: int) -> None:
        broken: list[str] = []
        records = list(read_log(self.path, keys=("kind", "step"), broken=broken.append))
        if broken:  # whatever wrote it, a line that cannot be read is kept, and stops nothing
            kept_in = move_to_archive(self.path.parent, [self.path.name])
            logger.warning("%s; left out, and the file kept in %s", broken[0], kept_in)
        kept = [record for record in records if record["step"] <= step]
        self.dropped_records = len(records) - len(kept)
        # Rewritten even when nothing is dropped: a line cut short would spoil the next one.
        write_whole(self.path, b"".join(json_line(r, ascii_only=True) for r in kept))

    def write(self, record: Record) -> None:
        """Append the record; it is in the file, whole, when this returns."""
        self._log.append(record_values(record))

    def close(self) -> None:
        """Close the file."""
        self._log.close()


class TensorBoardWriter:
    """Writes the numbers of records as TensorBoard events under `train/` and `validation/`."""

    def __init__(self, directory: Path, *, resumed_step: int | None = None) -> None:
        """Write below `directory`; events beyond `resumed_step` are hidden by TensorBoard."""
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ImportError(
                "logging.tensorboard=true needs the package tensorboard: "
                f"pip install tensorboard, or set logging.tensorboard=false ({error})"
            ) from error
        purge_step = None if resumed_step is None else resumed_step + 1
        self._writer = SummaryWriter(str(directory), purge_step=purge_step)

    def write(self, record: Record) -> None:
        """Add the record's numbers, or an event's text, at its step."""
        if isinstance(record, EventRecord):
            self._writer.add_text("event", json.dumps(record_values(record)), record.step)
        for name, value in _numbers(record).items():
            self._writer.add_scalar(name, value, record.step)
        self._writer.flush()

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()


class WandbWriter:
    """Logs the numbers of records to a Weights & Biases project."""

    def __init__(
        self,
        directory: Path,
        *,
        project: str,
        run_name: str,
        run_config: Mapping[str, Any],
        resumed_step: int | None = None,
    ) -> None:
        """Start the run, or resume the one whose id lies in `directory/wandb_run_id`."""
        try:
            import wandb
        except ImportError as error:
            raise ImportError(
                f"logging.wandb_project={project} needs the package wandb: pip install wandb, "
                f"or set logging.wandb_project=null ({error})"
            ) from error
        directory.mkdir(parents=True, exist_ok=True)
        id_file = directory / "wandb_run_id"
        if resumed_step is None or not id_file.exists():
            write_whole(id_file, uuid.uuid4().hex)
        self._run = wandb.init(
            project=project,
            name=run_name,
            id=id_file.read_text(encoding="utf-8").strip(),
            resume="allow",
            config=dict(run_config),
            dir=str(directory),
        )
        # W&B refuses steps that go back, as they do after a resume; so `step` is a metric.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")

    def write(self, record: Record) -> None:
        """Log the record's numbers with its step; of events, the name."""
        numbers: dict[str, Any] = _numbers(record)
        if isinstance(record, EventRecord):
            numbers["event"] = record.event
        self._run.log({"step": record.step, **numbers})

    def close(self) -> None:
        """End the run's upload."""
        self._run.finish()


def _numbers(record: Record) -> dict[str, float]:
    """The record's numbers by their full name, e.g. `train/loss`; none for an event."""
    if isinstance(record, EventRecord):
        return {}
    return {
        f"{record.kind}/{name}": value
        for name, value in _values(record).items()
        if name != "step" and value is not None
    }


class MetricsWriter:
    """Sends each record to the console and to every place that was asked for.

    Make it on one rank, after the checkpoint to resume from is known. It is a context manager.
    """

    def __init__(
        self,
        run_directory: Path,
        *,
        total_steps: int,
        resumed_step: int | None = None,
        tensorboard: bool = True,
        wandb_project: str | None = None,
        run_name: str = "run",
        run_config: Mapping[str, Any] | None = None,
        console: Callable[[str], None] = logger.info,
    ) -> None:
        """Open the writers; `resumed_step` is None for a run from the start."""
        run_directory = Path(run_directory)
        self._total_steps = total_steps
        self._console = console
        self._jsonl = JsonlWriter(run_directory / METRICS_FILE, resumed_step=resumed_step)
        self._writers: list[JsonlWriter | TensorBoardWriter | WandbWriter] = [self._jsonl]
        if tensorboard:
            directory = run_directory / "tensorboard"
            self._writers.append(TensorBoardWriter(directory, resumed_step=resumed_step))
        if wandb_project:
            self._writers.append(
                WandbWriter(
                    run_directory,
                    project=wandb_project,
                    run_name=run_name,
                    run_config=run_config or {},
                    resumed_step=resumed_step,
                )
            )

    @property
    def dropped_records(self) -> int:
        """Records of the last attempt beyond the resumed step, dropped from `metrics.jsonl`."""
        return self._jsonl.dropped_records

    def write(self, record: Record) -> None:
        """Write a record everywhere."""
        self._console(format_record(record, total_steps=self._total_steps))
        for writer in self._writers:
            writer.write(record)

    def event(self, event: EventName, *, step: int, **details: Any) -> None:
        """Write that something happened: `event("stop", step=200, reason="SIGTERM")`."""
        self.write(EventRecord(event=event, step=step, details=details))

    def close(self) -> None:
        """Close every writer."""
        for writer in self._writers:
            writer.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
