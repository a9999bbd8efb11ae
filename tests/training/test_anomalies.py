"""Spikes and values that are not finite: judged alike on all ranks, and answered by each policy."""

from __future__ import annotations

import json
import math
import random
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from equilibrium_mcore.checkpoint import directory
from equilibrium_mcore.config.anomalies import AnomaliesConfig
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.data.ledger.report import as_text, ledger_report
from equilibrium_mcore.parallel.rank_job import RankError, RankInfo
from equilibrium_mcore.training.anomalies import FEWEST, Watch
from equilibrium_mcore.training.metrics import read_metrics
from tests.support.runs import MODEL, tiny_run

# ----------------------------------------------------------------------------------- the test


def noisy(steps: int, seed: int = 0) -> list[float]:
    """A falling curve with noise."""
    generator = random.Random(seed)
    return [5 * math.exp(-k / 80) + 2 + generator.gauss(0, 0.05) for k in range(steps)]


@pytest.mark.parametrize("seed", range(5))
def test_a_falling_noisy_curve_is_sound(seed):
    watch = Watch(AnomaliesConfig())
    assert [watch.judge(loss, loss / 3) for loss in noisy(500, seed)] == [None] * 500
    assert watch.count == 0


def test_a_spike_in_either_value_is_an_anomaly_and_is_not_remembered():
    watch = Watch(AnomaliesConfig(window_steps=32))
    for loss in noisy(40):
        watch.judge(loss, 1.0)
    before = watch.state()
    assert "the loss is 60" in watch.judge(60.0, 1.0)
    assert "the gradient norm is 9" in watch.judge(5.0, 9.0)
    assert "the loss is nan; the gradient norm is inf" in watch.judge(math.nan, math.inf)
    assert watch.state() == {**before, "count": 3}
    assert watch.judge(0.001, 0.001) is None  # below the median is never a spike


def test_too_few_steps_judge_nothing_but_what_is_not_finite():
    watch = Watch(AnomaliesConfig())
    for _ in range(FEWEST - 1):
        assert watch.judge(1.0, 1.0) is None
    assert watch.judge(100.0, 1.0) is None
    assert watch.judge(100.0, 1.0) is not None  # the window is filled enough now
    only_finite = Watch(AnomaliesConfig(window_steps=0))
    assert [only_finite.judge(x, 1.0) for x in (1.0, 1e9)] == [None, None]
    assert only_finite.judge(math.inf, 1.0) is not None


def test_a_resumed_watch_judges_as_the_straight_one():
    straight = Watch(AnomaliesConfig(window_steps=20))
    for loss in noisy(30):
        straight.judge(loss, 1.0)
    resumed = Watch(AnomaliesConfig(window_steps=20))
    resumed.load(json.loads(json.dumps(straight.state())))
    for loss in (2.0, 30.0, 3.9, math.nan):
        assert resumed.judge(loss, 1.0) == straight.judge(loss, 1.0)
    assert resumed.state() == straight.state()


# -------------------------------------------------------------------------------- in real runs

BAD = 6  # the step that spikes
STEPS = 9
EXPERTS = {**MODEL, "moe": {**MODEL["moe"], "score_function": "sigmoid", "expert_bias": True}}


