"""The objective of policies in layouts and micro-batches, and what its ratios are of."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.parallel.launch import RankInfo
from tests.support.runs import MODEL, tiny_run
from tests.training.test_objective import assert_close, kept_gradients, whole

UNBALANCED = {"load_balancing": "none", "expert_bias_update_rate": 0.0}
LAYOUTS = {
    "context": {"world_size": 2, "context": 2},
    "tensor": {"world_size": 2, "tensor": 2, "sequence": True, "expert": 2},
    "virtual": {"world_size": 2, "pipeline": 2, "virtual_pipeline": 2},
}
OBJECTIVES = {
    "gspo": {"preset": "gspo", "clip_low": 0.02, "clip_high": 0.02},
    "grpo": {"preset": "grpo", "kl": {"estimator": "ratio_k3"}},
    "dr_grpo": {"preset": "dr_grpo", "constant_length": 20},
    "cispo": {"preset": "cispo", "clip_low": 0.1, "clip_high": 0.1},
}
IN_CI = {("gspo", "context")}


def config_of(data: dict, folder: Any, objective: dict, **changes: Any) -> RunConfig:
    return tiny_run(
        {**data, "packing": "documents", "document_multiple": 4},
        folder,
        model={**MODEL, "layer_pattern": "ME|+E", "moe": {**MODEL["moe"], **UNBALANCED}},
        objective={"type": "policy", **objective},
        parallelism=changes.pop("parallelism", {}),
        training={"steps": 4, "global_batch_size": 4, "micro_batch_size": 1, **changes},
    )


def first_step(rank_info: RankInfo, config: RunConfig, weights: str | None) -> dict[str, Any]:
    """Figures of a first step on made-up experience, and the gradients that this rank owns."""
    from equilibrium_mcore.certify.tokens import made_up_datasets, made_up_experience
    from equilibrium_mcore.training.callbacks import LogCallback
    from equilibrium_mcore.training.saving import CheckpointCallback
    from equilibrium_mcore.training.setup import setup, teardown
    from equilibrium_mcore.training.step import train_step

    if weights:
        checkpoint = config.checkpoint.model_copy(update={"initial_weights": weights})
        config = config.model_copy(update={"checkpoint": checkpoint})
    run = setup(config, rank_info, datasets=made_up_datasets(config))
    run.prepare = made_up_experience
    found = kept_gradients(run)
    if not weights:
        CheckpointCallback(config, LogCallback(config)).on_end(run, reason="stop")
    outcome = train_step(run)
    teardown(run)
    return {"figures": outcome.figures, "tokens": outcome.tokens, "pieces": found}


@pytest.fixture(scope="module")
def start(ranks, data, tmp_path_factory) -> str:
    """A run with a checkpoint of the first weights, which every case starts from."""
    folder = tmp_path_factory.mktemp("start")
    ranks.run(1, first_step, config_of(data, folder, OBJECTIVES["grpo"]), None)
    return str(folder)


CASES = [
    pytest.param(o, n, marks=[] if (o, n) in IN_CI else [pytest.mark.slow])
    for o in OBJECTIVES
    for n in LAYOUTS
]


@pytest.fixture(scope="module")
def one_rank(ranks, data, start, tmp_path_factory):
    """First steps on one rank, in micro-batches of one sequence, made when asked for."""
    made: dict[str, list[dict[str, Any]]] = {}

    def of(objective: str) -> list[dict[str, Any]]:
        if objective not in made:
            folder = tmp_path_factory.mktemp("one_rank")
            config = config_of(data, folder, OBJECTIVES[objective])
            made[objective] = ranks.run(1, first_step, config, start)
        return made[objective]

    return of


@pytest.mark.parametrize(("objective", "layout"), CASES)
def test_it_is_the_same_in_every_layout(ranks, data, tmp_path, start, one_rank, objective, layout):
    expected = one_rank(objective)
    config = config_of(data, tmp_path, OBJECTIVES[objective], parallelism=LAYOUTS[layout])
    found = ranks.run(2, first_step, config, start)
    assert found[0]["tokens"] == expected[0]["tokens"]
    assert found[0]["figures"] == pytest.approx(expected[0]["figures"], rel=1e-4, abs=1e-6)
    assert_close(whole(found), whole(expected), 2e-4)
    assert expected[0]["figures"]["clipped_above"] > 0


@pytest.mark.parametrize(
    "objective",
    [pytest.param(o, marks=[] if o == "gspo" else pytest.mark.slow) for o in OBJECTIVES],
)
def test_trap_the_divisor_is_the_global_batchs(ranks, data, tmp_path, start, one_rank, objective):
    """The same answers in 4 micro-batches on one data rank, and one micro-batch on each of two."""
    expected = one_rank(objective)
    layout = {"world_size": 2}
    config = config_of(
        data, tmp_path, OBJECTIVES[objective], parallelism=layout, micro_batch_size=2
    )
    found = ranks.run(2, first_step, config, start)
    assert found[0]["figures"] == pytest.approx(expected[0]["figures"], rel=1e-5, abs=1e-6)
    assert_close(whole(found), whole(expected), 1e-4)


MODES = ("right", "another temperature", "after the update", "poison")


def two_updates(rank_info: RankInfo, config: RunConfig) -> dict[str, list[dict[str, float]]]:
    """Figures of two updates on the same answers; log p of before are taken as each mode says."""
    from equilibrium_mcore.certify.tokens import made_up_datasets, made_up_experience
    from equilibrium_mcore.training.policy_objective import OLD
    from equilibrium_mcore.training.scoring import log_probabilities
    from equilibrium_mcore.training.setup import setup, teardown
    from equilibrium_mcore.training.step import train_step

    run = setup(config, rank_info, datasets=made_up_datasets(config))
    run.objective.temperature = 0.6
    batches = run.stream.next_batches(run.micro_batches)
    run.stream.next_batches = lambda count: [dict(batch) for batch in batches]
    start = [p.model.detach().clone() for p in run.optimizer.parameters]

    def figures(mode: str) -> list[dict[str, float]]:
        taken: list = []

        def prepare(run: Any, batches: list) -> None:
            made_up_experience(run, batches)
            if not taken or mode == "after the update":
                temperature = 1.0 if mode == "another temperature" else 0.6
                taken[:] = log_probabilities(run, batches, temperature=temperature)
            for batch, old in zip(batches, taken, strict=True):
                batch[OLD] = old.cpu()
                batch["corrections"] = torch.ones_like(batch["corrections"])
                if mode == "poison":
                    batch[OLD] = torch.where(batch["loss_mask"] > 0, batch[OLD], torch.nan)
                    for name in ("advantages", "corrections", "reference"):
                        batch[name] = torch.where(batch["loss_mask"] > 0, batch[name], torch.inf)

        with torch.no_grad():
            for parameter, weight in zip(run.optimizer.parameters, start, strict=True):
                parameter.model.copy_(weight)
        run.optimizer.refresh_main_weights()
        run.prepare = prepare
        return [train_step(run).figures for _ in range(2)]

    found = {mode: figures(mode) for mode in MODES}
    teardown(run)
    return found


@pytest.fixture(scope="module")
def updates(ranks, data, tmp_path_factory) -> dict[str, list[dict[str, float]]]:
    """Figures of two updates by mode, from the same weights."""
    config = config_of(data, tmp_path_factory.mktemp("updates"), OBJECTIVES["grpo"], steps=8)
    (found,) = ranks.run(1, two_updates, config)
    return found


def test_trap_the_first_ratio_is_one_at_any_temperature(updates):
    """At 0.6 on both sides; with 1 on one of them it is not."""
    first = updates["right"][0]
    assert first["ratio"] == pytest.approx(1, abs=1e-5)
    assert first["kl_old"] == pytest.approx(0, abs=1e-9)
    assert first["clipped_below"] == first["clipped_above"] == 0
    assert updates["another temperature"][0]["kl_old"] > 1e-4
    assert 0 < first["entropy"] < 6.3  # log 512 = 6.24, less at a temperature below 1


def test_trap_old_log_probabilities_are_from_before_the_first_update(updates):
    right, wrong = updates["right"], updates["after the update"]
    assert right[1]["kl_old"] > 1e-6 and right[1]["ratio"] != pytest.approx(1, abs=1e-6)
    assert wrong[1]["kl_old"] == pytest.approx(0, abs=1e-9)


def test_what_stands_where_nothing_was_produced_is_not_read(updates):
    poisoned, right = updates["poison"][0], updates["right"][0]
    assert poisoned == right
    assert all(math.isfinite(value) for value in updates["poison"][1].values())


def test_a_batch_without_experience_is_told():
    from equilibrium_mcore.config.policy import PolicyConfig
    from equilibrium_mcore.training.policy_objective import Policy

    batch = {"loss_mask": torch.ones(1, 4), "position_ids": torch.arange(4)[None]}
    with pytest.raises(ValueError, match="lacks old, advantages, corrections, reference"):
        Policy(PolicyConfig()).weigh(batch)
