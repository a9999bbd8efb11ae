"""Files that are whole or absent, also after a kill or a power cut.

A file is written under a temporary name in the same folder, flushed to the disk, and renamed. The
temporary name is new and hidden, so that no file of a user's is ever in its way.

What is written over hours, or must appear together with other files, keeps a temporary name of its
own (`partial_path`), is brought to the disk by `sync_stream` and published by `rename_durably`.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from equilibrium_mcore.files.errors import naming

TEMPORARY = ".tmp"  # what temporary names end in
PARTIAL = ".partial"  # the same of what a later process may finish
REMOVED = ".removed"  # what the names of folders being removed end in


@contextlib.contextmanager
def whole_file(path: str | Path, mode: str = "w") -> Iterator[IO[Any]]:
    """A stream whose content becomes `path` when the block ends; nothing changes if it raises.

    `mode` is "w" (UTF-8 text) or "wb". Missing parent folders are made. Raises FileExistsError
    where `path` is a folder or a device: only a file is ever replaced.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise FileExistsError(f"{path} is no regular file, and is not replaced: name another")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(path, TEMPORARY)
    try:
        with (
            naming(path),
            temporary.open(
                mode.replace("w", "x"), encoding=None if "b" in mode else "utf-8"
            ) as stream,
        ):
            yield stream
            sync_stream(stream)
        rename_durably(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):  # what is told is the first error
            temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def whole_folder(target: Path, *, check: Callable[[], object]) -> Iterator[Path]:
    """An empty folder whose content becomes `target` when the block ends, whole.

    Nothing changes if the block raises. A folder that is there is replaced: `check` is called when
    the new one is whole, and raises if that must not be.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_name(target, TEMPORARY)
    temporary.mkdir()
    try:
        yield temporary
        for path in temporary.rglob("*"):
            _sync(path)
        check()
        _put_in_place(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_whole(path: str | Path, content: str | bytes) -> None:
    """Make `path` hold `content`: all of it, or what was there before."""
    with whole_file(path, "wb" if isinstance(content, bytes) else "w") as stream:
        stream.write(content)


def partial_path(path: Path) -> Path:
    """The temporary name, always the same, of a file that a later process may finish."""
    return path.with_name(path.name + PARTIAL)


def rename_durably(source: Path, target: Path) -> None:
    """Rename a file or folder so that it survives a power cut; a file that is there is replaced.

    What `source` holds must be on the disk before: `sync_stream`, `sync_file`. Raises
    FileNotFoundError where there is no `source`.
    """
    os.replace(source, target)
    sync_directory(target.parent)
    if source.parent != target.parent:
        sync_directory(source.parent)


def sync_stream(stream: IO[Any]) -> None:
    """Bring what was written to an open file to the disk. Raises OSError, which names the file."""
    with naming(_name_of(stream)):
        stream.flush()
        os.fsync(stream.fileno())


def sync_file(path: str | Path) -> None:
    """Bring a closed file, which other code wrote, to the disk."""
    _sync(path)


def sync_directory(folder: str | Path) -> None:
    """Make the names in `folder` survive a power cut."""
    _sync(folder)


def remove_tree(path: str | Path) -> None:
    """Remove a file, a symbolic link or a folder, which is renamed first.

    A kill in the middle leaves a name that ends in `REMOVED`, never half of what `path` held. Of a
    link the link alone is removed.
    """
    path = Path(path)
    if path.is_symlink() or not path.is_dir():
        path.unlink()
        return
    remove_rest(set_aside_for_removal(path))


def remove_rest(folder: Path) -> None:
    """Remove a folder that was set aside, while another process may be removing it as well.

    Raises OSError, which names the whole path, where something cannot be removed.
    """

    def unless_gone(_: object, path: str, error: BaseException) -> None:
        if isinstance(error, FileNotFoundError):
            return
        if isinstance(error, OSError):  # it names what is open, relative to that
            raise type(error)(error.errno, error.strerror, path) from None
        raise error

    shutil.rmtree(folder, onexc=unless_gone)


def set_aside_for_removal(folder: Path) -> Path:
    """Rename a folder, so that its name is free at once; returns what is left to be removed."""
    doomed = _temporary_name(folder, REMOVED)
    rename_durably(folder, doomed)
    return doomed


def _put_in_place(folder: Path, target: Path) -> None:
    """Rename `folder` to `target`; what was there goes once the new one is in its place."""
    if not target.exists():
        return rename_durably(folder, target)
    doomed = _temporary_name(target, REMOVED)
    os.replace(target, doomed)
    try:
        os.replace(folder, target)
    except BaseException:
        os.replace(doomed, target)
        raise
    sync_directory(target.parent)
    remove_rest(doomed)


def _name_of(stream: IO[Any]) -> str:
    name = getattr(stream, "name", None)
    return os.fsdecode(name) if isinstance(name, str | bytes) else repr(stream)


def _temporary_name(path: Path, ending: str) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}{ending}")


def _sync(path: str | Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with naming(path):
            os.fsync(descriptor)
    finally:
        os.close(descriptor)
