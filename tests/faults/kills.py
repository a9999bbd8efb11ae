"""SIGKILL, many times to one run: it is started again each time, and ends with the straight curve.

Each kill counts. What a kill may cost is checked at once: no more steps than the save interval
(two of them beside training, where the save that was being written is lost as well).
"""

from __future__ import annotations

import hashlib
import json
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path

from equilibrium_mcore.checkpoint.directory import list_checkpoints
from tests.faults.bench import (
    SAVE_EVERY,
    STEPS,
    Bench,
    BrokenPromiseError,
    Job,
    expect,
    logged_steps,
    no_traceback,
)
from tests.faults.moments import (
    await_moment,
    check_beginning,
    died,
    members,
    newest_steps,
)

ONE_RANK = {"parallelism": {"world_size": 1}}
TOLD = {
    "rank": "SIGKILL",
    "helper": "the process that starts the ranks was ended from outside",
    "writer": "ended by signal 9",
}


def chain_of_kills(
    bench: Bench, rng: random.Random, name: str, *, kills: int | None = None
) -> tuple[str, int]:
    """A run that is killed five to ten times, or `kills`: who dies, and when, is drawn."""
    beside = rng.random() < 0.4
    sections = ONE_RANK if rng.random() < 0.5 else {}
    expected = bench.curve_of("one_rank", **ONE_RANK) if sections else bench.curve
    run, told = bench.new_run(name, **sections), []
    words = ("checkpoint.asynchronous=true",) if beside else ()
    interval = SAVE_EVERY * (2 if beside else 1)
    pids: set[int] = set()
    for _ in range(kills or rng.randint(5, 10)):
        allowed = newest_steps(run)
        job = bench.start(run, *words, fresh=rng.random() < 0.04)
        moment = await_moment(bench, run, job, rng, steps=STEPS)
        family = members(job)
        pids |= {process.pid for some in family.values() for process in some}
        kind = rng.choice(("command", *family)) if family else "command"
        killed = bool(family) and died(rng.choice(family[kind]))
        status = job.wait()
        check_beginning(job, allowed)
        if not killed or status == 0:  # it was through already
            break
        told.append(f"{kind} {moment}")
        _check_told(job, kind, status)
        bench.check_left(pids)
        lost = logged_steps(run) - min(newest_steps(run))
        expect(lost <= interval, f"at most {interval} steps are lost", (lost, told))
    allowed = newest_steps(run)
    check_beginning(bench.finish(run, *words, expected=expected), allowed)
    bench.check_left(pids)
    how = f"{1 if sections else 2} ranks, {'asynchronous' if beside else 'synchronous'} saves; "
    return how + "; ".join(told), len(told)


def _check_told(job: Job, kind: str, status: int) -> None:
    no_traceback(job)
    if kind == "command":
        expect(status == -9, "the status is the signal's", job.text())
        return
    expect(status == 1, f"a run that lost its {kind} fails with 1", (status, job.text()))
    expect(TOLD[kind] in job.text(), f"what ended the {kind} is told", job.text())


def chain_of_tool_kills(
    bench: Bench, rng: random.Random, name: str, *, kills: int | None = None
) -> tuple[str, int]:
    """A tool that writes is killed two to five times, and then makes what it makes undisturbed."""
    tool = rng.choice(list(TOOLS))
    words, output = TOOLS[tool]
    inputs = tool_inputs(bench)
    seconds, expected = bench.reference(f"tool {tool}", lambda: undisturbed(bench, tool, inputs))
    folder, told, pids = bench.folder / name, [], set()
    folder.mkdir()
    for _ in range(kills or rng.randint(2, 5)):
        job = bench.command(tool, *words(inputs, folder))
        moment = rng.uniform(0, 1.1) * seconds
        _pause(job, moment)
        family = job.family()
        pids |= {process.pid for process in family}
        victim = rng.choice(family) if family and rng.random() < 0.5 else None
        killed = died(victim or family[0]) if family else False
        if not killed:
            break
        status = job.wait()
        expect(status != 2, "a tool that was killed may be called again", job.text())
        no_traceback(job)
        told.append(f"after {moment:.2f} s, status {status}")
        if status == 0:
            break
    job = bench.command(tool, *words(inputs, folder))
    status = job.wait()
    there = status in (1, 2) and "overwrite" in job.text()  # it had been through already
    expect(status == 0 or there, "the same command again makes it", job.text())
    found = hashes(folder / output)
    expect(found == expected, "the files are those of an undisturbed call", (found, expected))
    bench.check_left(pids)
    shutil.rmtree(folder)
    return f"{tool}: " + "; ".join(told), len(told)


