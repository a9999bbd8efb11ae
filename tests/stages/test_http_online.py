"""A stage whose answers come from a server: weights after each update, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.schema import RunConfig
from tests.generation.http_server import Served, serving
from tests.generation.test_http_engine import LLAMA, exported_model
from tests.stages.online_support import online_run, records, stage_rank
from tests.support.pool import RankError
from tests.support.runs import tiny_run, train_steps

LAYOUTS = {
    "tp2": {"world_size": 2, "tensor": 2, "sequence": True},
    "pp2": {"world_size": 2, "pipeline": 2},
}


@pytest.fixture(scope="module")
def pretrained(ranks, data: dict, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    config = tiny_run(data, folder, model=LLAMA, parallelism={"world_size": 1})
    ranks.run(1, train_steps, config, 1, True)
    return folder


def served_run(
    prompts: dict[str, Any], weights: Path, folder: Path, url: str, **changes: Any
) -> RunConfig:
    """Four steps of two rollouts, evaluated before the first, and after every second."""
    rollout = {
        "minibatches": 2,
        "engine": "http",
        "http": {"url": url, "connections": 4, "timeout_seconds": 300.0},
        **changes.pop("rollout", {}),
    }
    return online_run(
        prompts,
        weights,
        folder,
        model=LLAMA,
        evaluation={"interval_steps": 2},
        rollout=rollout,
        **changes,
    )


@pytest.mark.parametrize("name", ["tp2", pytest.param("pp2", marks=pytest.mark.slow)])
def test_trap_a_server_answers_with_the_weights_of_the_step(
    ranks, prompts, pretrained, tmp_path, name
):
    """What it draws from is what training scores: its weights are those of the rollout's step."""
    layout = LAYOUTS[name]
    with serving(lambda path, content: served(path, content)) as url:
        config = served_run(prompts, pretrained, tmp_path, url, parallelism=layout)
        served = Served(exported_model(config), version=None)
        ranks.run(layout["world_size"], stage_rank, config)
    train = records(tmp_path)
    assert [record["step"] for record in train] == [1, 2, 3, 4]
    for record in train:
        assert record["mismatch_max"] < 1e-4
    # At the first update on a rollout the ratio is 1; at the second the policy has moved.
    assert train[0]["kl_old"] < 1e-9 and train[2]["kl_old"] < 1e-9 < train[1]["kl_old"]
    assert len(records(tmp_path, "evaluation")) == 3
    # Two rollouts and three evaluations, each of other weights than the one before or of the same
    # step's evaluated ones: a number each, one after the other.
    sent = [values["version"] for path, values in served.asked if path == "/weights/end"]
    assert sent == list(range(sent[0], sent[0] + 5))


def test_a_server_of_another_s_weights_stops_the_run(ranks, prompts, pretrained, tmp_path):
    def taken_over(path: str, content: bytes) -> tuple[int, Any]:
        answer = served(path, content)
        if path == "/weights/end":
            served.version = 3
        return answer

    with serving(taken_over) as url:
        config = served_run(prompts, pretrained, tmp_path, url, parallelism={"world_size": 1})
        served = Served(exported_model(config), version=None)
        with pytest.raises(RankError, match="its weights are version 3"):
            ranks.run(1, stage_rank, config)
    assert not [path for path, _ in served.asked if path == "/v1/completions"]


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"rollout": {"http": None}}, "rollout.engine='http' without rollout.http"),
        ({"rollout": {"engine": "own"}}, "rollout.http with rollout.engine='own'"),
        ({"rollout": {"http": {"url": "host:8000"}}}, "rollout.http.url='host:8000' is no address"),
    ],
)
def test_settings_that_do_not_fit_are_told(prompts, tmp_path, changes, told):
    with pytest.raises(ConfigError, match=rf"^1 problem:\n  1\. {re.escape(told)}"):
        served_run(prompts, Path("weights"), tmp_path, "http://host:8000", **changes)


def test_a_family_that_no_engine_serves_is_told(prompts, tmp_path):
    server = {"engine": "http", "http": {"url": "http://host:8000"}}
    with pytest.raises(ConfigError, match="layers of mamba, mla, moe, which no serving engine has"):
        online_run(prompts, Path("weights"), tmp_path, rollout=server)
