"""Fixtures for all tests: a pool of ranks, and a small dataset; and `--shuffle SEED`."""

from __future__ import annotations

import random
from collections.abc import Iterator

import pytest

from tests.support.pool import RankPool
from tests.support.runs import make_data
from tests.support.text import (  # noqa: F401  (fixtures)
    repository,
    texts,
    tokenizer,
    tokenizer_config,
    two_sources,
    write_dataset,
    write_jsonl,
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--shuffle SEED`: the modules in another order, and the tests within each."""
    parser.addoption("--shuffle", metavar="SEED", help="run modules and their tests in this order")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Shuffle; the tests of a module stay together, since it may share a costly setup."""
    seed = config.getoption("--shuffle")
    if seed is None:
        return
    generator, modules = random.Random(seed), {}
    for item in items:
        modules.setdefault(item.path, []).append(item)
    order = list(modules.values())
    generator.shuffle(order)
    for tests in order:
        generator.shuffle(tests)
    items[:] = [item for tests in order for item in tests]


def pytest_report_header(config: pytest.Config) -> str | None:
    """The seed, so that an order that fails can be had again."""
    seed = config.getoption("--shuffle")
    return None if seed is None else f"shuffled: --shuffle {seed}"


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
