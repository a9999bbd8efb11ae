"""The training loop. A feature joins it as a callback, not as a branch."""

from __future__ import annotations

from collections.abc import Sequence

from equilibrium_mcore.training import rollback
from equilibrium_mcore.training.anomalies import Anomaly
from equilibrium_mcore.training.setup import Run
from equilibrium_mcore.training.signals import StopSignals
from equilibrium_mcore.training.step import StepOutcome, train_step


class Callback:
    """Something that happens along a run. All methods are called on every rank, together."""

    every = 1  # steps between two calls of `on_step`; 0 for never

    def on_start(self, run: Run) -> None:
        """Before the first step of this process."""

    def on_step(self, run: Run, outcome: StepOutcome) -> None:
        """After every `every`-th step, and after the last."""

    def on_anomaly(self, run: Run, anomaly: Anomaly) -> None:
        """After a step that is not sound, before the run stops, goes on or goes back."""

    def on_rollback(self, run: Run, anomaly: Anomaly, *, abandoned: list[str]) -> None:
        """After the run has gone back to an earlier step, in the same process."""

    def on_end(self, run: Run, *, reason: str) -> None:
        """After the last step of this process: `end`, `stop` (stop_after_steps) or `signal`."""


def train(run: Run, callbacks: Sequence[Callback]) -> str:
    """Train to the run's last step, or until a signal asks for a stop; returns the reason."""
    with StopSignals() as signals:
        for callback in callbacks:
            callback.on_start(run)
        reason = "end" if run.progress.step >= run.config.training.steps else "stop"
        while run.progress.step < run.last_step:
            outcome = train_step(run, stop_requested=signals.received is not None)
            if outcome.anomaly is not None and _goes_back(run, outcome.anomaly, callbacks):
                continue
            is_last = outcome.stop_requested or run.progress.step >= run.last_step
            for callback in callbacks:
                if callback.every and (run.progress.step % callback.every == 0 or is_last):
                    callback.on_step(run, outcome)
            if outcome.stop_requested:
                reason = "signal"
                break
            reason = "end" if run.progress.step >= run.config.training.steps else "stop"
        for callback in reversed(callbacks):  # the log is opened first, and closed last
            callback.on_end(run, reason=reason)
    return reason


def _goes_back(run: Run, anomaly: Anomaly, callbacks: Sequence[Callback]) -> bool:
    """Do what the run's policy says; whether its step is another now. Collective.

    Raises AnomalyError where the run stops.
    """
    for callback in callbacks:
        callback.on_anomaly(run, anomaly)
    policy = run.watch.settings.policy
    if policy == "stop" or rollback.too_many(run):
        raise rollback.stop(run, anomaly)
    if policy == "skip":
        return False
    abandoned = rollback.go_back(run, anomaly)
    for callback in callbacks:
        callback.on_rollback(run, anomaly, abandoned=abandoned)
    return True
