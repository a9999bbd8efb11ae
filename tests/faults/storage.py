"""Storage faults: full disks, read-only folders, folders that vanish, wrong names, limits.

A fault is made by what every Linux has: a small tmpfs that root mounts, limits of a process, names.
The promise: one message that names the file or folder and a way out, the exit status of the
convention, earlier checkpoints whole, and after the fault is gone the same command gives the
straight curve.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import psutil

from equilibrium_mcore.checkpoint.directory import list_checkpoints
from equilibrium_mcore.checkpoint.verify import verify_directory
from tests.faults.bench import (
    STEPS,
    Bench,
    Job,
    SkippedError,
    expect,
    logged_steps,
    no_traceback,
    wait_until,
)
from tests.faults.kills import TOOLS, hashes, tool_inputs, undisturbed
from tests.faults.moments import check_beginning, newest_steps

MB = 1 << 20


@contextlib.contextmanager
def small_disk(folder: Path, size: int, *options: str) -> Iterator[None]:
    """A tmpfs of `size` bytes at a new folder. Raises SkippedError where it cannot be mounted."""
    folder.mkdir(parents=True)
    words = ",".join((f"size={size}", *options))
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", words, "tmpfs", str(folder)], capture_output=True, text=True
    )
    if done.returncode:
        raise SkippedError(f"no tmpfs can be mounted: {done.stderr.strip()}")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
        folder.rmdir()


def remount(folder: Path, options: str) -> None:
    subprocess.run(["mount", "-o", f"remount,{options}", str(folder)], check=True)


def check_told(job: Job, status: int, *names: object) -> None:
    """It ended with 1 or 2, and one message names one of `names`; no library's own words."""
    text = job.text()
    no_traceback(job)
    expect(status in (1, 2), "a storage fault is an error of the command", (status, text))
    expect(any(str(name) in text for name in names), f"one of {names} is named", text)
    raw = re.search(r"\[Errno|enforce fail|unexpected pos|RuntimeError|OSError|os error", text)
    expect(raw is None, "no raw text of a library", text)
    said = re.findall(r"^.*(?:error: |1 problem).*$", text, re.MULTILINE)
    expect(len(said) == 1, "one message", text)


def check_whole(run: Path) -> None:
    """Every checkpoint that has its name verifies."""
    if not list_checkpoints(run):
        return
    found = verify_directory(run, workers=1)
    bad = [verdict.row for verdict in found if verdict.damages]
    expect(not bad, "checkpoints with a name are whole", bad)


# --------------------------------------------------------------------------------- of a run


def disk_full_in_a_run(bench: Bench, rng: random.Random, name: str) -> str:
    """The run's disk is full at a size that is drawn: in a save, or in a log."""
    beside = rng.random() < 0.5
    words = ("checkpoint.asynchronous=true",) if beside else ()
    save = sum(p.stat().st_size for p in list_checkpoints(bench.folder / "reference")[-1].iterdir())
    size = int(1.1 * MB + save * rng.uniform(0.1, 3.5))
    disk = bench.folder / f"{name}_disk"
    with small_disk(disk, size):
        run = bench.new_run(f"{name}_disk/run")
        job = bench.start(run, *words)
        status = job.wait()
        steps = newest_steps(run)
        if status != 0:
            check_told(job, status, disk)
            check_whole(run)
        remount(disk, "size=64m")
        check_beginning(bench.finish(run, *words), steps)
    kind = "asynchronous" if beside else "synchronous"
    return f"{kind} saves, {size} bytes, status {status}, checkpoints {sorted(steps)}"


def disk_filled_beside_a_run(bench: Bench, rng: random.Random, name: str) -> str:
    """Somebody else fills the disk at a step that is drawn: logs or the next save find no room."""
    disk, step = bench.folder / f"{name}_disk", rng.randint(0, STEPS - 3)
    with small_disk(disk, 64 * MB):
        run = bench.new_run(f"{name}_disk/run")
        job = bench.start(run)
        wait_until(lambda: logged_steps(run) >= step or job.process.poll() is not None, "it trains")
        ballast = disk / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as stream:
            while True:
                stream.write(bytes(4096))
        status = job.wait()
        steps = newest_steps(run)
        if status != 0:
            check_told(job, status, disk)
            check_whole(run)
        ballast.unlink()
        check_beginning(bench.finish(run), steps)
    return f"filled at step {step}, status {status}"


