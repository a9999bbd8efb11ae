"""Which groups a rank makes, in worlds of up to 1,024 ranks, and through which objects travel."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch.testing._internal.distributed.fake_pg import FakeStore

from equilibrium_mcore.config.schema import ParallelismConfig
from equilibrium_mcore.parallel import accelerator

accelerator.install()

from equilibrium_mcore.checkpoint.together import on_every_rank, on_first_rank  # noqa: E402
from equilibrium_mcore.parallel import process_groups  # noqa: E402
from equilibrium_mcore.parallel.object_group import object_group  # noqa: E402

LAYOUT = ParallelismConfig(tensor=2, sequence=True, pipeline=2, expert=4, context=2)


class Requests:
    """What torch.distributed was asked for; torch's backend of fake groups serves it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, world_size: int) -> None:
        self.default: dict = {}
        self.groups: list[dict] = []
        init, new = torch.distributed.init_process_group, torch.distributed.new_group

        def init_process_group(**asked):
            self.default = asked
            init("fake", store=FakeStore(), rank=asked["rank"], world_size=world_size)

        def new_group(ranks=None, *, backend=None, **asked):
            self.groups.append({"ranks": ranks, "backend": backend})
            return new(ranks, backend="fake", **asked)

        monkeypatch.setattr(torch.distributed, "init_process_group", init_process_group)
        monkeypatch.setattr(torch.distributed, "new_group", new_group)

    def of_rank(self, rank: int) -> int:
        """Groups that this rank is in, with others: each is a communicator to set up."""
        return sum(
            group["ranks"] is None or (rank in group["ranks"] and len(group["ranks"]) > 1)
            for group in self.groups
        )


@pytest.fixture
def cuda_host(monkeypatch) -> Iterator[None]:
    """What initialisation asks about the host, as a host with GPUs answers."""
    monkeypatch.setattr(accelerator, "has_cuda", lambda: True)
    yield
    process_groups.destroy()


def start(monkeypatch: pytest.MonkeyPatch, *, world_size: int, rank: int) -> Requests:
    requests = Requests(monkeypatch, world_size)
    process_groups.initialize_distributed(
        rank=rank, world_size=world_size, local_rank=rank % 8, timeout_minutes=5
    )
    process_groups.initialize_groups(LAYOUT)
    return requests


@pytest.mark.parametrize("world_size", [8, 64, 1024])
def test_one_group_is_gloos_and_none_is_split_off_at_once(monkeypatch, cuda_host, world_size):
    requests = start(monkeypatch, world_size=world_size, rank=world_size - 1)
    assert requests.default["backend"] == "nccl"
    assert requests.default.get("device_id") is None  # with it, every group is split off eagerly
    # None: as the default group.
    assert [g["backend"] for g in requests.groups if g["backend"] is not None] == ["gloo"]
    assert object_group() is not torch.distributed.group.WORLD


def test_a_ranks_groups_do_not_grow_with_the_world(monkeypatch, cuda_host):
    counts = {}
    for world_size in (64, 1024):
        rank = world_size // 2 + 5
        with monkeypatch.context() as patch:
            counts[world_size] = start(patch, world_size=world_size, rank=rank).of_rank(rank)
        process_groups.destroy()
    assert counts[64] == counts[1024] > 5


def test_objects_travel_through_their_group(monkeypatch):
    """On CPU ranks that is the default group; a group of its own is taken where there is one."""
    with process_groups.one_rank(seed=0):
        assert object_group() is torch.distributed.group.WORLD
        asked = []
        for name in ("broadcast_object_list", "all_gather_object"):
            plain = getattr(torch.distributed, name)

            def noted(*arguments, plain=plain, **named):
                asked.append(named["group"])
                return plain(*arguments, **named)

            monkeypatch.setattr(torch.distributed, name, noted)
        from equilibrium_mcore.parallel import object_group as module

        module.create(timeout_minutes=1)
        assert on_first_rank(lambda: 7) == 7 and on_every_rank(lambda: 8) == [8]
        assert asked == [object_group()] * 2
        assert object_group() is not torch.distributed.group.WORLD
    assert module._group is None
