"""The plot of runs: what lies on the axes, that a PNG comes out, and what errors say."""

import json
import math
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import matplotlib.pyplot as plt
import numpy as np
import pytest

from equilibrium_mcore.training import plot
from equilibrium_mcore.training.metrics import MetricsWriter, TrainRecord, ValidationRecord

ROOT = Path(__file__).parents[2]


def write_run(directory: Path, *, steps: int = 60, tokens_per_step: int = 1000, **changes) -> Path:
    with MetricsWriter(directory, total_steps=steps, tensorboard=False, console=str) as writer:
        writer.event("start", step=0)
        for step in range(1, steps + 1):
            values = {
                "step": step,
                "tokens": step * tokens_per_step,
                "loss": 9.0 - step / 20,
                "learning_rate": 0.02 * step / steps,
                "learning_rate_adamw": 3e-4,
                "gradient_norm": 1.0,
                "tokens_per_second": 5000.0,
                "model_tflops_per_device": 0.01,
                "memory_gib": 1.0,
                "seconds_per_step": 0.2,
            }
            writer.write(TrainRecord(**(values | changes)))
            if step % 20 == 0:
                loss, entropy = 9.1 - step / 20, 6.25
                writer.write(ValidationRecord(step=step, loss=loss, unigram_entropy=entropy))
        for event in ("signal", "stop", "resume"):
            writer.event(event, step=30)
    return directory


@pytest.fixture
def draw():
    figures = []

    def draw_runs(*runs: Path):
        figures.append(plot.draw([plot.load_curves(run) for run in runs]))
        return figures[-1].axes

    yield draw_runs
    for figure in figures:
        plt.close(figure)


def texts_of(axis) -> str:
    legend = axis.get_legend().get_texts() if axis.get_legend() else []
    return " / ".join(text.get_text() for text in [*axis.texts, *legend])


def test_one_run_shows_everything(tmp_path, draw):
    loss, rates, norm, speed = draw(write_run(tmp_path / "run"))
    raw, trend, points = loss.lines[:3]
    assert raw.get_ydata()[[0, -1]] == pytest.approx([8.95, 6.0])
    assert trend.get_ydata() == pytest.approx(raw.get_ydata())  # a straight line is its own trend
    assert list(points.get_xdata()) == [20, 40, 60]
    assert 6.25 in [line.get_ydata()[0] for line in loss.lines]
    text = texts_of(loss)
    assert "unigram\nentropy 6.25" in text and "bigram" not in text
    assert "signal, stop, resume" in text
    assert "training, last 6.000" in text and "validation, last 6.100" in text
    assert "nats per token" in loss.get_ylabel()
    assert rates.get_yscale() == "log"
    assert rates.lines[0].get_ydata()[-1] == pytest.approx(0.02)
    assert rates.lines[1].get_ydata()[-1] == pytest.approx(3e-4)
    for axis in (loss, rates, norm, speed):
        assert axis.get_ylabel()
        assert [30, 30] in [list(line.get_xdata()) for line in axis.lines]
    assert speed.get_xlabel() == "optimizer step"
    tokens = next(a for a in loss.child_axes if a.get_xlabel() == "tokens")
    tflops = next(a for a in speed.child_axes if "TFLOP/s" in a.get_ylabel())
    loss.figure.canvas.draw()
    assert tokens.get_xlim()[1] == pytest.approx(1000 * loss.get_xlim()[1])
    assert tflops.get_ylim()[1] == pytest.approx(speed.get_ylim()[1] * 0.01 / 5000)


def test_runs_are_told_apart(tmp_path, draw):
    runs = [write_run(tmp_path / "muon"), write_run(tmp_path / "adamw", loss=5.0)]
    loss, *_ = draw(*runs)
    assert "muon (validation last 6.100) / adamw (validation last 6.100)" in texts_of(loss)
    colours = {line.get_color() for line in loss.lines if len(line.get_xdata()) == 60}
    assert colours == set(plot.COLOURS[:2])


def test_runs_with_other_batches_get_no_common_token_axis(tmp_path, draw):
    loss, *_ = draw(write_run(tmp_path / "a"), write_run(tmp_path / "b", tokens_per_step=500))
    assert not loss.child_axes


def test_a_spike_does_not_flatten_the_gradient_norm(tmp_path, draw):
    run = write_run(tmp_path / "run")
    with MetricsWriter(run, total_steps=61, tensorboard=False, console=str, resumed_step=60) as w:
        last = plot.load_curves(run).train[-1]
        spike = {key: value for key, value in last.items() if key != "kind"}
        w.write(TrainRecord(**(spike | {"step": 61, "gradient_norm": 1000.0})))
    norm = draw(run)[2]
    assert norm.get_ylim()[1] < 10
    assert "highest 1e+03, cut off" in texts_of(norm)