def _pause(job: Job, seconds: float) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until and job.process.poll() is None:
        time.sleep(0.002)


def undisturbed(bench: Bench, tool: str, inputs: Path) -> tuple[float, dict[str, str]]:
    """How long a tool takes undisturbed, and what it makes."""
    words, output = TOOLS[tool]
    folder, began = bench.folder / f"undisturbed_{tool}", time.monotonic()
    folder.mkdir()
    job = bench.command(tool, *words(inputs, folder))
    expect(job.wait() == 0, f"{tool} works undisturbed", job.text())
    return time.monotonic() - began, hashes(folder / output)


def hashes(folder: Path) -> dict[str, str]:
    """Every file below a folder that is not hidden, by its name: what its bytes come to."""
    if not folder.is_dir():
        raise BrokenPromiseError(f"{folder} is not there")
    return {
        str(path.relative_to(folder)): hashlib.sha256(_content(path, folder)).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part.startswith(".") for part in path.parts)
    }


def _content(path: Path, folder: Path) -> bytes:
    """What of a file does not depend on when, where and how fast it was made."""
    content = path.read_bytes().replace(str(folder.parent).encode(), b"")
    if path.suffix != ".json":
        return content
    facts = json.loads(content)
    for key in ("seconds", "made", "resumed", "timings", "started", "when"):
        facts.pop(key, None) if isinstance(facts, dict) else None
    return json.dumps(facts, sort_keys=True).encode()


# ----------------------------------------------------------------------------------- the tools


def tool_inputs(bench: Bench) -> Path:
    """A folder with what tools read: a text of a few megabytes, a checkpoint, a mixture."""
    return bench.reference("tool inputs", lambda: _tool_inputs(bench))


def _tool_inputs(bench: Bench) -> Path:
    folder = bench.folder / "tool_inputs"
    folder.mkdir()
    lines = b"".join(
        (bench.folder / "data" / f"{n}.jsonl").read_bytes() for n in ("first", "second")
    )
    rows = [json.loads(line) for line in lines.splitlines()]
    with (folder / "text.jsonl").open("w", encoding="utf-8") as stream:
        for number in range(8000):
            text = f"{number} {rows[number % len(rows)]['text']}"
            stream.write(json.dumps({"text": text}) + "\n")
    (folder / "mixture.yaml").write_text(
        MIXTURE.format(model=bench.data["tokenizer"]["model"], text=folder / "text.jsonl")
    )
    return folder


MIXTURE = """
metadata: {{phase: pretrain, total_tokens: 300000, max_seq_length: 64}}
tokenizer: {{type: SentencePieceTokenizer, model: {model}}}
datasets:
  - name: text
    source: {text}
    mix_ratio: 1.0
    filters:
      - {{type: deduplication, method: exact}}
"""

Words = Callable[[Path, Path], tuple[object, ...]]


def _preprocess(inputs: Path, folder: Path) -> tuple[object, ...]:
    model = inputs.parent / "data" / "tokenizer.model"
    return (
        *("--input", inputs / "text.jsonl", "--output-prefix", folder / "made" / "text"),
        *("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", model),
        *("--append-eod", "--workers", 2),
    )


def _merge(inputs: Path, folder: Path) -> tuple[object, ...]:
    data = inputs.parent / "data"
    prefixes = [data / f"{name}_text_document" for name in ("first", "second")]
    return ("--input", *prefixes, "--output-prefix", folder / "made" / "both_text_document")


def _prepare(inputs: Path, folder: Path) -> tuple[object, ...]:
    return (inputs / "mixture.yaml", "--output", folder / "made", "--workers", 2)


def _convert(inputs: Path, folder: Path) -> tuple[object, ...]:
    checkpoint = list_checkpoints(inputs.parent / "reference")[-1]
    return ("--checkpoint", checkpoint, "--output", folder / "made")


TOOLS: dict[str, tuple[Words, str]] = {
    "preprocess": (_preprocess, "made"),
    "merge": (_merge, "made"),
    "prepare": (_prepare, "made"),
    "convert": (_convert, "made"),
}
