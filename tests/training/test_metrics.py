"""Metric records, the JSONL file over a kill and a resume, TensorBoard, and the console line."""

import json
import math
import subprocess
import sys

import psutil
import pytest
import torch

from equilibrium_mcore.files.json_lines import json_line
from equilibrium_mcore.training.metrics import (
    EventRecord,
    JsonlWriter,
    MetricsWriter,
    TrainRecord,
    ValidationRecord,
    format_record,
    human,
    memory_gib,
    perplexity_of,
    read_metrics,
    record_values,
)
from tests.support.runs import tiny_run


def train_record(step: int, **changes) -> TrainRecord:
    values = {
        "step": step,
        "tokens": step * 10_240,
        "loss": 4.1234,
        "aux_loss": 0.0121,
        "learning_rate": 0.02,
        "learning_rate_adamw": 3e-4,
        "gradient_norm": 0.871,
        "tokens_per_second": 5_123.0,
        "model_tflops_per_device": 0.0123,
        "memory_gib": 1.23,
        "seconds_per_step": 2.0,
    }
    return TrainRecord(**(values | changes))


def steps_of(records: list[dict], kind: str) -> list[int]:
    return [record["step"] for record in records if record["kind"] == kind]


def console_of(lines: list[str]) -> dict:
    return {"total_steps": 400, "tensorboard": False, "console": lines.append}


def test_a_record_reads_back_as_written(tmp_path):
    lines: list[str] = []
    with MetricsWriter(tmp_path, **console_of(lines)) as writer:
        writer.event("start", step=0, ranks=4)
        writer.write(train_record(1))
        writer.write(ValidationRecord(step=1, loss=4.0, unigram_entropy=6.1, bigram_entropy=3.9))
    start, train, validation = read_metrics(tmp_path / "metrics.jsonl")
    assert start == {"kind": "event", "event": "start", "step": 0, "details": {"ranks": 4}}
    assert train["kind"] == "train"
    assert train["loss"] == 4.1234
    assert train["utilization"] is None
    assert train["learning_rate_adamw"] == 3e-4
    assert validation == {
        "kind": "validation",
        "step": 1,
        "loss": 4.0,
        "perplexity": None,
        "unigram_entropy": 6.1,
        "bigram_entropy": 3.9,
    }
    assert len(lines) == 3


def test_each_record_is_in_the_file_before_the_next_one(tmp_path):
    writer = JsonlWriter(tmp_path / "metrics.jsonl")
    for step in (1, 2, 3):
        writer.write(train_record(step))
        assert steps_of(read_metrics(writer.path), "train") == list(range(1, step + 1))
    writer.close()


def test_numbers_that_are_not_finite_are_null_in_strict_json(tmp_path):
    record = train_record(1, loss=math.nan, gradient_norm=math.inf)
    line = json_line(record_values(record))
    values = json.loads(line, parse_constant=pytest.fail)
    assert values["loss"] is None and values["gradient_norm"] is None
    assert "loss    nan" in format_record(record, total_steps=400)


