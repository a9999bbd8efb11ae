"""A critic beside the policy, and a teacher in the place of rewards: layouts, resumes, warm-up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from equilibrium_mcore.parallel.launch import RankInfo
from tests.stages.online_support import (
    LAYOUTS,
    SMALL,
    curve,
    online_run,
    records,
    stage_rank,
)
from tests.support.runs import tiny_run, train_steps

# Of 4 steps: two rollouts of two minibatches; in the first step the critic trains alone.
SETTINGS: dict[str, Any] = {
    "stage": "ppo",
    "rollout": {"minibatches": 2, "samples_per_prompt": 1},
    "objective": {"preset": "ppo", "critic": {"learning_rate": 1e-3, "warmup_steps": 1}},
    "checkpoint": {"save_interval_steps": 1, "keep_last": 9},
}
FIGURES = ("loss", "entropy", "reward", "critic_loss", "explained_variance", "kl_reference")


@pytest.fixture(scope="module")
def one_rank(ranks, prompts, pretrained, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one_rank")
    ranks.run(1, stage_rank, online_run(prompts, pretrained, folder, **SETTINGS))
    return folder


def assert_alike(found: list[dict], expected: list[dict]) -> None:
    assert len(found) == len(expected) > 0
    for record, other in zip(found, expected, strict=True):
        assert record["tokens"] == other["tokens"]
        for figure in FIGURES:
            assert record[figure] == pytest.approx(other[figure], rel=1e-3, abs=2e-5), figure


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == "mixed" else [pytest.mark.slow]) for n in LAYOUTS]
)
def test_ppo_is_the_same_in_every_layout(ranks, prompts, pretrained, one_rank, tmp_path, name):
    layout = LAYOUTS[name]
    config = online_run(prompts, pretrained, tmp_path, parallelism=layout, **SETTINGS)
    ranks.run(layout["world_size"], stage_rank, config)
    assert_alike(records(tmp_path), records(one_rank))


@pytest.mark.parametrize(
    "name", [pytest.param("one"), pytest.param("mixed", marks=pytest.mark.slow)]
)
def test_a_critic_resumes_to_the_bit_and_in_another_layout(
    ranks, prompts, pretrained, one_rank, tmp_path, name
):
    """Stopped in the middle of the second rollout; its weights and state are in the checkpoint."""
    layout = {"one": {"world_size": 1}, "mixed": LAYOUTS["mixed"]}[name]
    stop = {"training": {"stop_after_steps": 3}}
    ranks.run(1, stage_rank, online_run(prompts, pretrained, tmp_path, **SETTINGS, **stop))
    config = online_run(prompts, pretrained, tmp_path, parallelism=layout, **SETTINGS)
    ranks.run(layout["world_size"], stage_rank, config)
    if name == "one":
        assert curve(tmp_path) == curve(one_rank)
    else:
        assert_alike(records(tmp_path), records(one_rank))


def test_the_policy_waits_for_its_critic(one_rank):
    """Ratios of the second minibatch are 1 while the policy stands still, and then no more."""
    _, second, _, fourth = records(one_rank)
    assert second["ratio"] == pytest.approx(1.0, abs=1e-6)  # the first step moved nothing
    assert abs(fourth["ratio"] - 1) > 1e-5


def updates_of_a_critic(rank_info: RankInfo, config: Any) -> list[dict[str, float]]:
    """What 12 updates of the critic on the same answers did."""
    from equilibrium_mcore.online.critic import Critic
    from equilibrium_mcore.online.setup import go_online
    from equilibrium_mcore.training.setup import setup, teardown
    from tests.support.slow_engine import SlowEngine

    run = setup(config, rank_info)
    go_online(run, SlowEngine(run))
    batches = run.stream.next_batches(1)
    critic = Critic(run, config.objective.critic.model_copy(update={"value_clip": None}))
    found = [critic.update(batches) for _ in range(12)]
    teardown(run)
    return found


@pytest.mark.slow
def test_a_critic_learns_returns(ranks, prompts, pretrained, tmp_path):
    config = online_run(prompts, pretrained, tmp_path, **SETTINGS)
    (found,) = ranks.run(1, updates_of_a_critic, config)
    losses = [figures["critic_loss"] for figures in found]
    assert losses[-1] < 0.2 * losses[0]


def test_an_export_of_the_policy_does_not_see_the_critic(one_rank):
    from equilibrium_mcore.checkpoint.directory import latest_checkpoint
    from equilibrium_mcore.hugging_face.reader import CheckpointReader

    path = latest_checkpoint(one_rank)
    names = CheckpointReader(path).names()
    assert names and not [name for name in names if "critic" in name or "scalar_head" in name]


@pytest.mark.slow
def test_a_teacher_takes_the_place_of_rewards(
    ranks, data, prompts, pretrained, tmp_path_factory, tmp_path
):
    """The divergence from the teacher, on the model's own answers, falls."""
    teacher = tmp_path_factory.mktemp("teacher")
    config = tiny_run(data, teacher, model=SMALL, parallelism={"world_size": 1})
    ranks.run(1, train_steps, config, 10, True)
    config = online_run(
        prompts,
        pretrained,
        tmp_path,
        stage="opd",
        rewards=None,
        rollout={"samples_per_prompt": 1},
        objective={"preset": "opd", "teacher": str(teacher)},
        training={"steps": 6},
    )
    ranks.run(1, stage_rank, config)
    found = [record["kl_teacher"] for record in records(tmp_path)]
    assert min(found[-2:]) < found[0]
