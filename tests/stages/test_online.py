"""Training on a policy's own answers through the stage's own function: layouts, resumes, traps."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.training.ready import check_policy
from equilibrium_mcore.training.run_data import with_steps
from tests.stages.online_support import (
    LAYOUTS as TWO_RANKS,
)
from tests.stages.online_support import (
    by_both_engines,
    curve,
    kept_bias,
    killed_and_resumed,
    online_run,
    prompts_section,
    records,
    shifted_rank,
    stage_rank,
)
from tests.support.pool import RankError
from tests.support.runs import tiny_run

LAYOUTS = {
    **TWO_RANKS,
    "mixed_data": {"world_size": 4, "tensor": 2, "sequence": True, "expert": 2},
}
IN_CI = ("mixed",)
# Of 4 steps: two rollouts, each of two minibatches, so that a rollout is half used in between.
SETTINGS: dict[str, Any] = {
    "rollout": {"minibatches": 2},
    "evaluation": {"interval_steps": 2, "samples": 2},
    "checkpoint": {"save_interval_steps": 1, "keep_last": 9},
}


@pytest.fixture(scope="module")
def one_rank(ranks, prompts, pretrained, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one_rank")
    ranks.run(1, stage_rank, online_run(prompts, pretrained, folder, **SETTINGS))
    return folder


def answers(folder: Path) -> list[dict[str, Any]]:
    """What `samples.jsonl` kept."""
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n in IN_CI else [pytest.mark.slow]) for n in LAYOUTS]
)
def test_answers_and_curve_are_the_same_in_every_layout(
    ranks, prompts, pretrained, one_rank, tmp_path, name
):
    layout = LAYOUTS[name]
    config = online_run(prompts, pretrained, tmp_path, parallelism=layout, **SETTINGS)
    ranks.run(layout["world_size"], stage_rank, config)
    assert answers(tmp_path) == answers(one_rank)
    for kind in ("train", "evaluation"):
        found, expected = records(tmp_path, kind), records(one_rank, kind)
        assert len(found) == len(expected) > 0
        for record, other in zip(found, expected, strict=True):
            assert record.get("tokens") == other.get("tokens")
            assert record.keys() == other.keys()
            for figure in record.keys() & {"loss", "entropy", "reward", "kl_reference", "accuracy"}:
                assert record[figure] == pytest.approx(other[figure], rel=1e-4, abs=2e-5), figure


@pytest.mark.parametrize("place", ["generation", "between", "update"])
def test_trap_a_resume_repeats_what_was_lost_to_the_bit(
    ranks, prompts, pretrained, one_rank, tmp_path, place
):
    """Killed in the second rollout or in its first update: prompts are neither lost nor asked
    twice, and the rest of a rollout is not drawn again."""
    config = online_run(prompts, pretrained, tmp_path, **SETTINGS)
    (steps,) = ranks.run(1, killed_and_resumed, config, place)
    assert steps == 2  # and goes on from there
    assert curve(tmp_path) == curve(one_rank)
    assert curve(tmp_path, "evaluation") == curve(one_rank, "evaluation")
    assert answers(tmp_path) == answers(one_rank)


def test_a_half_used_rollout_is_in_the_checkpoint(ranks, prompts, pretrained, one_rank, tmp_path):
    """Stopped after the first of two updates on it, and resumed."""
    stop = {"training": {"stop_after_steps": 1}}
    ranks.run(1, stage_rank, online_run(prompts, pretrained, tmp_path, **SETTINGS, **stop))
    ranks.run(1, stage_rank, online_run(prompts, pretrained, tmp_path, **SETTINGS))
    assert curve(tmp_path) == curve(one_rank)


def test_trap_generation_and_training_agree(one_rank):
    """What was sampled is what is trained: the largest log ratio, in fp32."""
    for record in records(one_rank):
        assert record["mismatch_max"] < 1e-4


def test_trap_old_log_probabilities_are_from_before_the_update(one_rank):
    """The first update on a rollout is at the policy that drew it; the second has moved away."""
    first, second, third, fourth = (record["kl_old"] for record in records(one_rank))
    assert first < 1e-9 and third < 1e-9
    assert second > 1e-8 and fourth > 1e-8


def test_answers_are_those_of_the_training_forward(ranks, prompts, pretrained, tmp_path):
    """Token for token, and their log-probabilities: by the packed forward of all that is there."""
    config = online_run(prompts, pretrained, tmp_path)
    ((own, slow),) = ranks.run(1, by_both_engines, config, 5)
    assert [ids for ids, _ in own] == [ids for ids, _ in slow]
    for (_, found), (_, expected) in zip(own, slow, strict=True):
        assert found == pytest.approx(expected, abs=1e-4)


def test_trap_the_experts_bias_stays(ranks, prompts, pretrained, tmp_path):
    """Equal to the bit before and after steps."""
    config = online_run(prompts, pretrained, tmp_path)
    (pairs,) = ranks.run(1, kept_bias, config)
    assert pairs
    for before, after in pairs:
        assert before == after and any(before)


# A tracker's expectations, and a temperature that is no 1.
SPO: dict[str, Any] = {
    "stage": "spo",
    "objective": {"preset": "spo", "tracker": {"low": -1.0, "high": 0.0}},
    "rollout": {"samples_per_prompt": 1, "temperature": 0.6},
}


def test_trap_temperature_on_both_sides_and_a_tracker_that_resumes(
    ranks, prompts, pretrained, tmp_path
):
    """At 0.6, what was drawn is what is scored; what a tracker knows is in the checkpoint."""
    straight, stopped = tmp_path / "straight", tmp_path / "stopped"
    ranks.run(1, stage_rank, online_run(prompts, pretrained, straight, **SPO))
    stop = {"training": {"stop_after_steps": 2}}
    ranks.run(1, stage_rank, online_run(prompts, pretrained, stopped, **SPO, **stop))
    ranks.run(1, stage_rank, online_run(prompts, pretrained, stopped, **SPO))
    assert curve(stopped) == curve(straight)
    for record in records(straight):
        assert record["mismatch_max"] < 1e-4 and record["kl_old"] < 1e-9
    expected = [record["tracker_baseline"] for record in records(straight)]
    assert len(set(expected)) == len(expected)  # it learns


TRUNCATED: dict[str, Any] = {
    "rollout": {"minibatches": 2, "top_k": 400, "top_p": 0.9},
    "training": {"steps": 2},
}
CONTEXT = {"world_size": 2, "context": 2}


@pytest.fixture(scope="module")
def truncated(ranks, prompts, pretrained, tmp_path_factory) -> Path:
    """On one rank, stopped after the first of two updates on a rollout, and resumed."""
    folder = tmp_path_factory.mktemp("truncated")
    stop = {"training": {"steps": 2, "stop_after_steps": 1}}
    ranks.run(1, stage_rank, online_run(prompts, pretrained, folder, **{**TRUNCATED, **stop}))
    ranks.run(1, stage_rank, online_run(prompts, pretrained, folder, **TRUNCATED))
    return folder


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(LAYOUTS["mixed"], id="mixed"),
        pytest.param(CONTEXT, id="context", marks=pytest.mark.slow),
        pytest.param(LAYOUTS["virtual"], id="virtual", marks=pytest.mark.slow),
    ],
)
def test_trap_a_truncated_support_is_one_on_both_sides(
    ranks, prompts, pretrained, truncated, tmp_path, layout
):
    """What is drawn from the likeliest ids is scored over the same ids, by the policy and by the
    reference: the first ratio is 1, in a layout as on one rank, and a half-used rollout resumes
    with its ids."""
    config = online_run(prompts, pretrained, tmp_path, parallelism=layout, **TRUNCATED)
    ranks.run(2, stage_rank, config)
    assert answers(tmp_path) == answers(truncated)
    for record, other in zip(records(tmp_path), records(truncated), strict=True):
        assert max(record["mismatch_max"], other["mismatch_max"]) < 1e-4
        for figure in ("loss", "entropy", "kl_old", "kl_reference", "k3"):
            assert record[figure] == pytest.approx(other[figure], rel=1e-4, abs=2e-5), figure
    first, second = records(truncated)
    assert first["kl_old"] < 1e-9 < second["kl_old"] < 1e-3
    assert first["kl_reference"] < 1e-6  # the policy is the reference as yet


def test_one_id_is_no_choice(prompts, tmp_path):
    with pytest.raises(ConfigError, match=r"rollout\.top_k=1 leaves nothing to learn"):
        online_run(prompts, tmp_path / "weights", tmp_path / "run", rollout={"top_k": 1})


def test_trap_a_broken_verifier_stops_the_run(ranks, prompts, pretrained, tmp_path):
    """And does not teach that right answers are wrong."""
    broken = [{"type": "plugin", "path": "tests.support.broken_reward:breaks"}]
    rewards = {"rewards": broken, "reward_workers": 1}
    config = online_run(prompts, pretrained, tmp_path, rewards=rewards)
    with pytest.raises(RankError, match="the verifier is broken") as stopped:
        ranks.run(1, stage_rank, config)
    assert "max_error_share" in str(stopped.value) and "Traceback" not in str(stopped.value)


def test_trap_an_engine_that_differs_is_refused(ranks, prompts, pretrained, tmp_path):
    with pytest.raises(RankError, match=r"differ by 0\.25.*refuse_above_mean=0\.05"):
        ranks.run(1, shifted_rank, online_run(prompts, pretrained, tmp_path))


def test_a_resume_with_other_prompts_is_refused(ranks, data, pretrained, one_rank, tmp_path):
    other = prompts_section(data, tmp_path, seed=9)
    folder = tmp_path / "run"
    shutil.copytree(one_rank, folder, symlinks=True)
    config = online_run(other, pretrained, folder, **{**SETTINGS, "training": {"steps": 5}})
    with pytest.raises(RankError, match="its prompts are others.*put back the files"):
        ranks.run(1, stage_rank, config)


def test_epochs_are_counted_in_answers(prompts, pretrained, tmp_path):
    """11 prompts, 4 answers each, 8 answers a step."""
    training = {"steps": None, "epochs": 2.0}
    said: list[str] = []
    config = online_run(prompts, pretrained, tmp_path, training=training)
    assert with_steps(config, say=said.append).training.steps == 11
    assert "11 prompts x 4 answers" in said[0]


def test_a_policy_needs_a_stage_that_asks(data, tmp_path):
    config = tiny_run(data, tmp_path, objective={"type": "policy"})
    with pytest.raises(ConfigError, match=r"stage='pretrain'.*set stage to grpo"):
        check_policy(config)


@pytest.mark.slow
def test_a_half_used_rollout_goes_on_in_another_layout(
    ranks, prompts, pretrained, one_rank, tmp_path
):
    """Within rounding, and with the same answers."""
    stop = {"training": {"stop_after_steps": 1}}
    ranks.run(1, stage_rank, online_run(prompts, pretrained, tmp_path, **SETTINGS, **stop))
    layout = LAYOUTS["mixed"]
    config = online_run(prompts, pretrained, tmp_path, parallelism=layout, **SETTINGS)
    ranks.run(layout["world_size"], stage_rank, config)
    assert answers(tmp_path) == answers(one_rank)
    for record, other in zip(records(tmp_path), records(one_rank), strict=True):
        assert record["loss"] == pytest.approx(other["loss"], rel=1e-3, abs=2e-5)