def test_trend_follows_a_falling_loss_without_lag():
    steps = np.arange(400.0)
    falling = 3 + 6 * np.exp(-steps / 100)
    assert plot.smooth(falling) == pytest.approx(falling, abs=0.01)


def test_trend_removes_noise_and_keeps_gaps():
    values = 2 + np.random.default_rng(0).normal(0, 0.1, 2000)
    values[[0, 700, 1999]] = np.nan
    trend = plot.smooth(values)
    assert list(np.flatnonzero(np.isnan(trend))) == [0, 700, 1999]
    assert np.nanstd(trend) < 0.03
    assert list(np.flatnonzero(np.isnan(plot.running_median(values)))) == [0, 700, 1999]


def test_median_ignores_a_spike():
    values = np.ones(100)
    values[50] = 1000
    assert plot.running_median(values) == pytest.approx(np.ones(100))


@pytest.mark.parametrize(
    "changes",
    [
        {"steps": 1, "learning_rate": 0.0, "learning_rate_adamw": 0.0},
        {"loss": math.nan, "gradient_norm": math.inf, "tokens_per_second": 0.0},
    ],
    ids=["one step", "no finite number"],
)
@pytest.mark.filterwarnings("error")
def test_odd_runs_give_a_png(tmp_path, changes):
    path = plot.plot_runs([write_run(tmp_path / "run", **changes)])
    height, width, _ = matplotlib.image.imread(path).shape
    assert width > 1000 and height > 1000
    assert path == tmp_path / "run" / "curves.png"
    assert sorted(p.name for p in path.parent.iterdir()) == ["curves.png", "metrics.jsonl"]


def test_the_tool_draws_and_says_where(tmp_path):
    run = write_run(tmp_path / "run", steps=3)
    output = tmp_path / "new" / "both.png"
    command = [sys.executable, "tools/plot_run.py", str(run), str(run / "metrics.jsonl")]
    result = subprocess.run(
        [*command, "--output", str(output)],
        cwd=ROOT,
        env={"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == f"wrote {output}\n"
    assert output.read_bytes().startswith(b"\x89PNG")


def test_errors_name_the_file_and_what_writes_it(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere/metrics\.jsonl.*equilibrium_mcore"):
        plot.plot_runs([tmp_path / "nowhere"])
    run = tmp_path / "started"
    with MetricsWriter(run, total_steps=1, tensorboard=False, console=str) as writer:
        writer.event("start", step=0)
    with pytest.raises(ValueError, match=r"started/metrics\.jsonl.*logging\.interval_steps"):
        plot.plot_runs([run])
    with pytest.raises(ValueError, match=r"must end in \.png"):
        plot.plot_runs([write_run(tmp_path / "run", steps=1)], tmp_path / "curves.jpg")


def test_each_figure_of_the_objective_has_a_panel(draw, tmp_path):
    axes = draw(write_run(tmp_path / "a", figures={"margin": 0.5}), write_run(tmp_path / "b"))
    assert [axis.get_ylabel() for axis in axes].count("margin") == 1


def test_figures_that_belong_together_share_a_panel():
    """And what stands alone, or is not known, has one of its own."""
    from equilibrium_mcore.training.plot_panels import Panel, panels_of

    found = panels_of(["accuracy", "reward", "reward_math", "mine", "kl_old", "pass_at_4"])
    assert found == [
        Panel("held-out answers", ("accuracy", "pass_at_4")),
        Panel("reward", ("reward", "reward_math")),
        Panel("mine", ("mine",)),
        Panel("kl_old", ("kl_old",)),
    ]


def test_evaluations_are_drawn(draw, tmp_path):
    """Beside the training records of the same run."""
    records = [
        {"kind": "evaluation", "step": 0, "accuracy": 0.25, "pass_at_2": 0.5},
        {
            "kind": "train",
            "step": 1,
            "tokens": 8,
            "loss": 0.0,
            "learning_rate": 1e-3,
            "learning_rate_adamw": 1e-3,
            "gradient_norm": 1.0,
            "tokens_per_second": 1.0,
            "reward": 0.5,
            "reward_math": 0.5,
        },
        {"kind": "evaluation", "step": 1, "accuracy": 0.75, "pass_at_2": 1.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    labels = {axis.get_ylabel(): axis for axis in draw(tmp_path)}
    accuracy = labels["held-out answers"].get_lines()[0]
    assert accuracy.get_ydata().tolist() == [0.25, 0.75]
    assert "reward" in labels
