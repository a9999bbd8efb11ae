"""What stages on own answers start from: prompts, and the weights of a small model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.stages.online_support import SMALL, prompts_section
from tests.support.runs import tiny_run, train_steps


@pytest.fixture(scope="session")
def prompts(data: dict, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The `data` section of a run on prompts."""
    return prompts_section(data, tmp_path_factory.mktemp("prompts"))


@pytest.fixture(scope="session")
def pretrained(ranks, data: dict, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, which no test changes."""
    folder = tmp_path_factory.mktemp("pretrained")
    config = tiny_run(data, folder, model=SMALL, parallelism={"world_size": 1})
    ranks.run(1, train_steps, config, 2, True)
    return folder
