"""What examples/quickstart.sh asks of a run's metrics.jsonl, and the summary that it ends with.

    python examples/quickstart_summary.py summary runs/quickstart/run --output runs/quickstart

The questions (`attempts`, `stopped`, `finished`, `wait`) answer by number or by exit status.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from equilibrium_mcore.cli.command import run_command
from equilibrium_mcore.files.paths import user_path
from equilibrium_mcore.training.metrics import METRICS_FILE, human, read_metrics

Record = dict[str, Any]
BEGINNINGS = ("start", "resume")
POLL_SECONDS = 0.2
MAX_JUMP_NATS = 0.5
"""A loss right after the resume that is this far above the loss before it has lost the weights."""


def read(run: Path, kind: str) -> list[Record]:
    """The records of one kind, in order; none where the run has not begun."""
    path = run / METRICS_FILE
    return [r for r in read_metrics(path) if r["kind"] == kind] if path.is_file() else []


def attempts(run: Path) -> int:
    """How often the run was started or resumed; starts that saved nothing are in its archive."""
    folders = [run, *run.glob("archive/*")]
    events = [event for folder in folders for event in read(folder, "event")]
    return sum(event["event"] in BEGINNINGS for event in events)


def was_stopped(run: Path) -> bool:
    """Whether a signal has stopped the run once."""
    return any(event["event"] == "signal" for event in read(run, "event"))


def is_finished(run: Path) -> bool:
    """Whether the run came to its end."""
    events = read(run, "event")
    return bool(events) and events[-1]["event"] == "end"


def wait_for_step(run: Path, *, step: int, after_attempts: int, pid: int) -> str | None:
    """Wait until an attempt after the first `after_attempts` has trained and reached `step`.

    Returns what went wrong, or None. That a new attempt must show first matters: before it does,
    the process may not handle the signal that the caller is about to send.
    """
    while True:
        alive = _is_alive(pid)
        events = [e for e in read(run, "event") if e["event"] in BEGINNINGS]
        train = read(run, "train")
        if events and train and attempts(run) > after_attempts:
            last = train[-1]["step"]
            if last >= step and last > events[-1]["step"]:
                if is_finished(run):
                    return f"the run came to its end before it could be stopped at step {step}"
                return None
        if not alive:
            return f"the run ended by itself before step {step}; its own message is above"
        time.sleep(POLL_SECONDS)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def curve_faults(train: list[Record], events: list[Record]) -> list[str]:
    """Why the curve of a stopped and resumed run is not that of an unbroken one; empty if it is."""
    faults = []
    steps = [record["step"] for record in train]
    resumes = [event["step"] for event in events if event["event"] == "resume"]
    stops = [event["step"] for event in events if event["event"] == "signal"]
    if not resumes:
        faults.append("the run was never resumed")
    interval = max((b - a for a, b in zip(steps, steps[1:], strict=False)), default=1)
    usual = statistics.mode([b - a for a, b in zip(steps, steps[1:], strict=False)] or [1])
    if interval > usual:
        faults.append(f"steps are missing: a gap of {interval} where records are {usual} apart")
    if any(b <= a for a, b in zip(steps, steps[1:], strict=False)):
        faults.append("steps are repeated or go back")
    batch_tokens = {round(record["tokens"] / record["step"], 6) for record in train}
    if len(batch_tokens) > 1:
        faults.append(f"tokens do not grow with the steps: {sorted(batch_tokens)} per step")
    for step in resumes:
        if stops and not any(stop <= step <= stop + 1 for stop in stops):
            faults.append(f"resumed at step {step}, though stopped at {stops}")
        before = [record["loss"] for record in train if record["step"] <= step][-3:]
        after = [record["loss"] for record in train if record["step"] > step][:3]
        if before and after and min(after) > statistics.mean(before) + MAX_JUMP_NATS:
            faults.append(
                f"the loss jumps at the resume: {statistics.mean(before):.3f} before step {step}, "
                f"{after[0]:.3f} after it"
            )
    return faults


def validation_faults(validation: list[Record], *, margin: float) -> list[str]:
    """Why the last validation does not show that the model learned; empty if it does."""
    if not validation:
        return ["there is no validation"]
    last = validation[-1]
    if last["loss"] is None or last.get("unigram_entropy") is None:
        return [f"the last validation has no loss, or no unigram entropy: {last}"]
    if last["loss"] > last["unigram_entropy"] - margin:
        return [
            f"validation loss {last['loss']:.3f} is not {margin} nats below the unigram entropy "
            f"{last['unigram_entropy']:.3f}: train longer (--steps)"
        ]
    return []


def summary(run: Path, *, output: Path, margin: float, seconds: float | None) -> list[str]:
    """Print the summary; returns the faults found."""
    train, validation, events = (read(run, kind) for kind in ("train", "validation", "event"))
    if not train:
        return [f"{run / METRICS_FILE} holds no training record"]
    faults = curve_faults(train, events) + validation_faults(validation, margin=margin)
    resumes = ", ".join(str(e["step"]) for e in events if e["event"] == "resume")
    rate = statistics.median(record["tokens_per_second"] for record in train)
    print("\nsummary")
    print(f"  training loss     {_loss(train[:1])} -> {_loss(train[-3:])} nats per token")
    print(f"                    {train[-1]['step']} steps, {human(train[-1]['tokens'])} tokens")
    if validation:
        last = validation[-1]
        unigram, bigram = (_number(last.get(f"{n}_entropy")) for n in ("unigram", "bigram"))
        print(
            f"  validation loss   {_number(last['loss'])} (same tokens: unigram entropy {unigram},"
        )
        print(f"                    bigram entropy {bigram})")
    print(f"  resumed           after step {resumes or 'never'}")
    print(f"  speed             {human(rate)} tokens/s, median")
    if seconds is not None:
        print(f"  this took         {seconds // 60:.0f} min {seconds % 60:.0f} s")
    print("  results")
    for what, path in (
        ("datasets", output / "data"),
        ("tokenizer", output / "tokenizer"),
        ("run, checkpoints", run),
        ("curves", run / "curves.png"),
        ("Hugging Face model", output / "hugging_face"),
    ):
        print(f"    {what:<20}{path}")
    print("  try next")
    print(f'    .venv/bin/python tools/generate.py "{output / "hugging_face"}" --prompt "import"')
    print("    bash examples/quickstart.sh --steps 600 --output runs/longer")
    print("    .venv/bin/python -m equilibrium_mcore.pretrain configs/runs/quickstart.yaml \\")
    print("        output_directory=runs/adamw optimizer.matrices=adamw training.steps=100")
    print("    your own text: tools/preprocess_data.py --help, then a copy of configs/data/")
    return faults


def _loss(records: list[Record]) -> str:
    known = [record["loss"] for record in records if record["loss"] is not None]
    return _number(statistics.mean(known) if known else None)


def _number(value: float | None) -> str:
    return "unknown" if value is None else f"{value:.3f}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The question, and the run."""
    parser.add_argument("question", choices=("attempts", "stopped", "finished", "wait", "summary"))
    parser.add_argument("run", type=user_path, help="the run's output directory")
    parser.add_argument("--step", type=int, help="wait: until this step")
    parser.add_argument("--after-attempts", type=int, default=0, help="wait: for a later attempt")
    parser.add_argument("--pid", type=int, help="wait: the process that trains")
    parser.add_argument("--output", type=user_path, help="summary: the folder of all results")
    parser.add_argument("--margin", type=float, default=0.3, help="summary: nats below unigram")
    parser.add_argument("--seconds", type=float, help="summary: how long all of it took")


def answer(options: argparse.Namespace) -> int:
    """Answer one question about a run."""
    run = options.run
    if options.question == "attempts":
        print(attempts(run))
    elif options.question == "stopped":
        return int(not was_stopped(run))
    elif options.question == "finished":
        return int(not is_finished(run))
    elif options.question == "wait":
        fault = wait_for_step(
            run, step=options.step, after_attempts=options.after_attempts, pid=options.pid
        )
        if fault:
            print(f"  {fault}", file=sys.stderr)
            return 1
    else:
        output = options.output or run.parent
        faults = summary(run, output=output, margin=options.margin, seconds=options.seconds)
        for fault in faults:
            print(f"  FAULT: {fault}", file=sys.stderr)
        return int(bool(faults))
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(__doc__, add_arguments, answer))
