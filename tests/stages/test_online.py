"""Training on a policy's own answers through the stage's own function."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.stages.online_support import (
    SMALL,
    online_run,
    prompts_section,
    records,
    stage_rank,
)
from tests.support.runs import tiny_run, train_steps


@pytest.fixture(scope="module")
def prompts(data: dict, tmp_path_factory) -> dict[str, Any]:
    return prompts_section(data, tmp_path_factory.mktemp("prompts"))


@pytest.fixture(scope="module")
def pretrained(ranks, data: dict, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    config = tiny_run(data, folder, model=SMALL, parallelism={"world_size": 1})
    ranks.run(1, train_steps, config, 2, True)
    return folder


@pytest.fixture(scope="module")
def one_rank(ranks, prompts, pretrained, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one_rank")
    ranks.run(1, stage_rank, online_run(prompts, pretrained, folder))
    return folder


def test_it_runs(one_rank):
    for record in records(one_rank):
        print(record)
    print((one_rank / "samples.jsonl").read_text())
