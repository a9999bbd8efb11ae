"""The callbacks of a run, in the order in which they act after a step."""

from __future__ import annotations

from collections.abc import Callable

from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.training.callbacks import (
    LedgerCallback,
    LogCallback,
    OwnerCallback,
    ValidationCallback,
)
from equilibrium_mcore.training.loop import Callback
from equilibrium_mcore.training.run_folder import RunLock
from equilibrium_mcore.training.saving import CheckpointCallback

MoreCallbacks = Callable[[RunConfig, LogCallback], list[Callback]]


def build_callbacks(
    config: RunConfig,
    lock: RunLock | None = None,
    more: MoreCallbacks = lambda config, log: [],
) -> list[Callback]:
    """The callbacks that the config asks for, in the order in which they act after a step.

    `more` are a stage's own; they act before a checkpoint is saved.
    """
    owner = OwnerCallback(lock or RunLock(config))
    log = LogCallback(config)
    ledger = LedgerCallback()
    return [
        owner,
        log,
        ledger,
        ValidationCallback(config, log),
        *more(config, log),
        CheckpointCallback(config, log, ledger, owner),
    ]
