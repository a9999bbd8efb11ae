"""A run's output directory: it can be written, has one owner at a time, and loses nothing.

Rank 0 asks, before data and model are built. The lock is released when the process ends; after a
kill it is taken over (`files/lock.py`).
"""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Iterator
from pathlib import Path

from equilibrium_mcore.checkpoint.directory import CONFIG_FILE, list_checkpoints
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.files.archive import ARCHIVE, move_to_archive
from equilibrium_mcore.files.lock import FileLock
from equilibrium_mcore.files.lock_file import (
    SILENT_SECONDS,
    LockHeldError,
    LockLostError,
    look,
    refuse_if_held,
)
from equilibrium_mcore.files.named import open_named
from equilibrium_mcore.files.owner import Owner
from equilibrium_mcore.files.paths import real_path
from equilibrium_mcore.files.whole import sync_stream
from equilibrium_mcore.processes.console import say

LOCK_FILE = "run.lock"
PROBE_BYTES = 1 << 20  # a full disk or quota often has room for an empty file
CHECKPOINTS = "checkpoints"
RECORDS = (  # what a run writes beside its checkpoints; the first two say that one trained
    "metrics.jsonl",
    "ledger.jsonl",
    "metrics.previous.jsonl",  # of versions before
    "ledger.previous.jsonl",
    "tensorboard",
    "wandb_run_id",
    "wandb",
    CONFIG_FILE,
)
_WRITABLE = "checkpoints, logs and the config of the run are written there"
_ELSEWHERE = "choose another output_directory"


def check_run_folder(config: RunConfig) -> None:
    """Make and probe the output directory, and see whether the run may have it.

    In seconds, and nothing but the folder stays. Raises ConfigError where the folder cannot be
    made or written, where another run works in it, and where a run from scratch would find an
    earlier run there.
    """
    _make_and_probe(config.output_directory)
    _refuse_owned(config)
    _refuse_used(config)


def look_at_run_folder(config: RunConfig) -> None:
    """What `check_run_folder` can say without making the folder. Raises ConfigError."""
    folder = config.output_directory.absolute()
    if os.path.lexists(folder):  # a link that leads nowhere is there, too
        place = folder
    else:
        place = next(parent for parent in folder.parents if os.path.lexists(parent))
    if not place.is_dir() or not os.access(place, os.W_OK | os.X_OK):
        what = "no permission to write there" if place.is_dir() else "no folder"
        raise ConfigError(
            f"output_directory={str(config.output_directory)!r}: cannot be {_doing(folder)}: "
            f"{what} ({place}). {_WRITABLE.capitalize()}: {_ELSEWHERE}"
        )
    if folder.exists():
        _refuse_owned(config)
        _refuse_used(config)


def _refuse_owned(config: RunConfig) -> None:
    folder = config.output_directory
    found = look(folder / LOCK_FILE)
    if found is not None:
        try:
            refuse_if_held(folder / LOCK_FILE, found, Owner.of_this_process(config.name))
        except LockHeldError as error:
            raise _held(folder, error) from None


@contextlib.contextmanager
def owned_run_folder(config: RunConfig, *, is_first_rank: bool) -> Iterator[RunLock]:
    """While it is open, the output directory is this run's. Ranks but the first hold nothing.

    What an earlier run left is moved to the archive if the run starts from scratch. Raises
    ConfigError as `check_run_folder` does.
    """
    if not is_first_rank:
        yield RunLock(config)
        return
    check_run_folder(config)
    lock = FileLock(config.output_directory / LOCK_FILE, config.name)
    try:
        before = lock.acquire()
    except LockHeldError as error:
        raise _held(config.output_directory, error) from None
    try:
        if before is not None:
            say(f"{config.output_directory}: taken over from {before}")
        _archive(config)
        yield RunLock(config, lock)
    finally:
        lock.release()


