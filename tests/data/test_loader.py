"""The order of samples is one and the same for every layout, also when it changes midway."""

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from equilibrium_mcore.data.loader import batches
from equilibrium_mcore.data.samples import Samples

ROOT = Path(__file__).parents[2]


class Numbers(Samples):
    """Sample i is the number i."""

    def __init__(self, size):
        self.size = size

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        return {"tokens": torch.tensor([index, os.getpid()])}


def take(dataset, micro_steps, **arguments):
    """The sample numbers of some micro-steps of one rank."""
    loader = batches(dataset, **arguments)
    return [next(loader)["tokens"][:, 0].tolist() for _ in range(micro_steps)]


def global_step(dataset, consumed, batch, micro, ranks):
    """The samples that all ranks use in one step, by rank and micro-step."""
    return [
        take(
            dataset,
            batch // (micro * ranks),
            consumed_samples=consumed,
            micro_batch_size=micro,
            data_parallel_rank=rank,
            data_parallel_size=ranks,
        )
        for rank in range(ranks)
    ]


def test_megatron_order():
    assert global_step(Numbers(100), 10, 12, 2, 3) == [
        [[10, 11], [16, 17]],
        [[12, 13], [18, 19]],
        [[14, 15], [20, 21]],
    ]


def test_no_sample_twice_or_left_out_when_the_layout_changes():
    generator = random.Random(3)
    for _ in range(30):
        consumed, used = 0, []
        for _ in range(6):
            micro, ranks = generator.choice([1, 2, 3]), generator.choice([1, 2, 4])
            batch = micro * ranks * generator.randint(1, 3)
            step = global_step(Numbers(400), consumed, batch, micro, ranks)
            samples = [number for rank in step for steps in rank for number in steps]
            # Each global batch holds exactly the next samples.
            assert sorted(samples) == list(range(consumed, consumed + batch))
            used += samples
            consumed += batch
        assert sorted(used) == list(range(consumed))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_resuming_gives_what_would_have_come(num_workers):
    arguments = {
        "micro_batch_size": 2,
        "data_parallel_rank": 1,
        "data_parallel_size": 2,
        "num_workers": num_workers,
    }
    straight = take(Numbers(80), 10, consumed_samples=0, **arguments)
    resumed = take(Numbers(80), 4, consumed_samples=24, **arguments)
    assert straight[6:] == resumed


@pytest.mark.parametrize("num_workers", [0, 2])
def test_exhausted_is_an_error_and_not_the_end(num_workers):
    loader = batches(
        Numbers(10),
        consumed_samples=2,
        micro_batch_size=2,
        data_parallel_rank=0,
        data_parallel_size=2,
        num_workers=num_workers,
    )
    assert [next(loader)["tokens"][:, 0].tolist() for _ in range(2)] == [[2, 3], [6, 7]]
    with pytest.raises(ValueError, match="10 of its 10 samples are used.*training.steps"):
        next(loader)


def test_workers_outlive_a_stop_signal():
    loader = batches(
        Numbers(1000),
        consumed_samples=0,
        micro_batch_size=1,
        data_parallel_rank=0,
        data_parallel_size=1,
        num_workers=1,
    )
    worker = int(next(loader)["tokens"][0, 1])
    assert worker != os.getpid()
    os.kill(worker, signal.SIGTERM)
    numbers = [int(next(loader)["tokens"][0, 0]) for _ in range(20)]
    assert numbers == list(range(1, 21))


@pytest.mark.parametrize(
    "change",
    [
        {"micro_batch_size": 0},
        {"data_parallel_size": 0},
        {"consumed_samples": -1},
        {"data_parallel_rank": 2},
        {"data_parallel_rank": -1},
    ],
)
def test_senseless_sizes_fail_at_once(change):
    arguments = {
        "consumed_samples": 0,
        "micro_batch_size": 1,
        "data_parallel_rank": 0,
        "data_parallel_size": 2,
    }
    (name,) = change
    with pytest.raises(ValueError, match=f"{name}={change[name]}"):
        batches(Numbers(10), **(arguments | change))


LEFT = """
import torch
from equilibrium_mcore.data.loader import batches
from equilibrium_mcore.data.samples import NumberedSamples

whole = NumberedSamples(torch.arange(64))
ranks = {"data_parallel_rank": 0, "data_parallel_size": 1}
left = batches(whole, consumed_samples=0, micro_batch_size=1, num_workers=2, **ranks)
next(left)
raise ValueError("planted")
"""


def test_a_process_ends_though_workers_are_left(tmp_path):
    """They ignore the signal by which multiprocessing would end them."""
    (tmp_path / "left.py").write_text(LEFT)
    command = [sys.executable, "-W", "ignore", tmp_path / "left.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "ValueError: planted" in done.stderr
