"""The exchange of weights: nothing padded, bounded memory, every element once, in every layout."""

from __future__ import annotations

import functools

import pytest
import torch

from equilibrium_mcore.config.load import load_model
from equilibrium_mcore.config.optimizers import OptimizerConfig
from equilibrium_mcore.optim import exchange
from equilibrium_mcore.optim.exchange import ROUND_ELEMENTS, plan_rounds, share_updates
from equilibrium_mcore.optim.ownership import spread, work
from equilibrium_mcore.optim.parameters import Parameter, layout_free_names
from equilibrium_mcore.optim.treatment import treatment_of
from equilibrium_mcore.parallel.rank_job import RankInfo
from tests.optim.support import matrix

EXPERT_RANKS = {"equilibrium_3b": 8}
MODELS = ["equilibrium_3b", "llama_1b", "llama_7b", "qwen2_7b"]


def _parameters_of(name: str) -> list[Parameter]:
    """A model's real parameters, on `meta`, as the optimizer sees them."""
    from equilibrium_mcore.models.parameters import build_on_meta

    model, optimizer = load_model(name), OptimizerConfig()
    found = []
    for named, tensor in layout_free_names(build_on_meta(model)):
        parameter = matrix(tensor, optimizer.muon)
        parameter.treatment = treatment_of(named, tensor.shape, model=model, optimizer=optimizer)
        parameter.is_expert = ".local_experts." in named
        found.append(parameter)
    return found


def _owned_elements(parameters: list[Parameter], ranks: int) -> list[int]:
    """Elements of each rank's share, as `assign_owners` spreads them over one group."""
    parameters = sorted(parameters, key=work, reverse=True)
    owners = spread([work(parameter) for parameter in parameters], [0.0] * ranks)
    sizes = [0] * ranks
    for parameter, owner in zip(parameters, owners, strict=True):
        sizes[owner] += parameter.model.numel()
    return sizes


def _tables(rank_info: RankInfo, config: None) -> list[tuple[str, list[int]]]:
    """What the ranks of each group own: of dense parameters, and of one rank's experts."""
    tables = []
    for name in MODELS:
        parameters = _parameters_of(name)
        expert_ranks = EXPERT_RANKS.get(name, 1)
        dense = [p for p in parameters if not p.is_expert]
        experts = [p for p in parameters if p.is_expert]
        local = experts[: len(experts) // expert_ranks]
        for ranks in (8, 64, 256, 1024):
            tables.append((f"{name}, dense on {ranks}", _owned_elements(dense, ranks)))
            if local:
                owned = _owned_elements(local, ranks // expert_ranks)
                tables.append((f"{name}, experts on {ranks}", owned))
    return tables


def test_real_models_gather_what_they_have_within_bounds(ranks):
    tables = ranks.run(1, _tables, None)[0]
    assert len(tables) == 4 * (len(MODELS) + len(EXPERT_RANKS))
    for what, owned in tables:
        size, rounds = len(owned), plan_rounds(owned)
        gathered = sum(size * round_.slice_elements for round_ in rounds)
        assert sum(owned) <= gathered < sum(owned) + size * len(rounds), what
        for round_ in rounds:
            assert size * round_.slice_elements <= ROUND_ELEMENTS + 2 * size, what
            # In proportion: no owner sends the most of a round that others could fill.
            share = max(round_.sizes) / sum(round_.sizes)
            assert share == pytest.approx(max(owned) / sum(owned), rel=1e-3), what


def test_rounds_are_whole_and_bounded():
    sizes = [7, 0, 1000, 13]
    rounds = plan_rounds(sizes, elements=64)
    assert len(rounds) == 16
    assert rounds[0].first == [0, 0, 0, 0] and rounds[-1].last == sizes
    for one, next_ in zip(rounds, rounds[1:], strict=False):
        assert one.last == next_.first
    for round_ in rounds:
        assert sum(round_.sizes) <= 64 + len(sizes)
        received = [sum(round_.splits(o)[rank] for o in range(4)) for rank in range(4)]
        assert max(received) == round_.slice_elements
        assert sum(received) == sum(round_.sizes) > 4 * (round_.slice_elements - 1)
        assert [sum(round_.splits(owner)) for owner in range(4)] == round_.sizes


SHAPES = [(3, 5), (1,), (40, 7), (2, 2), (129,), (6, 6)]


OWNERS = {"an owner of nothing": [0, 0, 2, 0, 2, 0], "all own something": [2, 1, 0, 1, 2, 0]}


def _share(
    rank_info: RankInfo, config: None, *, meeting: str, elements: int, owners: list[int]
) -> list[list[float]]:
    """Every owner writes its rank into its parameters, and sends them; what this rank has then."""
    torch.distributed.init_process_group(
        "gloo", init_method=meeting, rank=rank_info.rank, world_size=rank_info.world_size
    )
    exchange.ROUND_ELEMENTS = elements
    parameters = []
    for number, shape in enumerate(SHAPES):
        for dtype in (torch.float32, torch.bfloat16):
            parameter = matrix(torch.full(shape, -1.0, dtype=dtype), OptimizerConfig().muon)
            parameter.data_group = torch.distributed.group.WORLD
            parameter.owner = owners[number]
            if parameter.is_owned:
                count = torch.arange(parameter.model.numel()).view(shape)
                parameter.model.data.copy_(count % 100 + 100 * number)
            parameters.append(parameter)
    seen = []
    share_updates(parameters, see=lambda p, old, new: seen.append((old.numel(), (old == -1).all())))
    others = sum(p.model.numel() for p in parameters if not p.is_owned)
    assert sum(count for count, _ in seen) == others and all(first for _, first in seen)
    torch.distributed.destroy_process_group()
    return [p.model.float().flatten().tolist() for p in parameters]


@pytest.mark.parametrize("owners", OWNERS)
@pytest.mark.parametrize("elements", [10, 10_000])
def test_every_rank_has_the_owners_weights(ranks, tmp_path, elements, owners):
    meeting = f"file://{tmp_path}/meeting"
    got = ranks.run(
        3,
        functools.partial(_share, meeting=meeting, elements=elements, owners=OWNERS[owners]),
        None,
    )
    for rank in got:
        for position, values in enumerate(rank):
            number, dtype = position // 2, [torch.float32, torch.bfloat16][position % 2]
            whole = torch.arange(torch.Size(SHAPES[number]).numel()) % 100 + 100 * number
            assert values == whole.to(dtype).float().tolist()
