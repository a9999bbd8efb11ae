"""No token sees the future, in any mixer, with and without context parallelism."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from equilibrium_mcore.parallel.launch import RankInfo
from tests.support.runs import MODEL, tiny_run

PATTERNS = {
    "mamba": {"layer_pattern": "MM", "mla": None, "moe": None, "mlp": None},
    "mla": {"layer_pattern": "+-", "moe": None},
    "attention": {
        "layer_pattern": "*-",
        "mla": None,
        "moe": None,
        "attention": {"num_heads": 4, "num_query_groups": 2, "head_dim": 16},
    },
    "hybrid": {},
}
CHANGED = 37  # position of the token that differs, within the 64 of a sequence


def _logits(rank_info: RankInfo, config, changed: bool) -> torch.Tensor:
    """Logits (sequence, vocabulary) of a fixed sequence, put together from all CP ranks."""
    from megatron.core.ssm.mamba_context_parallel import _undo_attention_load_balancing
    from megatron.core.utils import get_batch_on_this_cp_rank

    from equilibrium_mcore.models.provider import build_model
    from equilibrium_mcore.parallel import process_groups

    process_groups.initialize_distributed(
        rank=rank_info.rank,
        world_size=rank_info.world_size,
        local_rank=0,
        timeout_minutes=2,
        init_method=rank_info.init_method,
    )
    groups = process_groups.initialize_groups(config.parallelism)
    process_groups.seed_everything(3)
    model = build_model(config.model, config.parallelism, config.training, groups)
    length = config.training.sequence_length
    tokens = torch.arange(1, length + 1).remainder(config.model.vocab_size).unsqueeze(0)
    if changed:
        tokens[0, CHANGED] += 100
    batch = {"tokens": tokens, "position_ids": torch.arange(length).unsqueeze(0)}
    batch = get_batch_on_this_cp_rank(
        {**batch, "cu_seqlens": None}, is_hybrid_cp=False, cp_group=groups.cp
    )
    with torch.no_grad():
        local = model(batch["tokens"], batch["position_ids"], None)[0]
    if rank_info.world_size == 1:
        return local
    pieces = [torch.empty_like(local) for _ in range(rank_info.world_size)]
    torch.distributed.all_gather(pieces, local.contiguous())
    return _undo_attention_load_balancing(torch.cat(pieces), rank_info.world_size)


@pytest.mark.parametrize("context", [1, 2])
@pytest.mark.parametrize("name", PATTERNS)
def test_a_changed_token_leaves_earlier_logits_alone(ranks, data, tmp_path, name, context):
    model: dict[str, Any] = {**MODEL, **PATTERNS[name]}
    config = tiny_run(
        data, tmp_path, model=model, parallelism={"world_size": context, "context": context}
    )
    plain = ranks.run(context, _logits, config, False)[0]
    changed = ranks.run(context, _logits, config, True)[0]
    # Nothing before the change has another input, so it is equal to the last bit. Only an expert's
    # product over another number of tokens may round differently.
    tolerance = 1e-6 if "E" in model["layer_pattern"] else 0.0
    torch.testing.assert_close(plain[:CHANGED], changed[:CHANGED], rtol=0, atol=tolerance)
    assert not torch.allclose(plain[CHANGED], changed[CHANGED])
    assert not torch.allclose(plain[-1], changed[-1]), "the future does not see the past"


@pytest.mark.parametrize("name", PATTERNS)
def test_context_parallelism_gives_the_same_logits(ranks, data, tmp_path, name):
    model: dict[str, Any] = {**MODEL, **PATTERNS[name]}
    whole, halves = (
        ranks.run(
            size,
            _logits,
            tiny_run(
                data, tmp_path, model=model, parallelism={"world_size": size, "context": size}
            ),
            False,
        )[0]
        for size in (1, 2)
    )
    torch.testing.assert_close(whole, halves, rtol=1e-4, atol=1e-5)
