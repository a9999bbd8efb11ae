"""Print how fast files are hashed here, and what verifying a checkpoint takes.

Hashes are measured on a temporary file of random bytes that was just written, so from memory, not
from the disk: what one process adds to reading. The best of --repeats is printed.

Examples:
    python tools/bench/checkpoint_hash.py
    python tools/bench/checkpoint_hash.py --checkpoint runs/quickstart/run
"""

from __future__ import annotations

import argparse
import hashlib
import os
import tempfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path

from equilibrium_mcore.checkpoint.opened import open_weights
from equilibrium_mcore.cli.command import run_command
from equilibrium_mcore.files.paths import user_path
from equilibrium_mcore.files.tables import terminal_table


def seconds(work: Callable[[], object], repeats: int) -> float:
    """The least seconds that `work` took."""
    taken = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        taken.append(time.perf_counter() - start)
    return min(taken)


def digest(path: Path, name: str) -> None:
    """Hash a file as the manifest does, or with zlib's checksum."""
    with path.open("rb") as stream:
        if name != "crc32":
            hashlib.file_digest(stream, name).hexdigest()
            return
        value = 0
        while block := stream.read(1 << 18):
            value = zlib.crc32(block, value)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The file that is made up, and a checkpoint."""
    add = parser.add_argument
    add("--mib", type=int, default=256, help="size of the file; default 256")
    add("--repeats", type=int, default=5, help="default 5")
    add("--checkpoint", type=user_path, help="a checkpoint, or a run's output directory")


def run(options: argparse.Namespace) -> None:
    """Measure, print."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "bytes"
        path.write_bytes(os.urandom(options.mib << 20))  # not whole: it is to be in memory alone
        rows = []
        for name in ("sha256", "blake2b", "sha512", "crc32"):
            taken = seconds(lambda name=name: digest(path, name), options.repeats)
            rows.append((name, f"{options.mib / 1024 / taken:.2f}"))
    print(terminal_table(("hash", "GiB/s, one thread"), rows, align="lr"))
    if options.checkpoint is not None:
        opened = open_weights(options.checkpoint)
        taken = seconds(lambda: open_weights(opened.path), options.repeats)
        print(f"{opened.path}: {opened.gib:.3f} GiB verified in {taken:.3f} s by one process")


if __name__ == "__main__":
    raise SystemExit(run_command(__doc__, add_arguments, run))
