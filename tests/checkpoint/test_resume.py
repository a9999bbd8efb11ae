"""Saving, resuming and resharding the whole state of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from equilibrium_mcore.checkpoint import directory
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.parallel.launch import RankInfo
from tests.support.pool import RankError
from tests.support.runs import MODEL, tiny_run, train_steps

LAYOUT = {"world_size": 4, "tensor": 2, "sequence": True, "expert": 2}
OTHERS: dict[str, tuple[int, dict[str, Any]]] = {
    "one_rank": (1, {}),
    "pp2_cp2_ep2": (4, {"pipeline": 2, "context": 2, "expert": 2}),
    "dp4": (4, {}),
}


@pytest.fixture(scope="module")
def straight(ranks, data, tmp_path_factory) -> dict[str, Any]:
    """20 steps in one process, in the layout of the halves."""
    config = tiny_run(data, tmp_path_factory.mktemp("straight"), parallelism=LAYOUT)
    return ranks.run(4, train_steps, config, 20)[0]


@pytest.fixture(scope="module")
def first_half(ranks, data, tmp_path_factory) -> Path:
    """A run directory with a checkpoint after 10 steps."""
    folder = tmp_path_factory.mktemp("half")
    ranks.run(4, train_steps, tiny_run(data, folder, parallelism=LAYOUT), 10, True)
    return folder


def test_resume_in_the_same_layout_is_bit_exact(ranks, data, straight, first_half):
    config = tiny_run(data, first_half, parallelism=LAYOUT)
    second = ranks.run(4, train_steps, config, 10)[0]
    assert second["start"] == 10
    for name in ("loss", "norm", "aux"):
        assert second[name] == straight[name][10:], name


@pytest.mark.parametrize("name", OTHERS)
def test_resume_in_another_layout_goes_on(ranks, data, straight, first_half, name):
    """Includes Muon's and AdamW's state, the schedule and the position in the data."""
    world_size, parallelism = OTHERS[name]
    config = tiny_run(data, first_half, parallelism={"world_size": world_size, **parallelism})
    second = ranks.run(world_size, train_steps, config, 10)[0]
    assert second["start"] == 10
    assert second["loss"] == pytest.approx(straight["loss"][10:], rel=1e-4)


def test_lost_momentum_would_be_seen(ranks, data, straight, first_half):
    """The test above can fail: without optimizer state the curve leaves the straight one."""
    config = tiny_run(
        data,
        first_half / "fresh",
        parallelism=LAYOUT,
        checkpoint={"initial_weights": str(first_half), "resume": "never"},
    )
    second = ranks.run(4, train_steps, config, 10)[0]
    assert second["loss"] != pytest.approx(straight["loss"][10:], rel=1e-4)


def test_bf16_main_weights_are_resumed(ranks, data, tmp_path):
    training = {"precision": "bf16"}
    straight = tiny_run(data, tmp_path / "a", parallelism={"world_size": 2}, training=training)
    halves = tiny_run(data, tmp_path / "b", parallelism={"world_size": 2}, training=training)
    whole = ranks.run(2, train_steps, straight, 6)[0]
    ranks.run(2, train_steps, halves, 3, True)
    assert ranks.run(2, train_steps, halves, 3)[0]["loss"] == whole["loss"][3:]


def test_a_config_that_does_not_fit_is_refused_with_every_difference(ranks, data, first_half):
    model = {**MODEL, "hidden_size": 128, "mlp": {"ffn_hidden_size": 64}}
    config = tiny_run(
        data, first_half, parallelism={"world_size": 1}, model=model, training={"seed": 7}
    )
    with pytest.raises(RankError) as caught:
        ranks.run(1, train_steps, config, 1)
    for text in (
        "model.hidden_size=128 differs from the checkpoint's 64",
        "model.mlp.ffn_hidden_size=64 differs from the checkpoint's 96",
        "training.seed=7 differs from the checkpoint's 1234",
        "checkpoint.initial_weights=",
    ):
        assert text in str(caught.value)


def test_more_steps_would_reorder_the_data_and_need_a_horizon(ranks, data, tmp_path):
    data = {**data, "order": "megatron"}
    start = tiny_run({**data, "train_samples": 200}, tmp_path)
    ranks.run(1, train_steps, start, 2, True)
    longer = {"steps": 40}
    with pytest.raises(RankError, match="data.train_samples=200"):
        ranks.run(1, train_steps, tiny_run(data, tmp_path, training=longer), 1)
    prolonged = tiny_run({**data, "train_samples": 200}, tmp_path, training=longer)
    assert ranks.run(1, train_steps, prolonged, 1)[0]["start"] == 2


def _die_while_saving(rank_info: RankInfo, config: RunConfig) -> None:
    """Train two steps and save; rank 1 ends as if killed, in the middle of the save."""
    import os

    from equilibrium_mcore.checkpoint import background

    if rank_info.rank == 1:
        background.write_data_file = lambda file: os._exit(9)
    train_steps(rank_info, config, 2, True)


def test_a_save_that_is_killed_never_becomes_latest(ranks, data, tmp_path):
    config = tiny_run(data, tmp_path, parallelism={"world_size": 2})
    ranks.run(2, train_steps, config, 2, True)
    assert directory.latest_checkpoint(tmp_path).name == "step_00000002"
    with pytest.raises(RankError):
        ranks.run(2, _die_while_saving, config)
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert [name.endswith(".partial") for name in left] == [False, False, True]
    assert "step_00000004" not in left
    assert directory.latest_checkpoint(tmp_path).name == "step_00000002"
    # The next save clears the remains away.
    assert ranks.run(2, train_steps, config, 2, True)[0]["start"] == 2
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == ["latest", "step_00000002", "step_00000004"]


def test_the_number_kept_is_bounded(ranks, data, tmp_path):
    config = tiny_run(data, tmp_path, checkpoint={"keep_last": 2})
    for _ in range(4):
        ranks.run(1, train_steps, config, 1, True)
    names = [path.name for path in directory.list_checkpoints(tmp_path)]
    assert names == ["step_00000003", "step_00000004"]


def test_resume_must_needs_a_checkpoint(ranks, data, tmp_path):
    config = tiny_run(data, tmp_path, checkpoint={"resume": "must"})
    with pytest.raises(RankError, match="checkpoint.resume=must"):
        ranks.run(1, train_steps, config, 1)


def test_state_file_tells_step_layout_and_versions(first_half):
    state = json.loads((directory.latest_checkpoint(first_half) / "state.json").read_text())
    assert (state["step"], state["samples"], state["tokens"]) == (10, 40, 2560)
    assert state["layout"]["tensor"] == 2
    assert state["world_size"] == 4
    assert state["versions"]["megatron-core"].startswith("0.19")
