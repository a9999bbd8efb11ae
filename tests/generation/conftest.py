"""One rank in this process, and small models with every weight random."""

from collections.abc import Iterator

import pytest
import torch

from tests.models.conftest import build, single_rank, small_model  # noqa: F401  (fixtures)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Steps of a few tokens: on a busy machine threads wait for each other most of the time."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
