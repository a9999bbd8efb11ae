"""The callbacks of a run, in the order in which they act after a step."""

from __future__ import annotations

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


def build_callbacks(config: RunConfig, lock: RunLock | None = None) -> list[Callback]:
    """The callbacks that the config asks for, in the order in which they act after a step."""
    owner = OwnerCallback(lock or RunLock(config))
    log = LogCallback(config)
    ledger = LedgerCallback()
    return [
        owner,
        log,
        ledger,
        ValidationCallback(config, log),
        CheckpointCallback(config, log, ledger, owner),
    ]
