"""Whole runs: what they say and do about damage, and about a state that is not finite."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from equilibrium_mcore.checkpoint import directory
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.parallel.launch import RankInfo
from tests.checkpoint.support import MODEL, flip, make_old
from tests.support.runs import tiny_run


def _train(rank_info: RankInfo, config: RunConfig) -> int:
    """A whole run, as the main job does it; the step at which it started."""
    from equilibrium_mcore.training.all_callbacks import build_callbacks
    from equilibrium_mcore.training.loop import train
    from equilibrium_mcore.training.setup import setup, teardown

    run = setup(config, rank_info)
    start = run.progress.step
    train(run, build_callbacks(config))
    teardown(run)
    return start


def _events(folder: Path) -> dict[str, Any]:
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {r["event"]: r["details"] for r in records if r["kind"] == "event"}


def _until(config: RunConfig, step: int) -> RunConfig:
    training = config.training.model_copy(update={"stop_after_steps": step})
    return config.model_copy(update={"training": training})


def test_a_damaged_newest_one_is_told_trained_again_and_kept(ranks, copied, config):
    flip(copied / "checkpoints" / "step_00000003" / "__1_0.distcp")
    assert ranks.run(2, _train, _until(config(), 3)) == [2, 2]
    events = _events(copied)
    assert events["damaged"]["checkpoint"] == "step_00000003"
    assert events["damaged"]["what"].startswith("__1_0.distcp: expected sha256")
    assert events["verified"]["checkpoint"] == "step_00000002"
    assert events["left_alone"]["checkpoints"].startswith("step_00000003 (of another run")
    assert events["renamed"] == {"checkpoint": "step_00000003", "to": "step_00000003.abandoned-1"}
    # Two are kept of the run's own line, and what it did not write besides.
    names = sorted(path.name for path in (copied / "checkpoints").iterdir())
    assert names == ["latest", "step_00000002", "step_00000003", "step_00000003.abandoned-1"]
    assert directory.latest_checkpoint(copied).name == "step_00000003"


def test_old_checkpoints_are_continued_and_it_is_told(ranks, copied, config):
    for path in directory.list_checkpoints(copied):
        make_old(path)
    (copied / "checkpoints" / "latest").unlink()
    assert ranks.run(2, _train, _until(config(), 4)) == [3, 3]
    events = _events(copied)
    assert "before there were manifests" in events["unverified"]["reason"]
    assert events["latest_lost"]["what"] == "is missing"
    assert [path.name for path in directory.list_checkpoints(copied)] == [
        "step_00000003",
        "step_00000004",
    ]


def _save_spoilt(rank_info: RankInfo, config: RunConfig) -> dict[str, str]:
    """The errors of saves in which one number, of the last rank's state, is not finite."""
    import torch

    from equilibrium_mcore.training.callbacks import LogCallback
    from equilibrium_mcore.training.saving import CheckpointCallback
    from equilibrium_mcore.training.setup import setup

    run = setup(config, rank_info)
    run.optimizer.init_state()
    tensors = {}
    for parameter in run.optimizer.parameters:
        if parameter.is_owned:
            tensors = {"model": parameter.model, **run.optimizer.state_of(parameter), **tensors}
    run.progress.step = 4
    errors = {}
    for name in ("model", "main", "momentum", "exp_avg_sq"):
        is_last = rank_info.rank == rank_info.world_size - 1
        spoilt = tensors[name].data.view(-1) if is_last else torch.zeros(1)
        held = spoilt[0].clone()
        spoilt[0] = float("-inf" if name == "main" else "nan")
        with pytest.raises(FloatingPointError) as caught:
            CheckpointCallback(config, LogCallback(config)).on_end(run, reason="stop")
        spoilt[0] = held
        errors[name] = str(caught.value)
    CheckpointCallback(config, LogCallback(config)).on_end(run, reason="stop")
    torch.distributed.barrier()
    return errors


def test_a_state_that_is_not_finite_never_becomes_latest(ranks, data, tmp_path):
    layout, training = {"world_size": 2}, {"precision": "bf16"}
    config = tiny_run(data, tmp_path, model=MODEL, parallelism=layout, training=training)
    first, second = ranks.run(2, _save_spoilt, config)
    assert first == second and first.keys() == {"model", "main", "momentum", "exp_avg_sq"}
    for name, text in first.items():
        tensor = "" if name == "model" else f"optimizer.{name}."
        assert re.search(rf"step 4: {tensor}(decoder|embedding|output_layer)\.", text)
        assert "(rank 1)" in text and "not finite" in text
        assert "no checkpoint was written. There is none before." in text
    # What the last save, of a finite state, wrote is all that there is.
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["latest", "step_00000004"]


BALANCED = {**MODEL, "layer_pattern": "ME"}
UNBALANCED = {**BALANCED, "moe": {**MODEL["moe"], "load_balancing": "none"}}
CHANGED = {"model.moe.load_balancing": "seq_aux_loss -> none"}


def test_what_changed_of_balancing_is_told(ranks, data, tmp_path):
    """At a resume and with initial weights, once; nothing is told where nothing changed."""
    first, second = tmp_path / "first", tmp_path / "second"
    one = {"parallelism": {"world_size": 1}}
    balanced = tiny_run(data, first, model=BALANCED, **one)
    ranks.run(1, _train, _until(balanced, 1))
    ranks.run(1, _train, _until(balanced, 2))
    assert "settings_changed" not in _events(first)
    weights = {"initial_weights": str(first)}
    unbalanced = tiny_run(data, second, model=UNBALANCED, checkpoint=weights, **one)
    ranks.run(1, _train, _until(unbalanced, 1))
    assert _events(second)["settings_changed"] == CHANGED
    frozen = unbalanced.training.model_copy(update={"frozen": ["embedding.*"]})
    resumed = tiny_run(data, first, model=UNBALANCED, **one)
    resumed = _until(resumed.model_copy(update={"training": frozen}), 3)
    assert ranks.run(1, _train, resumed) == [2]
    assert _events(first)["settings_changed"] == {
        **CHANGED,
        "training.frozen": "[] -> ['embedding.*']",
    }
    lines = (first / "metrics.jsonl").read_text().splitlines()
    assert sum('"settings_changed"' in line for line in lines) == 1
