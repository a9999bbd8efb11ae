"""What the accelerator sets for a layout."""

from __future__ import annotations

import os

import pytest

from equilibrium_mcore.config.schema import ParallelismConfig
from equilibrium_mcore.parallel import accelerator

QUEUES = "CUDA_DEVICE_MAX_CONNECTIONS"


@pytest.mark.parametrize(
    ("layout", "queues"),
    [
        ({"tensor": 2, "sequence": True}, "1"),
        ({"context": 2}, "1"),
        ({"expert": 8, "pipeline": 2}, None),
    ],
)
def test_kernels_keep_their_order_where_the_layout_needs_it(monkeypatch, layout, queues):
    monkeypatch.setenv(QUEUES, "7")  # so that it is as before after the test
    accelerator.order_kernels(ParallelismConfig(**layout))
    assert os.environ[QUEUES] == "7"  # the user's own
    monkeypatch.delenv(QUEUES)
    accelerator.order_kernels(ParallelismConfig(**layout))
    assert os.environ.get(QUEUES) == queues
