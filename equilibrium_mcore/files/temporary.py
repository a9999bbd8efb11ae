"""Temporary folders that do not outlive their process for ever, whatever ends it."""

from __future__ import annotations

import contextlib
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from equilibrium_mcore.files.named import open_named
from equilibrium_mcore.files.owner import Owner

OWNER_FILE = ".owner.json"


@contextlib.contextmanager
def temporary_folder(prefix: str) -> Iterator[Path]:
    """A new folder of this name's beginning in $TMPDIR, removed at the end.

    A process that is killed leaves its folder; so those of the same `prefix` whose process is no
    more on this machine are removed first. Folders of others, and what does not say whose it is,
    stay.
    """
    _remove_orphans(prefix)
    folder = Path(tempfile.mkdtemp(prefix=prefix))
    try:
        text = Owner.of_this_process(prefix).to_text()
        with open_named(folder / OWNER_FILE, "w") as stream:
            stream.write(text)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _remove_orphans(prefix: str) -> None:
    for folder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with contextlib.suppress(OSError):
            owner = Owner.from_text((folder / OWNER_FILE).read_text(encoding="utf-8"))
            if owner is not None and owner.is_dead():
                shutil.rmtree(folder, ignore_errors=True)
