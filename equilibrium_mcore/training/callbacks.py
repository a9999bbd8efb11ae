"""What happens along a run: logging, validation, the ledger of the data, checkpoints."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.data.entropy import ngram_baseline, validation_pairs
from equilibrium_mcore.data.ledger.record import LedgerFile, settings_of
from equilibrium_mcore.models.flops import training_flops_per_token
from equilibrium_mcore.parallel.object_group import object_group
from equilibrium_mcore.processes.console import say
from equilibrium_mcore.training.anomalies import Anomaly
from equilibrium_mcore.training.loop import Callback
from equilibrium_mcore.training.metrics import (
    MetricsWriter,
    TrainRecord,
    ValidationRecord,
    memory_gib,
    perplexity_of,
)
from equilibrium_mcore.training.rollback import documents
from equilibrium_mcore.training.run_data import DATA_KINDS
from equilibrium_mcore.training.run_folder import RunLock
from equilibrium_mcore.training.setup import Run
from equilibrium_mcore.training.step import StepOutcome, validation_figures
from equilibrium_mcore.training.stopwatch import Stopwatch


class OwnerCallback(Callback):
    """Ends a run whose folder another run took over, before anything more is written there."""

    def __init__(self, lock: RunLock) -> None:
        self.lock = lock

    def on_start(self, run: Run) -> None:
        self.confirm()

    def on_step(self, run: Run, outcome: StepOutcome) -> None:
        problem = self.lock.problem(ask=False)  # of the first rank alone; the others end with it
        if problem is not None:
            raise ConfigError(problem)

    def on_end(self, run: Run, *, reason: str) -> None:
        self.confirm()

    def confirm(self) -> None:
        """Ask the file server; every rank raises ConfigError if the folder is another run's."""
        problems = [self.lock.problem(ask=True)]
        torch.distributed.broadcast_object_list(problems, src=0, group=object_group())
        if problems[0] is not None:
            raise ConfigError(problems[0])


class LogCallback(Callback):
    """Writes a line per interval, on the first rank."""

    def __init__(self, config: RunConfig) -> None:
        self.every = config.logging.interval_steps
        self.writer: MetricsWriter | None = None
        self._watch = Stopwatch()
        self._since = (0, 0)  # step, positions at the last line

    def on_start(self, run: Run) -> None:
        self._open(run)
        layout = run.config.parallelism.model_dump(exclude_defaults=True, exclude={"world_size"})
        details = {"ranks": torch.distributed.get_world_size(), **layout}
        if run.resumed_from is not None:
            details["from"] = str(run.resumed_from)
        self.event("start" if run.resumed_from is None else "resume", run, **details)
        for name, told in run.choice.notes:
            self.event(name, run, **told)

    def _open(self, run: Run) -> None:
        """Write from the run's step on: what stands after it is of steps that are trained again."""
        config = run.config
        if run.is_first_rank:
            self.writer = MetricsWriter(
                config.output_directory,
                total_steps=config.training.steps,
                resumed_step=run.progress.step if run.resumed_from is not None else None,
                tensorboard=config.logging.tensorboard,
                wandb_project=config.logging.wandb_project,
                run_name=config.logging.wandb_run_name or config.name,
                run_config=config.model_dump(mode="json"),
                console=say,
            )
        self._watch.lap()
        self._since = (run.progress.step, run.positions)

    def on_anomaly(self, run: Run, anomaly: Anomaly) -> None:
        self.event("anomaly", run, **_facts(run, anomaly))

    def on_rollback(self, run: Run, anomaly: Anomaly, *, abandoned: list[str]) -> None:
        if self.writer is not None:
            self.writer.close()
        self._open(run)
        details = {"left_out": anomaly.ranges, "to": str(run.resumed_from), "abandoned": abandoned}
        self.event("rollback", run, **_facts(run, anomaly), **details)

    def pause(self) -> contextlib.AbstractContextManager[None]:
        """Leave what is done in it out of the next rate: it is not training."""
        return self._watch.pause()

    def event(self, name: str, run: Run, **details: object) -> None:
        """Record an event, on the first rank."""
        if self.writer is not None:
            self.writer.event(name, step=run.progress.step, **details)

    def on_step(self, run: Run, outcome: StepOutcome) -> None:
        spent, progress = self._watch.lap(), run.progress
        steps, positions = progress.step - self._since[0], run.positions - self._since[1]
        self._since = (progress.step, run.positions)
        if self.writer is None:
            return
        training, peak = run.config.training, run.config.logging.peak_tflops_per_device
        rate = positions / spent.wall
        flops = training_flops_per_token(run.config.model, training.sequence_length)
        per_device = rate * flops / torch.distributed.get_world_size() / 1e12
        self.writer.write(
            TrainRecord(
                step=progress.step,
                tokens=progress.tokens,
                loss=outcome.loss,
                perplexity=_perplexity(run, outcome.loss),
                figures=_beside_loss(outcome.figures),
                aux_loss=outcome.aux_loss,
                learning_rate=outcome.learning_rates["matrix"],
                learning_rate_adamw=outcome.learning_rates["adamw"],
                gradient_norm=outcome.gradient_norm,
                tokens_per_second=rate,
                model_tflops_per_device=per_device,
                utilization=per_device / peak if peak else None,
                memory_gib=memory_gib(),
                seconds_per_step=spent.wall / steps,
                cpu_seconds_per_step=spent.cpu / steps,
            )
        )

    def on_end(self, run: Run, *, reason: str) -> None:
        self.event(reason, run)
        if self.writer is not None:
            self.writer.close()