def read_only_in_a_run(bench: Bench, rng: random.Random, name: str) -> str:
    """The checkpoints' file system becomes read-only, at the start or between two saves."""
    run, step = bench.new_run(name), rng.randint(0, STEPS - 3)
    folder = run / "checkpoints"
    with small_disk(folder, 64 * MB):
        job = bench.start(run)
        wait_until(lambda: logged_steps(run) >= step or job.process.poll() is not None, "it trains")
        with contextlib.suppress(subprocess.CalledProcessError):  # a save has a file open there
            remount(folder, "ro")
        status = job.wait()
        steps = newest_steps(run)
        if status != 0:
            check_told(job, status, folder)
            check_whole(run)
        remount(folder, "rw")
        check_beginning(bench.finish(run), steps)
    shutil.rmtree(run, ignore_errors=True)
    return f"read-only after step {step}, status {status}"


def output_that_cannot_be(bench: Bench, rng: random.Random, name: str) -> str:
    """An output directory that is a file, below one, too long, a dangling link, read-only."""
    place = bench.folder / name
    place.mkdir()
    config = bench.new_run(f"{name}_config").with_suffix(".yaml")
    kind = rng.choice(("file", "below a file", "too long", "circle", "read-only"))
    (place / "file").write_text("a user's")
    (place / "circle").symlink_to(place / "circle")
    output = {
        "file": place / "file",
        "below a file": place / "file" / "run",
        "too long": place / ("n" * 300),
        "circle": place / "circle",
        "read-only": place / "disk" / "run",
    }[kind]
    with contextlib.ExitStack() as stack:
        if kind == "read-only":
            stack.enter_context(small_disk(place / "disk", MB, "ro"))
        job = bench.command("train", config, f"output_directory={output}")
        status = job.wait()
        check_told(job, status, str(output)[: len(str(place)) + 5])
        expect(status == 2, "it is refused before anything begins", job.text())
    expect((place / "file").read_text() == "a user's", "the file is as it was")
    return kind


def folder_gone_under_a_run(bench: Bench, rng: random.Random, name: str) -> str:
    """Somebody removes the run's folder, its checkpoints, or puts a file in their place."""
    run, step = bench.new_run(name), rng.randint(1, STEPS - 3)
    kind = rng.choice(("run removed", "checkpoints removed", "a file for checkpoints"))
    job = bench.start(run)
    wait_until(lambda: logged_steps(run) >= step or job.process.poll() is not None, "it trains")
    target = run if kind == "run removed" else run / "checkpoints"
    aside = run.with_name(f"{name}_aside")
    with contextlib.suppress(FileNotFoundError):  # nothing was saved yet
        target.rename(aside)
        if kind == "a file for checkpoints":
            target.write_text("a user's")
    if kind == "a file for checkpoints" and not aside.exists():
        kind = "nothing, since no checkpoint was there"
    status = job.wait()
    if status != 0:
        check_told(job, status, run)
    if kind != "a file for checkpoints":
        return f"{kind} at step {step}, status {status}"
    expect(target.read_text() == "a user's", "the file is as it was")
    target.unlink()
    if aside.exists():
        aside.rename(target)
    bench.finish(run)
    return f"{kind} at step {step}, status {status}"


