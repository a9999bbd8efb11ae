"""A weight that one rank has damaged is seen at that step, with rank and parameter."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.optim.replicas import checksum
from equilibrium_mcore.parallel.rank_job import RankError, RankInfo
from tests.support.runs import tiny_run

ALL_UPDATE = {"world_size": 2, "distributed_optimizer": False}
MIXED = {"world_size": 4, "tensor": 2, "sequence": True, "expert": 2}
LAYOUTS = {  # the rank that is damaged, and what is said of it
    "dp2": ({"world_size": 2}, 1, "is not the same on ranks 0, 1"),
    "dp2, every rank updates": (ALL_UPDATE, 1, "is not the same on ranks 0, 1"),
    "dp4": ({"world_size": 4}, 2, "on rank 2 is not that of the others (ranks 0, 1, 2, 3)"),
    "tp2, sp, ep2, dp2": (MIXED, 2, "is not the same on ranks 0, 2"),
}


def _train(rank_info: RankInfo, config: RunConfig, *, damaged: int, wanted: str, by: str) -> int:
    from equilibrium_mcore.training.setup import setup, teardown
    from equilibrium_mcore.training.step import train_step

    run = setup(config, rank_info)
    train_step(run)
    if rank_info.rank == damaged:
        parameter = next(p for p in run.optimizer.parameters if p.name.endswith(wanted))
        flat = parameter.model.data.view(-1)
        if by == "a factor":
            flat[0] *= 1e4
        else:  # one bit, the least: no norm or loss would show it
            flat[:1].view(torch.int32).bitwise_xor_(1)
    train_step(run)
    teardown(run)
    return run.progress.step


@pytest.mark.parametrize("by", ["a factor", "one bit"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_damaged_replica_is_named(ranks, data, tmp_path, layout, by):
    parallelism, damaged, where = LAYOUTS[layout]
    config = tiny_run(data, tmp_path, parallelism=parallelism)
    wanted = "final_norm.weight"
    work = partial(_train, damaged=damaged, wanted=wanted, by=by)
    with pytest.raises(RankError) as error:
        ranks.run(parallelism["world_size"], work, config)
    text = str(error.value)
    assert "step 2: replicas of weights differ before the update: " in text
    assert f"{wanted} {where}" in text
    assert error.value.told and "Traceback" not in text


def _damage_main(rank_info: RankInfo, config: RunConfig, *, wanted: str) -> int:
    from equilibrium_mcore.training.setup import setup, teardown
    from equilibrium_mcore.training.step import train_step

    run = setup(config, rank_info)
    train_step(run)
    for parameter in run.optimizer.parameters:
        if parameter.is_owned and parameter.name.endswith(wanted):
            parameter.main.data.view(-1)[3] *= 1.1  # more than a bfloat16 rounds away
    train_step(run)
    teardown(run)
    return run.progress.step


@pytest.mark.parametrize("schedule_free", [False, True])
def test_a_damaged_main_weight_is_named(ranks, data, tmp_path, schedule_free):
    changes: dict = {"training": {"precision": "bf16"}, "parallelism": {"world_size": 2}}
    if schedule_free:  # whose weights are made of two
        schedule = {"kind": "constant", "warmup_steps": 2}
        changes["optimizer"] = {"schedule_free": {}, "schedule": schedule}
    config = tiny_run(data, tmp_path, **changes)
    work = partial(_damage_main, wanted="final_norm.weight")
    with pytest.raises(RankError, match="final_norm.weight on rank .: its main weight is not that"):
        ranks.run(2, work, config)


def _damage_update(rank_info: RankInfo, config: RunConfig, *, wanted: str, what: str) -> int:
    from equilibrium_mcore.training.setup import setup, teardown
    from equilibrium_mcore.training.step import train_step

    run = setup(config, rank_info)
    train_step(run)
    for parameter in run.optimizer.parameters:
        if parameter.main is None or not parameter.name.endswith(wanted):
            continue
        optimizer = next(o for o in run.optimizer._optimizers if parameter.main in o.state)
        if what == "state":  # as if a kernel had cleared a part of it
            optimizer.state[parameter.main]["exp_avg_sq"].view(-1)[1] = 0
            optimizer.state[parameter.main]["exp_avg"].view(-1)[1] = 1
        else:
            _write_after(optimizer, parameter.main)
    train_step(run)
    teardown(run)
    return run.progress.step


def _write_after(optimizer, main: torch.Tensor) -> None:
    """Let the step write an element that no update makes."""
    step = optimizer.step

    def damaged() -> None:
        step()
        main.data.view(-1)[5] += 0.5

    optimizer.step = damaged


DAMAGES = {  # precision, layout, what is damaged, in which parameter
    "state, fp32": ("fp32", {"world_size": 2}, "state", "final_norm.weight"),
    "state, one rank": ("bf16", {"world_size": 1}, "state", "final_norm.weight"),
    "update of muon": ("bf16", {"world_size": 2}, "update", "layers.0.mixer.in_proj.weight"),
    "update, mixed": ("fp32", MIXED, "update", "final_norm.weight"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_an_update_that_no_optimizer_makes_is_named(ranks, data, tmp_path, damage):
    precision, parallelism, what, wanted = DAMAGES[damage]
    config = tiny_run(data, tmp_path, parallelism=parallelism, training={"precision": precision})
    work = partial(_damage_update, wanted=wanted, what=what)
    with pytest.raises(RankError) as error:
        ranks.run(parallelism["world_size"], work, config)
    text = str(error.value)
    assert "step 2: an element changed by more than its optimizer can change it: " in text
    assert f"{wanted} of rank " in text and ", where " in text


def test_it_can_be_left_out(ranks, data, tmp_path):
    training = {"compare_replicas": False}
    config = tiny_run(data, tmp_path, parallelism={"world_size": 2}, training=training)
    work = partial(_train, damaged=1, wanted="final_norm.weight", by="a factor")
    assert ranks.run(2, work, config) == [2, 2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.float16])
def test_checksums_see_every_bit_and_no_order(dtype):
    tensor = torch.randn(1000, dtype=torch.float64).to(dtype)
    assert checksum(tensor) == checksum(tensor.flip(0))
    other = tensor.clone()
    other.view(torch.uint8)[17] ^= 1
    assert checksum(other) != checksum(tensor)
    assert checksum(tensor.view(10, 100).t()) == checksum(tensor)
