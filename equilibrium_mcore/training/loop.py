"""The training loop. A feature joins it as a callback, not as a branch."""

from __future__ import annotations

from collections.abc import Sequence

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