class ValidationCallback(Callback):
    """Loss on the validation split, beside what counting n-grams would give."""

    def __init__(self, config: RunConfig, log: LogCallback) -> None:
        self.every = config.training.validation_interval_steps
        self.log = log
        self._entropies: dict[str, float] = {}

    def on_start(self, run: Run) -> None:
        if not self.every:
            return
        if run.is_first_rank:
            self._entropies = _entropies(run)
        if run.progress.step == 0:
            self._validate(run)

    def on_step(self, run: Run, outcome: StepOutcome) -> None:
        if not outcome.stop_requested:  # whoever asked for the stop waits for the save
            self._validate(run)

    def _validate(self, run: Run) -> None:
        with self.log.pause():
            figures = validation_figures(run)
            if self.log.writer is not None:
                self.log.writer.write(
                    ValidationRecord(
                        step=run.progress.step,
                        loss=figures["loss"],
                        perplexity=_perplexity(run, figures["loss"]),
                        figures=_beside_loss(figures),
                        **self._entropies,
                    )
                )


class LedgerCallback(Callback):
    """Writes `ledger.jsonl` on the first rank.

    Nothing is done for data without a ledger.
    """

    def __init__(self) -> None:
        self.file: LedgerFile | None = None

    def on_start(self, run: Run) -> None:
        state = run.stream.state().get("ledger")
        if state is None or not run.is_first_rank:
            return
        self.file = LedgerFile(
            Path(run.config.output_directory), goes_on=run.resumed_from is not None
        )
        self.file.start(
            step=run.progress.step,
            samples=run.progress.samples,
            settings=settings_of(run.config),
            state=state,
            left_out=run.left_out.as_lists(),
        )

    def on_rollback(self, run: Run, anomaly: Anomaly, *, abandoned: list[str]) -> None:
        if self.file is not None:
            self.on_start(run)

    def saved(self, run: Run, progress: dict) -> None:
        """Note the state of a checkpoint that is in place."""
        if self.file is not None:
            self.file.checkpoint(
                step=progress["step"], samples=progress["samples"], state=progress["ledger"]
            )


def _facts(run: Run, anomaly: Anomaly) -> dict[str, object]:
    """An anomaly for `metrics.jsonl`; the event's own step is the last that was trained."""
    return {
        "failed_step": anomaly.step,
        "what": anomaly.what,
        "loss": anomaly.loss,
        "gradient_norm": anomaly.gradient_norm,
        "documents": documents(run, anomaly),
    }


def _beside_loss(figures: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in figures.items() if name != "loss"}


def _perplexity(run: Run, loss: float) -> float | None:
    return perplexity_of(loss) if run.objective.has_perplexity else None


def _entropies(run: Run) -> dict[str, float]:
    """Unigram and bigram entropy of the very tokens that validation scores, where that is known."""
    if not DATA_KINDS[type(run.config.data)].has_baseline:
        return {}
    training = run.config.training
    count = training.validation_batches * training.global_batch_size
    pairs = validation_pairs(run.datasets.validation, count)
    baseline = ngram_baseline(run.config.data, pairs, vocab_size=run.config.model.vocab_size)
    return {"unigram_entropy": baseline.unigram, "bigram_entropy": baseline.bigram}