def _train(rank_info: RankInfo, config: RunConfig, *, bad: int | None, what: str) -> Any:
    """The run's own loop and callbacks; the data of step `bad` is damaged when it is read."""
    from equilibrium_mcore.training import step as step_module
    from equilibrium_mcore.training.all_callbacks import build_callbacks
    from equilibrium_mcore.training.loop import Callback, train
    from equilibrium_mcore.training.setup import setup, teardown

    run = setup(config, rank_info)
    before, position = step_module.gradients_of, []
    size = config.training.global_batch_size

    def damaged(run, batches):
        first = run.ranges_of_next_step()[0][0]
        position.append(first)
        if bad is not None and first == (bad - 1) * size:
            for chunk in run.chunks:  # as a bad sample would: this step's gradients, and no other
                weight = list(chunk.parameters())[-1]  # of the output
                saved = weight.data.clone()
                weight.data.mul_(math.nan if what == "nan" else 300.0)
            outputs = before(run, batches)
            for chunk in run.chunks:
                list(chunk.parameters())[-1].data.copy_(saved)
            return outputs
        return before(run, batches)

    step_module.gradients_of = damaged
    biases: list[list[float]] = []

    class Note(Callback):
        def on_step(self, run, outcome):
            biases.append(
                [
                    value
                    for chunk in run.chunks
                    for name, buffer in chunk.named_buffers()
                    if name.endswith("expert_bias")
                    for value in buffer.flatten().tolist()
                ]
            )

    train(run, [*build_callbacks(config), Note()])
    result = {"steps_done": run.optimizer.steps_done, "biases": biases, "positions": position}
    teardown(run)
    return result


def _run(data, folder: Path, policy: str | None, **changes: Any) -> RunConfig:
    anomalies = policy and {"policy": policy, "window_steps": 4, **changes.pop("anomalies", {})}
    training = {"anomalies": anomalies, "steps": STEPS, **changes.pop("training", {})}
    checkpoint = {"save_interval_steps": 2, "keep_last": 9, **changes.pop("checkpoint", {})}
    layout = {"world_size": 2, **changes.pop("parallelism", {})}
    return tiny_run(
        data, folder, training=training, checkpoint=checkpoint, parallelism=layout, **changes
    )


def _curve(folder: Path) -> dict[int, tuple[float, float]]:
    records = read_metrics(folder / "metrics.jsonl")
    return {r["step"]: (r["loss"], r["gradient_norm"]) for r in records if r["kind"] == "train"}


def _event(folder: Path, name: str) -> dict[str, Any]:
    (found,) = [r for r in read_metrics(folder / "metrics.jsonl") if r.get("event") == name]
    return found["details"]


@pytest.mark.parametrize(
    ("what", "asynchronous"),
    [
        ("spike", False),
        ("nan", True),
        pytest.param("spike", True, marks=pytest.mark.slow),
        pytest.param("nan", False, marks=pytest.mark.slow),
    ],
)
def test_a_rollback_is_the_run_without_the_bad_samples(ranks, data, tmp_path, what, asynchronous):
    changes = {"checkpoint": {"asynchronous": asynchronous}}
    spiking = _run(data, tmp_path / "spiking", "rollback", **changes)
    outcome = ranks.run(2, partial(_train, bad=BAD, what=what), spiking)[0]
    size = spiking.training.global_batch_size
    left_out = [[(BAD - 1) * size, size]]
    without = _run(data, tmp_path / "without", None, training={"left_out": left_out})
    ranks.run(2, partial(_train, bad=None, what=what), without)
    assert _curve(tmp_path / "spiking") == _curve(tmp_path / "without")  # to the bit
    assert list(_curve(tmp_path / "spiking")) == list(range(1, STEPS + 1))
    assert outcome["steps_done"] == STEPS
    # The run went back to step 4, and passed over the samples of step 6.
    expected = [0, 1, 2, 3, 4, 5, 4, 6, 7, 8, 9]
    assert outcome["positions"] == [size * step for step in expected]
    event = _event(tmp_path / "spiking", "rollback")
    assert event["failed_step"] == BAD and event["left_out"] == left_out
    assert event["to"].endswith("step_00000004") and "--position 20 --count 4" in event["documents"]
    state = directory.read_state(directory.latest_checkpoint(tmp_path / "spiking"))
    assert state["left_out"] == left_out and state["samples"] == STEPS * size
    _ledgers_agree(tmp_path, size)


def _ledgers_agree(folder: Path, size: int) -> None:
    for step in range(1, STEPS + 1):
        one, other = (
            ledger_report(folder / name, step=step)["samples"] for name in ("spiking", "without")
        )
        assert one == other, step
    shown = ledger_report(folder / "spiking", position=(BAD - 1) * size, count=size, show=True)
    assert len(shown["samples"]) == size and "text" in shown["samples"][0]["documents"][0]
    assert as_text(shown)


