"""Fixtures for all tests: a pool of ranks, and a small dataset."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.pool import RankPool
from tests.support.runs import make_data


@pytest.fixture(scope="session")
def ranks() -> Iterator[RankPool]:
    """Processes that play the ranks of a job: `ranks.run(4, function, *arguments)`."""
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """The `data` section of a run over two small sources."""
    return make_data(tmp_path_factory.mktemp("data"))