class RunLock:
    """The lock of a run's folder, for the callbacks of its ranks; only the first holds one."""

    def __init__(self, config: RunConfig, lock: FileLock | None = None) -> None:
        self.folder = config.output_directory
        self.lock = lock

    def problem(self, *, ask: bool) -> str | None:
        """What is wrong if another run has taken the folder over, else None.

        Without `ask`, only what the last heartbeat found is reported: that costs nothing.
        """
        if self.lock is None:
            return None
        if ask:
            with contextlib.suppress(LockLostError):
                self.lock.confirm()
        if self.lock.lost is None:
            return None
        owner = self.lock.lost.owner or "another run"
        return (
            f"output_directory={str(self.folder)!r}: taken over by {owner}, since this run gave no "
            f"sign of life for {SILENT_SECONDS:.0f} s. It stops here and writes no more; what it "
            f"saved before is there. Stop the other run first if this one should continue"
        )


# --------------------------------------------------------------------------------- the inside


def _make_and_probe(folder: Path) -> None:
    probe = folder / f".probe.{secrets.token_hex(4)}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        try:
            with open_named(probe, "xb") as stream:  # not whole: it is removed at once
                stream.write(bytes(PROBE_BYTES))
                sync_stream(stream)
        finally:
            probe.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(
            f"output_directory={str(folder)!r}: cannot be {_doing(folder)}: {error.strerror} "
            f"({error.filename or probe}). {_WRITABLE.capitalize()}: {_ELSEWHERE}, or make room "
            "and give write permission there"
        ) from None


def _doing(folder: Path) -> str:
    return "written" if os.path.isdir(folder) else "made"


def _held(folder: Path, error: LockHeldError) -> ConfigError:
    owner, age = error.owner, max(0.0, error.age_seconds)
    who = owner or "one that has not written who it is"
    if owner is not None and owner.is_alive_here():
        way_out = f"Stop it (kill {owner.pid}) or wait for its end"
    else:
        way_out = (
            f"Stop it or wait for its end; if you know that it is dead, the folder is free "
            f"{SILENT_SECONDS:.0f} s after its last heartbeat (in {SILENT_SECONDS - age:.0f} s), "
            f"or at once when you remove {error.path}"
        )
    return ConfigError(
        f"output_directory={str(folder)!r}: another run works in it: {who}, last heartbeat "
        f"{age:.0f} s ago. Two runs in one folder would remove each other's checkpoints. "
        f"{way_out}; or {_ELSEWHERE}"
    )


def _starts_from_scratch(config: RunConfig) -> bool:
    resume = config.checkpoint.resume
    return resume == "never" or (resume == "auto" and not list_checkpoints(config.output_directory))


def _used_names(folder: Path) -> list[str]:
    """What an earlier run left in the folder; [] where none trained."""
    checkpoints = [CHECKPOINTS] if list_checkpoints(folder) else []
    if not checkpoints and not any((folder / name).exists() for name in RECORDS[:2]):
        return []
    return checkpoints + [name for name in RECORDS if os.path.lexists(folder / name)]


def _refuse_used(config: RunConfig) -> None:
    """A run that is never to resume does not write over an earlier one by mistake."""
    folder, settings = config.output_directory, config.checkpoint
    names = _used_names(folder)
    if settings.resume != "never" or not names:
        return
    if settings.used_directory == "refuse":
        raise ConfigError(
            f"checkpoint.resume=never, but output_directory={str(folder)!r} holds an earlier run "
            f"({', '.join(names)}): {_ELSEWHERE}, resume that run with checkpoint.resume=auto, or "
            f"have it moved to {folder / ARCHIVE} with checkpoint.used_directory=archive"
        )
    weights = settings.initial_weights
    if weights is not None and real_path(weights).is_relative_to(real_path(folder)):
        raise ConfigError(
            f"checkpoint.initial_weights={str(weights)!r} lies in output_directory="
            f"{str(folder)!r}, whose earlier run would be moved to {folder / ARCHIVE} "
            f"(checkpoint.used_directory=archive): {_ELSEWHERE}"
        )


def _archive(config: RunConfig) -> None:
    """Move what an earlier run left, if this one starts from scratch: nothing gets mixed or lost.

    A start that died before its first checkpoint is moved too: its steps are trained again.
    """
    if not _starts_from_scratch(config):
        return
    place = move_to_archive(config.output_directory, _used_names(config.output_directory))
    if place is not None:
        say(f"starting from scratch: what an earlier run left is in {place}")