def test_a_rollback_that_is_resumed_is_the_same_run(ranks, data, tmp_path):
    """In another layout, from the checkpoint after it, and killed in between."""
    straight = _run(data, tmp_path / "straight", "rollback")
    ranks.run(2, partial(_train, bad=BAD, what="spike"), straight)
    stopped = _run(data, tmp_path / "stopped", "rollback", training={"stop_after_steps": 7})
    ranks.run(2, partial(_train, bad=BAD, what="spike"), stopped)
    resumed = _run(data, tmp_path / "stopped", "rollback")
    ranks.run(2, partial(_train, bad=None, what="spike"), resumed)
    assert _curve(tmp_path / "stopped") == _curve(tmp_path / "straight")


def test_a_margin_leaves_more_out_and_does_not_trust_what_is_newer(ranks, data, tmp_path):
    config = _run(data, tmp_path, "rollback", anomalies={"margin_steps": 2})
    outcome = ranks.run(2, partial(_train, bad=BAD, what="spike"), config)[0]
    size = config.training.global_batch_size
    event = _event(tmp_path, "rollback")
    # Steps 4 to 6 are suspected; the checkpoint of step 4 was saved after one of them.
    assert event["to"].endswith("step_00000002")
    assert event["abandoned"] == ["step_00000004.abandoned-1"]
    assert outcome["positions"][5:8] == [5 * size, 2 * size, 6 * size]
    assert (tmp_path / "checkpoints" / "step_00000004.abandoned-1").is_dir()
    state = directory.read_state(directory.latest_checkpoint(tmp_path))
    assert state["left_out"] == [[3 * size, 3 * size]]


def test_skipping_updates_nothing(ranks, data, tmp_path):
    config = _run(data, tmp_path, "skip", model=EXPERTS)
    outcome = ranks.run(2, partial(_train, bad=BAD, what="nan"), config)[0]
    assert outcome["steps_done"] == STEPS - 1
    biases = outcome["biases"]
    assert biases[BAD - 1] == biases[BAD - 2] != biases[BAD] != []
    assert list(_curve(tmp_path)) == list(range(1, STEPS + 1))
    assert _event(tmp_path, "anomaly")["failed_step"] == BAD


def test_stopping_names_documents_and_the_command(ranks, data, tmp_path):
    config = _run(data, tmp_path, "stop")
    with pytest.raises(RankError) as error:
        ranks.run(2, partial(_train, bad=BAD, what="spike"), config)
    text = str(error.value)
    assert f"step {BAD}: the loss is" in text and "Nothing was updated" in text
    assert "data_ledger.py" in text and "--position 20 --count 4 --show" in text
    assert "first:" in text or "second:" in text  # documents, by source
    assert directory.latest_checkpoint(tmp_path).name == "step_00000004"
    assert _event(tmp_path, "anomaly")["what"] in text


def test_the_number_of_anomalies_is_bounded(ranks, data, tmp_path):
    config = _run(data, tmp_path, "rollback", anomalies={"most": 1, "threshold": 1e-6})
    with pytest.raises(RankError, match=r"anomaly 2 of the run, of 1 that are allowed"):
        ranks.run(2, partial(_train, bad=None, what="spike"), config)


def test_samples_that_were_trained_cannot_be_left_out(ranks, data, tmp_path):
    first = _run(data, tmp_path, None, training={"stop_after_steps": 2})
    ranks.run(2, partial(_train, bad=None, what="spike"), first)
    late = _run(data, tmp_path, None, training={"left_out": [[4, 4]]})
    with pytest.raises(RankError, match=r"training\.left_out=\[\[4, 4\]\]: .*trained on 8 samples"):
        ranks.run(2, partial(_train, bad=None, what="spike"), late)