def test_resume_keeps_each_step_once_and_survives_a_cut_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(tmp_path, **console_of([])) as writer:
        for step in range(1, 6):
            writer.write(train_record(step, loss=1.0))
    with path.open("a") as file:
        file.write('{"kind": "train", "step": 6, "lo')

    with MetricsWriter(tmp_path, resumed_step=3, **console_of([])) as writer:
        assert writer.dropped_records == 2
        writer.event("resume", step=3)
        for step in range(4, 8):
            writer.write(train_record(step, loss=2.0))
    records = read_metrics(path)
    assert steps_of(records, "train") == [1, 2, 3, 4, 5, 6, 7]
    assert [r["loss"] for r in records if r["kind"] == "train"] == [1.0] * 3 + [2.0] * 4
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_new_start_moves_the_old_file_to_the_archive(tmp_path):
    for loss in (1.0, 2.0):
        with MetricsWriter(tmp_path, **console_of([])) as writer:
            writer.write(train_record(1, loss=loss))
    assert [r["loss"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [2.0]
    assert [r["loss"] for r in read_metrics(tmp_path / "archive/1/metrics.jsonl")] == [1.0]


def test_reading_leaves_out_a_cut_last_line_only(tmp_path):
    path = tmp_path / "metrics.jsonl"
    good = json_line(record_values(train_record(1)))
    # Cut inside a two-byte character, as a kill may do it.
    path.write_bytes(good + '{"kind": "event", "x": "é'.encode()[:-1])
    assert steps_of(read_metrics(path), "train") == [1]
    path.write_bytes(good + b'{"kind": "tr\n' + good)
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        read_metrics(path)


def test_reading_a_missing_file_says_what_writes_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl.*equilibrium_mcore\.train"):
        read_metrics(tmp_path / "metrics.jsonl")


def test_an_unknown_event_is_refused():
    with pytest.raises(ValueError, match="'pause' must be one of start, resume"):
        EventRecord(event="pause", step=1)


def test_console_line():
    assert format_record(train_record(120), total_steps=400) == (
        "step 120/400 | tokens  1.2M | loss  4.123 | aux 0.012 | lr 2.0e-02 | grad   0.87 | "
        " 5.1k tok/s | 0.012 TFLOP/s |  1.2 GiB"
    )
    dense = format_record(train_record(5, aux_loss=None, utilization=0.412), total_steps=400)
    assert dense.startswith("step   5/400 | ")
    assert "aux" not in dense and "| 41.2% |" in dense
    validation = ValidationRecord(step=5, loss=4.0, unigram_entropy=6.125)
    assert format_record(validation, total_steps=400) == (
        "step   5/400 | validation loss 4.000 | unigram entropy 6.125"
    )
    with_perplexity = ValidationRecord(step=5, loss=11.09, perplexity=perplexity_of(11.09))
    assert format_record(with_perplexity, total_steps=400) == (
        "step   5/400 | validation loss 11.090 | perplexity 65,512.75"
    )
    stop = EventRecord(event="stop", step=5, details={"reason": "SIGTERM"})
    assert format_record(stop, total_steps=400) == "step   5/400 | stop: reason SIGTERM"


def test_console_lines_align_over_a_run():
    records = [
        train_record(1, loss=11.09, gradient_norm=31.7, tokens_per_second=950.0),
        train_record(400, loss=2.0, tokens_per_second=1.2e6, model_tflops_per_device=312.4),
    ]
    first, last = (format_record(record, total_steps=400) for record in records)
    assert [i for i, c in enumerate(first) if c == "|"] == [
        i for i, c in enumerate(last) if c == "|"
    ]


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0"), (950, "950"), (999.7, "1.0k"), (5_123, "5.1k"), (32_768, "32.8k")]
    + [(999_600, "1.0M"), (120e6, "120M"), (1.25e9, "1.2B"), (2.5e12, "2.5T"), (99_960, "100k")],
)
def test_human_counts(count, text):
    assert human(count) == text
    assert len(text) <= 5


def test_tensorboard_gets_the_numbers(tmp_path):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    with MetricsWriter(tmp_path, total_steps=9, console=str) as writer:
        writer.write(train_record(1, loss=3.0))
        writer.write(train_record(2, loss=2.0))
    # Step 2 is trained again after a resume at 1: the old value must not be shown.
    with MetricsWriter(tmp_path, total_steps=9, console=str, resumed_step=1) as writer:
        writer.write(train_record(2, loss=1.5))
        writer.write(ValidationRecord(step=2, loss=1.0))
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    loss = [(event.step, event.value) for event in events.Scalars("train/loss")]
    assert loss == [(1, 3.0), (2, 1.5)]
    assert [event.value for event in events.Scalars("validation/loss")] == [1.0]


def test_tensorboard_off_writes_none(tmp_path):
    MetricsWriter(tmp_path, **console_of([])).close()
    assert not (tmp_path / "tensorboard").exists()


def test_missing_wandb_says_how_to_go_on(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # Python's own way to say: not installed
    with pytest.raises(ImportError, match="pip install wandb"):
        MetricsWriter(tmp_path, wandb_project="hybrids", **console_of([]))


def test_memory_is_the_peak_of_this_process_in_gib():
    if torch.cuda.is_available():
        pytest.skip("with a GPU it is the GPU's memory")
    block = b"x" * 2**28  # a quarter GiB, touched
    resident_gib = psutil.Process().memory_info().rss / 2**30
    assert len(block) / 2**30 < resident_gib < memory_gib() + 0.01 < 64


def test_reading_metrics_does_not_import_torch():
    code = "import sys, equilibrium_mcore.training.metrics; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_figures_of_an_objective_stand_beside_the_loss(tmp_path):
    lines: list[str] = []
    with MetricsWriter(tmp_path, **console_of(lines)) as writer:
        writer.write(train_record(1, figures={"margin": 0.25}))
        writer.write(ValidationRecord(step=1, loss=4.0, figures={"margin": 0.5}))
    train, validation = read_metrics(tmp_path / "metrics.jsonl")
    assert train["margin"] == 0.25 and validation["margin"] == 0.5 and "figures" not in train
    assert "margin 0.250" in lines[0] and "margin 0.500" in lines[1]


def test_a_figure_never_hides_a_field():
    with pytest.raises(ValueError, match="gradient_norm"):
        record_values(train_record(1, figures={"gradient_norm": 0.0}))


@pytest.mark.parametrize(
    ("loss", "perplexity"),
    [(0.0, 1.0), (math.log(32_000), 32_000.0), (709.0, math.exp(709.0))],
)
def test_perplexity_is_exp_of_the_loss(loss, perplexity):
    assert perplexity_of(loss) == pytest.approx(perplexity, rel=1e-12)


@pytest.mark.parametrize("loss", [710.0, math.inf, math.nan])
def test_a_perplexity_that_overflows_is_null(loss, tmp_path):
    with MetricsWriter(tmp_path, **console_of([])) as writer:
        writer.write(train_record(1, loss=loss, perplexity=perplexity_of(loss)))
    assert read_metrics(tmp_path / "metrics.jsonl")[0]["perplexity"] is None


def test_tensorboard_gets_the_perplexity_where_there_is_one(tmp_path):
    event_accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator"
    )
    with MetricsWriter(tmp_path, total_steps=9, console=str) as writer:
        writer.write(train_record(1, perplexity=20.5))
        writer.write(train_record(2, perplexity=None))
        writer.write(ValidationRecord(step=2, loss=1.0, perplexity=2.75))
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    for name, expected in (("train", [(1, 20.5)]), ("validation", [(2, 2.75)])):
        scalars = events.Scalars(f"{name}/perplexity")
        assert [(event.step, event.value) for event in scalars] == expected


def trained(rank_info, config, has_perplexity: bool) -> None:
    """Two steps of a run with its log and its validations."""
    from equilibrium_mcore.training.callbacks import LogCallback, ValidationCallback
    from equilibrium_mcore.training.loop import train
    from equilibrium_mcore.training.setup import setup, teardown

    run = setup(config, rank_info)
    run.objective.has_perplexity = has_perplexity
    log = LogCallback(config)
    train(run, [log, ValidationCallback(config, log)])
    teardown(run)


@pytest.mark.parametrize("has_perplexity", [True, False])
def test_a_run_logs_perplexity_where_its_loss_has_one(ranks, data, tmp_path, has_perplexity):
    training = {"steps": 2, "validation_interval_steps": 1, "validation_batches": 1}
    config = tiny_run(data, tmp_path, training=training, parallelism={"world_size": 1})
    ranks.run(1, trained, config, has_perplexity)
    records = [r for r in read_metrics(tmp_path / "metrics.jsonl") if r["kind"] != "event"]
    assert [record["kind"] for record in records].count("validation") == 3
    for record in records:
        expected = pytest.approx(math.exp(record["loss"])) if has_perplexity else None
        assert record["perplexity"] == expected


def test_a_broken_line_does_not_block_a_resume_and_is_kept(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(tmp_path, **console_of([])) as writer:
        for step in (1, 2, 3):
            writer.write(train_record(step))
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "\x00\x00 not a record", *lines[1:]]) + "\n")
    with pytest.raises(ValueError, match="line 2: no record"):
        read_metrics(path)
    with MetricsWriter(tmp_path, resumed_step=2, **console_of([])) as writer:
        writer.write(train_record(3))
    assert [record["step"] for record in read_metrics(path)] == [1, 2, 3]
    (kept,) = (tmp_path / "archive").glob("*/metrics.jsonl")
    assert "not a record" in kept.read_text()