def limits_of_a_run(bench: Bench, rng: random.Random, name: str) -> str:
    """No file may grow beyond a limit, or no more files be opened, from a step on."""
    run, step = bench.new_run(name), rng.randint(0, STEPS - 3)
    kind = rng.choice(("size", "size", "files"))
    beside = rng.random() < 0.5
    words = ("checkpoint.asynchronous=true",) if beside else ()
    job = bench.start(run, *words)
    wait_until(lambda: logged_steps(run) >= step or job.process.poll() is not None, "it trains")
    for process in job.family():
        with contextlib.suppress(psutil.NoSuchProcess):
            if kind == "size":
                limit = rng.choice((50_000, 100_000, 200_000))  # the console is a file, too
                process.rlimit(resource.RLIMIT_FSIZE, (limit, limit))
            else:
                process.rlimit(resource.RLIMIT_NOFILE, (process.num_fds(),) * 2)
    status = job.wait()
    steps = newest_steps(run)
    if status != 0:
        check_told(job, status, run, bench.temporary)
        check_whole(run)
    check_beginning(bench.finish(run, *words), steps)
    return f"{kind} limited after step {step}, status {status}"


def no_room_for_temporary_files(bench: Bench, rng: random.Random, name: str) -> str:
    """The folder for temporary files is full from the start, or is not there."""
    run, disk = bench.new_run(name), bench.folder / f"{name}_disk"
    inodes = rng.choice((1, 2, 3))
    with small_disk(disk, MB, f"nr_inodes={inodes}"):
        job = bench.command(
            "train", run.with_suffix(".yaml"), f"output_directory={run}", temporary=disk
        )
        status = job.wait()
        if status != 0:
            check_told(job, status, disk, "temporary", "ranks")
    bench.finish(run)
    return f"{inodes} files at most, status {status}"


# -------------------------------------------------------------------------------- of a tool


def disk_full_in_a_tool(bench: Bench, rng: random.Random, name: str) -> str:
    """What a tool writes finds no room at a size that is drawn, or a read-only disk."""
    tool = rng.choice(list(TOOLS))
    words, output = TOOLS[tool]
    inputs = tool_inputs(bench)
    _, expected = bench.reference(f"tool {tool}", lambda: undisturbed(bench, tool, inputs))
    made = bench.folder / f"undisturbed_{tool}" / output
    whole = sum(p.stat().st_size for p in made.rglob("*") if p.is_file())
    disk = bench.folder / f"{name}_disk"
    size, read_only = int(whole * rng.uniform(0, 1.3)) + 4096, rng.random() < 0.2
    with small_disk(disk, size, *["ro"] * read_only):
        job = bench.command(tool, *words(inputs, disk))
        status = job.wait()
        if status != 0:
            check_told(job, status, disk)
        remount(disk, "rw,size=256m")
        job = bench.command(tool, *words(inputs, disk))
        again = job.wait()
        there = status == 0 and again in (1, 2) and "overwrite" in job.text()
        expect(again == 0 or there, "with room the same command makes it", job.text())
        expect(hashes(disk / output) == expected, "the files are those of an undisturbed call")
    return f"{tool}, {'read-only' if read_only else f'{size} bytes'}, status {status}"


def names_that_cannot_be_in_a_tool(bench: Bench, rng: random.Random, name: str) -> str:
    """A tool's output is below a file, too long, or a circle of links."""
    tool = rng.choice(list(TOOLS))
    words, _ = TOOLS[tool]
    place = bench.folder / name
    place.mkdir()
    (place / "file").write_text("a user's")
    (place / "circle").symlink_to(place / "circle")
    wrong = rng.choice((place / "file", place / ("n" * 300), place / "circle"))
    job = bench.command(tool, *words(tool_inputs(bench), wrong))
    status = job.wait()
    check_told(job, status, str(wrong)[: len(str(place)) + 10])
    expect((place / "file").read_text() == "a user's", "the file is as it was")
    return f"{tool}, {wrong.name[:10]}, status {status}"


SCENARIOS = (
    disk_full_in_a_run,
    disk_full_in_a_run,
    disk_filled_beside_a_run,
    read_only_in_a_run,
    output_that_cannot_be,
    folder_gone_under_a_run,
    limits_of_a_run,
    no_room_for_temporary_files,
    disk_full_in_a_tool,
    disk_full_in_a_tool,
    names_that_cannot_be_in_a_tool,
)

if os.name != "posix":
    raise ImportError("storage faults are made with what Linux has")
