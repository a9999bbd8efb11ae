"""examples/quickstart.sh itself on a smaller budget, and the checks of its summary."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from examples import quickstart_summary

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "quickstart.sh"
PATIENCE_SECONDS = 1800  # only a script that hangs takes as long; how fast it is, is not tested


def run_quickstart(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the script in a process group of its own, which a timeout ends as Ctrl-C would."""
    process = subprocess.Popen(
        ["bash", str(SCRIPT), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=PATIENCE_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGTERM)
        output, _ = process.communicate(timeout=PATIENCE_SECONDS)
        pytest.fail(f"quickstart.sh took more than {PATIENCE_SECONDS} s:\n{output}")
    return subprocess.CompletedProcess(process.args, process.returncode, output)


def test_quickstart_runs_whole_and_reuses_its_results(tmp_path: Path) -> None:
    output = tmp_path / "quick start"  # a path with a space
    done = run_quickstart("--fast", "--output", str(output))
    assert done.returncode == 0, done.stdout
    assert done.stdout.rstrip().endswith("quickstart: OK"), done.stdout

    records = [json.loads(line) for line in (output / "run/metrics.jsonl").open()]
    train_steps = [record["step"] for record in records if record["kind"] == "train"]
    assert train_steps == list(range(1, train_steps[-1] + 1))
    events = [record["event"] for record in records if record["kind"] == "event"]
    assert "signal" in events[: events.index("resume")]
    assert events[-1] == "end"
    assert (output / "run/curves.png").read_bytes().startswith(b"\x89PNG")
    names = {path.name for path in (output / "hugging_face").iterdir()}
    assert {"config.json", "generation_config.json", "tokenizer.json", "README.md"} <= names
    assert any(name.endswith(".safetensors") for name in names)

    weights = (output / "hugging_face/config.json").stat().st_mtime_ns
    again = run_quickstart("--fast", "--output", str(output))
    assert again.returncode == 0, again.stdout
    assert again.stdout.count("done already") == 2
    assert again.stdout.rstrip().endswith("quickstart: OK")
    assert (output / "hugging_face/config.json").stat().st_mtime_ns == weights

    other = run_quickstart("--fast", "--steps", "20", "--output", str(output))
    assert other.returncode == 2
    assert "made with other options" in other.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--steps", "many"], "--steps many: must be a whole number"),
        (["--steps", "2"], "--steps 2: must be 10 or more"),
        (["--output"], "--output needs a value"),
        (["--quick"], "--quick: unknown option"),
    ],
)
def test_wrong_options_are_refused_with_a_reason(arguments: list[str], message: str) -> None:
    done = run_quickstart(*arguments)
    assert done.returncode == 2
    assert message in done.stdout
    assert "bash examples/quickstart.sh" in done.stdout  # the usage


def resumed_run() -> list[dict]:
    """The records of a good run of 20 steps: stopped at step 10, resumed there."""

    def event(name: str, step: int) -> dict:
        return {"kind": "event", "event": name, "step": step}

    def train(step: int) -> dict:
        loss = 8.0 - 0.2 * step
        return {
            "kind": "train",
            "step": step,
            "tokens": 512 * step,
            "loss": loss,
            "tokens_per_second": 1000.0,
        }

    return [
        event("start", 0),
        *(train(step) for step in range(1, 11)),
        event("signal", 10),
        event("stop", 10),
        event("resume", 10),
        *(train(step) for step in range(11, 21)),
        {
            "kind": "validation",
            "step": 20,
            "loss": 4.0,
            "unigram_entropy": 5.0,
            "bigram_entropy": 3.5,
        },
        event("end", 20),
    ]


def write_run(run: Path, records: list[dict]) -> None:
    run.mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps(record) + "\n" for record in records)
    (run / "metrics.jsonl").write_text(text, encoding="utf-8")


def test_a_start_that_was_killed_before_it_saved_counts_as_an_attempt(tmp_path: Path) -> None:
    """Its record is in the archive; the next start is not taken for it."""
    records = resumed_run()[:11]
    write_run(tmp_path / "archive/1", records)
    assert quickstart_summary.attempts(tmp_path) == 1
    write_run(tmp_path, records)
    reached = {"step": 10, "pid": os.getpid()}
    assert quickstart_summary.wait_for_step(tmp_path, after_attempts=1, **reached) is None


def test_a_good_run_has_no_fault(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_run(tmp_path, resumed_run())
    assert quickstart_summary.was_stopped(tmp_path)
    assert quickstart_summary.is_finished(tmp_path)
    assert quickstart_summary.attempts(tmp_path) == 2
    assert not quickstart_summary.summary(tmp_path, output=tmp_path, margin=0.3, seconds=65)
    printed = capsys.readouterr().out
    assert "validation loss   4.000 (same tokens: unigram entropy 5.000" in printed
    assert "1 min 5 s" in printed


def missing_step(records: list[dict]) -> None:
    del records[15]


def repeated_step(records: list[dict]) -> None:
    records.insert(15, records[15])


def lost_weights(records: list[dict]) -> None:
    for record in records[14:24]:
        record["loss"] += 2.0


def lost_data_position(records: list[dict]) -> None:
    for record in records[14:24]:
        record["tokens"] -= 512 * 10


def never_resumed(records: list[dict]) -> None:
    del records[13]


def learned_nothing(records: list[dict]) -> None:
    records[-2]["loss"] = 4.9


@pytest.mark.parametrize(
    ("break_it", "fault"),
    [
        (missing_step, "steps are missing"),
        (repeated_step, "repeated"),
        (lost_weights, "the loss jumps at the resume"),
        (lost_data_position, "tokens do not grow with the steps"),
        (never_resumed, "never resumed"),
        (learned_nothing, "not 0.3 nats below the unigram entropy"),
    ],
)
def test_a_broken_run_is_a_fault(tmp_path: Path, break_it, fault: str) -> None:
    records = resumed_run()
    break_it(records)
    write_run(tmp_path, records)
    faults = quickstart_summary.summary(tmp_path, output=tmp_path, margin=0.3, seconds=None)
    assert len(faults) == 1
    assert fault in faults[0]


def test_waiting_ends_when_the_process_dies(tmp_path: Path) -> None:
    write_run(tmp_path, resumed_run()[:5])
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    fault = quickstart_summary.wait_for_step(tmp_path, step=10, after_attempts=0, pid=process.pid)
    assert fault is not None
    assert "ended by itself before step 10" in fault
