"""A judge's preferences between two own answers, and a reward model as a reward."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.parallel.launch import RankInfo
from tests.stages.online_support import (
    LAYOUTS,
    SMALL,
    curve,
    online_run,
    records,
    reward_model_run,
    stage_rank,
)
from tests.support.http_judge import first_is_better, judging
from tests.support.pool import RankError

SLOW_LAYOUTS = [
    pytest.param(name, marks=[] if name == "mixed" else [pytest.mark.slow]) for name in LAYOUTS
]


@pytest.fixture(scope="module")
def prompts(prompts: dict[str, Any]) -> dict[str, Any]:
    """The same without truths: a judge needs none."""
    return {**prompts, "truth": None}


@pytest.fixture(scope="module")
def reward_model(ranks, data: dict, pretrained: Path, tmp_path_factory) -> Path:
    """A checkpoint of stage reward_model, after a few steps."""
    folder = tmp_path_factory.mktemp("reward_model")
    ranks.run(1, stage_rank, reward_model_run(data, pretrained, folder))
    return folder / "run"


def model_of(name: str) -> dict[str, Any]:
    """The same layers; virtual stages need a cut more."""
    return {**SMALL, "layer_pattern": "M|E|+|E"} if name == "virtual" else SMALL


def rlaif_run(prompts: dict, weights: Path, output: Path, judge: dict, **changes: Any) -> Any:
    """Two rollouts, each of two minibatches: four steps."""
    return online_run(
        prompts,
        weights,
        output,
        stage="rlaif",
        rewards=None,
        judge=judge,
        objective={"type": "dpo", **changes.pop("objective", {})},
        rollout={
            "samples_per_prompt": 2,
            "minibatches": 2,
            "max_new_tokens": 6,
            **changes.pop("rollout", {}),
        },
        checkpoint={"save_interval_steps": 1, "keep_last": 9},
        training={"sequence_length": 96, **changes.pop("training", {})},
        **changes,
    )


def http(url: str, **settings: Any) -> dict[str, Any]:
    return {"type": "http", "url": url, "model": "judge", "pause_seconds": 0.0, **settings}


@pytest.fixture(scope="module")
def judge() -> Any:
    with judging() as server:
        yield server


@pytest.fixture(scope="module")
def one_rank(ranks, prompts, pretrained, judge, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one_rank")
    ranks.run(1, stage_rank, rlaif_run(prompts, pretrained, folder, http(judge.url)))
    return folder


def samples(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]


def assert_alike(found: list[dict], expected: list[dict]) -> None:
    assert len(found) == len(expected) > 0
    for record, other in zip(found, expected, strict=True):
        assert record.keys() == other.keys()
        assert record["tokens"] == other["tokens"]
        for figure in record.keys() & {"loss", "margin", "accuracy", "reward", "ties", "nll"}:
            assert record[figure] == pytest.approx(other[figure], rel=1e-3, abs=2e-5), figure


@pytest.mark.parametrize("name", SLOW_LAYOUTS)
def test_rlaif_is_the_same_in_every_layout(
    ranks, prompts, pretrained, judge, one_rank, tmp_path, name
):
    layout = LAYOUTS[name]
    config = rlaif_run(
        prompts,
        pretrained,
        tmp_path,
        http(judge.url),
        parallelism=layout,
        model=model_of(name),
    )
    ranks.run(layout["world_size"], stage_rank, config)
    assert samples(tmp_path) == samples(one_rank)
    assert_alike(records(tmp_path), records(one_rank))


def test_rlaif_resumes_to_the_bit(ranks, prompts, pretrained, judge, one_rank, tmp_path):
    """Stopped in the middle of the second rollout, whose pairs and reference are kept."""
    for stop in (3, None):
        config = rlaif_run(
            prompts, pretrained, tmp_path, http(judge.url), training={"stop_after_steps": stop}
        )
        ranks.run(1, stage_rank, config)
    assert curve(tmp_path) == curve(one_rank)
    assert samples(tmp_path) == samples(one_rank)


def test_what_the_judge_prefers_is_learned(ranks, prompts, pretrained, judge, tmp_path):
    """The first loss is log 2, at which policy and reference are one; then chosen answers gain."""
    config = rlaif_run(
        prompts,
        pretrained,
        tmp_path,
        http(judge.url),
        rollout={"minibatches": 1, "passes": 3},
        training={"steps": 3},
    )
    ranks.run(1, stage_rank, config)
    first, second, third = records(tmp_path)
    assert first["loss"] == pytest.approx(0.693147, abs=1e-4)
    assert 0 < second["margin"] < third["margin"]
    for record in samples(tmp_path):
        assert sorted(record["rewards_of_group"]) in ([0.0, 1.0], [0.5, 0.5])


def test_trap_a_judge_that_looks_at_the_place_teaches_nothing(ranks, prompts, pretrained, tmp_path):
    """All pairs are ties, counted as decided by their order; the weights stay."""
    with judging(first_is_better) as server:
        config = rlaif_run(
            prompts,
            pretrained,
            tmp_path,
            http(server.url),
            training={"steps": 2, "stop_after_steps": 1},
        )
        ranks.run(1, stage_rank, config)
    (record,) = records(tmp_path)
    assert record["ties"] == 1.0 and record["reward_swayed"] > 0.5
    assert record["loss"] == 0.0 and record["gradient_norm"] == 0.0


@pytest.mark.slow
def test_a_judge_that_fails_stops_the_run(ranks, prompts, pretrained, tmp_path):
    with judging(lambda prompt, a, b: "I would rather not say.") as server:
        config = rlaif_run(prompts, pretrained, tmp_path, http(server.url))
        with pytest.raises(RankError, match="the judge does not work. no verdict in the reply"):
            ranks.run(1, stage_rank, config)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["one", *LAYOUTS])
def test_a_reward_model_judges_pairs(ranks, prompts, pretrained, reward_model, tmp_path, name):
    layout = {"one": {"world_size": 1}, **LAYOUTS}[name]
    judge = {"type": "reward_model", "weights": str(reward_model)}
    config = rlaif_run(
        prompts,
        pretrained,
        tmp_path / "run",
        judge,
        parallelism=layout,
        model=model_of(name),
    )
    ranks.run(layout["world_size"], stage_rank, config)
    for record in samples(tmp_path / "run"):
        assert record["parts"]["score"] != 0.0


# ------------------------------------------------------------------- a reward model as a reward


def rewarded_run(prompts: dict, weights: Path, output: Path, scorer: Path, **changes: Any) -> Any:
    rewards = [
        {"type": "reward_model", "weights": str(scorer), "weight": 2.0},
        {"type": "length", "unit": "characters", "max_length": 60, "soft_from": 1},
    ]
    return online_run(prompts, weights, output, rewards=rewards, training={"steps": 2}, **changes)


@pytest.fixture(scope="module")
def rewarded(ranks, prompts, pretrained, reward_model, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("rewarded")
    ranks.run(1, stage_rank, rewarded_run(prompts, pretrained, folder, reward_model))
    return folder


@pytest.mark.parametrize("name", SLOW_LAYOUTS)
def test_a_reward_models_scores_are_the_same_in_every_layout(
    ranks, prompts, pretrained, reward_model, rewarded, tmp_path, name
):
    layout = LAYOUTS[name]
    config = rewarded_run(
        prompts, pretrained, tmp_path, reward_model, parallelism=layout, model=model_of(name)
    )
    ranks.run(layout["world_size"], stage_rank, config)
    for record, other in zip(records(tmp_path), records(rewarded), strict=True):
        for figure in ("reward", "reward_reward_model", "reward_length", "loss"):
            assert record[figure] == pytest.approx(other[figure], rel=1e-3, abs=2e-5), figure
    for record in samples(rewarded):
        parts = record["parts"]
        assert record["reward"] == pytest.approx(2 * parts["reward_model"] + parts["length"])


def scores_of_both(rank_info: RankInfo, config: Any, model: Path) -> list[Any]:
    """Scores of rollouts as a reward, and by the model's plain forward on each answer alone."""
    import numpy as np
    import torch

    from equilibrium_mcore.generation.interface import Prompt, Request, Rollout
    from equilibrium_mcore.online.model_reward import ModelScores
    from equilibrium_mcore.training.setup import setup, teardown

    run = setup(config, rank_info)
    scores = ModelScores(run, model, key="weights")
    draw = np.random.default_rng(0)
    end = run.datasets.train.stop_ids[0]
    rollouts = []
    for n in range(5):
        ids = draw.integers(5, 400, size=2 + 3 * n).astype(np.int32)
        if n % 2:
            ids[len(ids) // 2] = end  # within the answer, where nothing ends
        request = Request(Prompt.of(draw.integers(5, 400, size=4 + n)))
        rollouts.append(Rollout(request, ids, np.zeros(len(ids), np.float32), "end", 0))
    found = scores(rollouts)
    (chunk,) = scores._chunks
    alone = []
    with torch.no_grad():
        for rollout in rollouts:
            ids = torch.from_numpy(np.concatenate([rollout.request.prompt.ids, rollout.ids]))
            tokens = ids.long()[None]
            places = torch.arange(tokens.shape[1])[None]
            values = chunk(input_ids=tokens, position_ids=places, attention_mask=None)
            alone.append(values[0].tolist())
    teardown(run)
    return [found, alone]


def test_trap_a_score_is_that_of_the_last_produced_token(
    ranks, prompts, pretrained, reward_model, tmp_path
):
    """By index, packed with others: not at padding, and not at an end token within the answer."""
    config = rewarded_run(prompts, pretrained, tmp_path, reward_model)
    ((found, alone),) = ranks.run(1, scores_of_both, config, reward_model)
    assert found == pytest.approx([values[-1] for values in alone], abs=1e-5)
    assert abs(found[1] - alone[1][-2]) > 1e-4  # so that a neighbour's value would be seen


def test_a_language_model_is_no_reward_model(prompts, pretrained, tmp_path):
    from equilibrium_mcore.training.ready import check_ready

    config = rewarded_run(prompts, pretrained, tmp_path, pretrained)
    with pytest.raises(ConfigError, match="gives no scores: name a run of stage reward_model"):
        check_ready(config, say=lambda text: None)


def test_trap_a_reward_model_of_another_tokenizer_is_refused(
    prompts, pretrained, reward_model, tmp_path
):
    """Its ids would mean other tokens: told by --check, too, with what was compared."""
    from equilibrium_mcore.corpus.train_tokenizer import train_tokenizer
    from equilibrium_mcore.training.ready import check_ready

    texts = tmp_path / "other.jsonl"
    draw = random.Random(0)
    words = ["".join(draw.choices("qrstuvwxyz", k=5)) for _ in range(2000)]
    lines = [json.dumps({"text": " ".join(draw.choices(words, k=20))}) + "\n" for _ in range(400)]
    texts.write_text("".join(lines))
    other = tmp_path / "other.model"
    train_tokenizer(inputs=[texts], output=other, vocab_size=512)
    section = {**prompts, "tokenizer": {**prompts["tokenizer"], "model": str(other)}}
    config = rewarded_run(section, pretrained, tmp_path / "run", reward_model)
    with pytest.raises(ConfigError, match="an id would mean two things"):
        check_ready(config, say=lambda text: None)
    assert not (tmp_path / "run").exists()


def test_check_says_what_a_reward_model_takes(prompts, pretrained, reward_model, tmp_path):
    said: list[str] = []
    from equilibrium_mcore.training.ready import check_ready

    check_ready(rewarded_run(prompts, pretrained, tmp_path, reward_model), say=said.append)
    (line,) = [text for text in said if "memory of a rank" in text]
    assert "rewards.rewards.0.weights" in line and "reference" in line
