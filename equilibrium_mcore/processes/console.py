"""Lines for people who watch a run: what cannot be shown does not end it."""

from __future__ import annotations

import contextlib
import os
import sys


def say(text: str) -> None:
    """Print a line at once. Where stdout takes none (a full disk, a closed pipe), go on without it.

    What matters stands in the output directory; stderr is told once.
    """
    try:
        print(text, flush=True)
    except OSError as error:
        # What it still holds would fail again when Python ends, and spoil the exit status.
        sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: PTH123, SIM115  # not whole: nothing
        with contextlib.suppress(OSError):
            print(f"stdout takes no more ({error}); going on without it", file=sys.stderr)
