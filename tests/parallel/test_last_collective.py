"""The last collective of a rank is named, with its sizes, its group and whether it returned."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path

from equilibrium_mcore.parallel.rank_job import RankInfo


def _waits_for_the_other(rank_info: RankInfo, config: None, *, folder: Path) -> str:
    import torch

    from equilibrium_mcore.parallel.last_collective import last_collectives

    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{folder}/meeting",
        rank=rank_info.rank,
        world_size=2,
    )
    group = torch.distributed.new_group([0, 1], group_desc="both of them")
    torch.distributed.all_gather_object([None, None], "something")
    torch.distributed.all_reduce(torch.ones(3, 5), group=group)
    seen = folder / "seen"
    text = last_collectives()
    if rank_info.rank == 0:
        work = torch.distributed.all_reduce(torch.ones(7), group=group, async_op=True)
        text = last_collectives()
        seen.touch()
    else:  # only now can the collective of the other complete
        while not seen.exists():
            time.sleep(0.01)
        work = torch.distributed.all_reduce(torch.ones(7), group=group, async_op=True)
    work.wait()
    torch.distributed.destroy_process_group()
    return text


def test_the_last_collective_of_each_group_is_named(ranks, tmp_path):
    stuck, other = ranks.run(2, partial(_waits_for_the_other, folder=tmp_path), None)
    first, second, *rest = stuck.splitlines()
    assert first == "the last collective in each process group, the newest first:"
    assert "all_reduce [7], number 2 of group" in second
    assert second.endswith("(both of them): NOT COMPLETED")
    assert any("all_gather" in line and line.endswith(": completed") for line in rest)
    assert "all_reduce [3, 5], number 1 of group" in other
    assert "NOT COMPLETED" not in other
