"""When a run saves, and what happens to a save that is being written beside training."""

from __future__ import annotations

import torch

from equilibrium_mcore.checkpoint.background import Background, InPlace, Writer
from equilibrium_mcore.checkpoint.save import (
    SaveInProgress,
    abandon_save,
    begin_save,
    bytes_of_state,
    finish_save,
)
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.parallel import accelerator
from equilibrium_mcore.training.anomalies import Anomaly
from equilibrium_mcore.training.callbacks import LedgerCallback, LogCallback, OwnerCallback
from equilibrium_mcore.training.loop import Callback
from equilibrium_mcore.training.setup import Run
from equilibrium_mcore.training.step import StepOutcome


class CheckpointCallback(Callback):
    """Saves at intervals and when the process stops; with a writer beside it, training continues.

    A save that is still being written when the next is due, or at the end, is waited for.
    """

    every = 1  # a save may end at any step

    def __init__(
        self,
        config: RunConfig,
        log: LogCallback,
        ledger: LedgerCallback | None = None,
        owner: OwnerCallback | None = None,
    ) -> None:
        self.interval = config.checkpoint.save_interval_steps
        self.log, self.ledger, self.owner = log, ledger, owner
        self._writer: Writer | None = None
        self._in_progress: SaveInProgress | None = None
        self._saved_step: int | None = None

    def on_start(self, run: Run) -> None:
        self._saved_step = run.progress.step if run.resumed_from is not None else None
        optimizers = [run.optimizer, *(role.optimizer for role in run.roles.values())]
        self._ready_writer(run.config).reserve(sum(map(bytes_of_state, optimizers)))
        if run.watch is not None and run.watch.settings.policy == "rollback":
            self._save(run)  # something to go back to, from the first step on

    def on_anomaly(self, run: Run, anomaly: Anomaly) -> None:
        if self._in_progress is None:
            return
        if run.watch.settings.policy != "rollback":
            return self._finish(run)
        if self._saved_step > run.progress.step - run.watch.settings.margin_steps:
            abandon_save(self._in_progress)
            self._in_progress = None
        else:
            self._finish(run)

    def on_rollback(self, run: Run, anomaly: Anomaly, *, abandoned: list[str]) -> None:
        self._saved_step = run.progress.step

    def on_step(self, run: Run, outcome: StepOutcome) -> None:
        if self._in_progress is not None and _everywhere(self._writer.is_done()):
            self._finish(run)
        is_last = outcome.stop_requested or run.progress.step >= run.last_step
        if self.interval and run.progress.step % self.interval == 0 or is_last:
            self._save(run)

    def on_end(self, run: Run, *, reason: str) -> None:
        self._save(run)
        self._finish(run)
        self._writer, writer = None, self._writer
        if writer is not None:
            writer.close()

    def _save(self, run: Run) -> None:
        if self._saved_step == run.progress.step:
            return
        self._finish(run)
        with self.log.pause():
            if self.owner is not None:
                self.owner.confirm()
            self._in_progress = begin_save(
                config=run.config,
                chunks=run.chunks,
                optimizer=run.optimizer,
                progress=run.progress_to_save(),
                line=run.choice.line,
                writer=self._ready_writer(run.config),
                roles=run.roles,
            )
            self._saved_step = run.progress.step
        if not run.config.checkpoint.asynchronous:
            self._finish(run)

    def _ready_writer(self, config: RunConfig) -> Writer:
        """What writes this rank's files; a process needs a while to start, so it is early."""
        if self._writer is None:
            self._writer = Background() if config.checkpoint.asynchronous else InPlace()
        return self._writer

    def _finish(self, run: Run) -> None:
        """Wait for the save that is being written, if there is one, until it is in place."""
        if self._in_progress is None:
            return
        with self.log.pause():
            if self.owner is not None:
                self.owner.confirm()
            saved, self._in_progress = finish_save(self._in_progress), None
            if saved.renamed is not None:  # a branch that the run left, or what a user put there
                self.log.event("renamed", run, checkpoint=saved.path.name, to=saved.renamed)
            if self.ledger is not None:
                self.ledger.saved(run, saved.progress)


def _everywhere(here: bool) -> bool:
    """Whether it is so on every rank. Collective."""
    flag = torch.tensor(float(here), device=accelerator.device())
    torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MIN)
    return bool(flag.item())
