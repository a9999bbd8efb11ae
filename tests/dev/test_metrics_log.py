"""The development log's tables: figures of runs, and the best of all times."""

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path

import pytest

from tools.dev import metrics_log

ROOT = Path(__file__).resolve().parents[2]
LOG = f"# Log\n\nBefore.\n\n{metrics_log.BEGIN}\n{metrics_log.END}\n\nAfter.\n"


@pytest.fixture
def make_run(tmp_path):
    def write(name: str, *, loss: float, speed: float, date: str, **config) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        train = {"kind": "train", "loss": loss, "tokens_per_second": speed, "memory_gib": 2.0}
        # A spike at the start, and one slow interval: neither decides a figure.
        records = [{**train, "step": 1, "loss": 99.0, "tokens_per_second": 1.0, "memory_gib": 1.0}]
        records += [{**train, "step": step} for step in range(2, 14)]
        validation = {"kind": "validation", "loss": loss, "perplexity": 10 * loss}
        records += [{**validation, "step": 0, "perplexity": 1.0}, {**validation, "step": 13}]
        path = folder / "metrics.jsonl"
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
        (folder / "config.yaml").write_text(json.dumps({"name": name, **config}))
        when = datetime.fromisoformat(f"{date}T12:00").replace(tzinfo=UTC).timestamp()
        os.utime(path, (when, when))
        return folder

    return write


def rows(text: str) -> dict[str, list[str]]:
    """By metric: target, current, best, date."""
    cells = [line.strip("| ").split("|") for line in text.splitlines() if line.startswith("| ")]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in cells}


def test_figures_of_a_run(make_run):
    run = metrics_log.read_run(make_run("small", loss=3.0, speed=2000.0, date="2026-11-26"))
    table = rows(metrics_log.updated(LOG, [run]))
    day = "2026-11-26"
    assert table["Training Loss"] == ["< 2.5", "3.000 (small)", f"3.000 (small, {day})", day]
    assert table["Validation Perplexity"] == ["< 15", "30.0 (small)", f"30.0 (small, {day})", day]
    assert table["Throughput (tokens/sec)"][1] == "2,000 (small)"
    assert table["Memory Usage (GB)"][1] == "2.15 (small)"  # 2 GiB
    assert table["MMLU"] == ["> 60%", "not run", "not run"]  # and no date


def test_the_latest_run_is_current_and_the_best_stays(make_run):
    good = metrics_log.read_run(make_run("good", loss=2.0, speed=500.0, date="2026-11-20"))
    late = metrics_log.read_run(make_run("late", loss=3.0, speed=900.0, date="2026-11-24"))
    for runs in ([good, late], [late, good]):
        table = rows(metrics_log.updated(LOG, runs))
        loss = ["< 2.5", "3.000 (late)", "2.000 (good, 2026-11-20)", "2026-11-24"]
        assert table["Training Loss"] == loss
        assert table["Throughput (tokens/sec)"][2] == "900 (late, 2026-11-24)"
    # Later the good run's files are gone, and the log alone knows it.
    first = metrics_log.updated(LOG, [good])
    later = rows(metrics_log.updated(first, [late]))
    assert later["Training Loss"][2] == "2.000 (good, 2026-11-20)"
    assert later["Training Loss"][1] == "3.000 (late)"
    better = make_run("better", loss=1.5, speed=12_345.0, date="2026-11-25")
    last = rows(metrics_log.updated(first, [metrics_log.read_run(better)]))
    assert last["Training Loss"][2] == "1.500 (better, 2026-11-25)"
    assert last["Throughput (tokens/sec)"][2] == "12,345 (better, 2026-11-25)"


def test_only_what_stands_between_the_markers_changes(make_run):
    run = metrics_log.read_run(make_run("small", loss=3.0, speed=2000.0, date="2026-11-26"))
    text = metrics_log.updated(LOG, [run])
    assert text.startswith("# Log\n\nBefore.\n") and text.endswith("\n\nAfter.\n")
    assert metrics_log.updated(text, [run]) == text
    with pytest.raises(ValueError, match="must hold the lines"):
        metrics_log.updated("# Log\n", [run])


def test_the_tool_rewrites_the_log_and_refuses_other_runs(make_run, tmp_path):
    log = tmp_path / "log.md"
    log.write_text(LOG)

    def tool(*words: Path | str) -> subprocess.CompletedProcess:
        command = [sys.executable, ROOT / "tools" / "dev" / "metrics_log.py", *words, "--log", log]
        return subprocess.run(command, capture_output=True, text=True)

    done = tool(make_run("small", loss=3.0, speed=2000.0, date="2026-11-26"))
    assert done.returncode == 0, done.stderr
    assert "3.000 (small)" in log.read_text()
    before = log.read_text()
    chat = make_run("chat", loss=1.0, speed=1.0, date="2026-11-27", stage="sft")
    for folder, said in ((chat, "of the stage sft"), (tmp_path / "nowhere", "does not exist")):
        wrong = tool(folder)
        assert wrong.returncode == 1 and said in wrong.stderr
    assert log.read_text() == before


def test_the_projects_own_log_is_one_that_the_tool_writes():
    """Its lines and targets are the tool's, and its best figures are read back."""
    written = metrics_log.LOG.read_text(encoding="utf-8")
    again = rows(metrics_log.tables([], written))
    mine = rows(written.partition(metrics_log.BEGIN)[2].partition(metrics_log.END)[0])
    assert mine.keys() == again.keys()
    assert [mine[name][0] for name in mine] == [again[name][0] for name in mine]
    assert [mine[name][2] for name in mine] == [again[name][2] for name in mine]
    assert "(" in mine["Validation Perplexity"][2]
