"""A world of one rank: made without a port or a file, and gone afterwards, whatever happens."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from equilibrium_mcore.config.schema import ModelConfig, ParallelismConfig, TrainingConfig
from equilibrium_mcore.parallel import accelerator

accelerator.install()

from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker  # noqa: E402
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler  # noqa: E402

from equilibrium_mcore.data.blend import Datasets  # noqa: E402
from equilibrium_mcore.models.provider import build_model  # noqa: E402
from equilibrium_mcore.parallel.process_groups import one_rank  # noqa: E402
from equilibrium_mcore.training.setup import run_alone  # noqa: E402
from equilibrium_mcore.training.step import train_step  # noqa: E402
from tests.support.runs import MODEL, tiny_run  # noqa: E402


def test_groups_of_one_rank_and_the_same_seeds_each_time():
    drawn = []
    for _ in range(2):
        with one_rank(seed=5) as groups:
            sizes = [group.size() for group in (groups.tp, groups.pp, groups.cp, groups.dp_cp)]
            assert sizes == [1, 1, 1, 1] and torch.distributed.get_world_size() == 1
            drawn.append(torch.rand(3))
    assert torch.equal(*drawn) and not torch.distributed.is_initialized()


def test_groups_are_left_where_the_work_fails():
    with pytest.raises(KeyError), one_rank(seed=5):
        raise KeyError
    assert not torch.distributed.is_initialized()


def test_a_rank_of_a_job_is_no_world_of_its_own():
    with one_rank(seed=5):
        with pytest.raises(RuntimeError, match="in a process of its own"), one_rank(seed=5):
            pass
        assert torch.distributed.is_initialized()  # the groups that were there stay


@pytest.mark.parametrize("worlds", [1, 2], ids=["in_one_world", "in_the_next_world"])
def test_a_deeper_model_may_follow(worlds):
    """megatron-core keeps a figure per MoE layer for the process: of the last model's layers."""
    for depths in [(1, 8)] if worlds == 1 else [(1,), (8,)]:
        with one_rank(seed=5) as groups:
            for depth in depths:
                losses = balancing_losses(depth, groups)
                assert losses.shape == (depth,) and (losses > 0).all()


def balancing_losses(depth: int, groups: Any) -> torch.Tensor:
    """What megatron-core logged for each layer (layers,), in one pass through a model of these."""
    sections = {"moe": {**MODEL["moe"], "load_balancing": "aux_loss"}}
    model = ModelConfig(**{**MODEL, "layer_pattern": "E" * depth, **sections})
    training = TrainingConfig(
        sequence_length=16, global_batch_size=1, steps=1, precision="fp32", backend="torch"
    )
    module = build_model(model, ParallelismConfig(), training, groups).train()
    tokens = torch.arange(16).unsqueeze(0)
    logits = module(tokens, tokens, None)
    # As the schedule sets it before backward, here with another shape for the deeper model.
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones([] if depth == 1 else [1]))
    logits.sum().backward()
    (entry,) = get_moe_metrics_tracker().metrics.values()
    return entry.values


def test_a_run_of_one_rank_closes_its_data(data, tmp_path):
    config = tiny_run(data, tmp_path, parallelism={"world_size": 1})
    closed = []
    with pytest.raises(KeyError), run_alone(config) as run:
        assert isinstance(run.datasets, Datasets)
        close = run.stream.close
        run.stream.close = lambda: (closed.append(True), close())
        raise KeyError
    assert closed and not torch.distributed.is_initialized()


def test_gradients_are_reduced_while_backward_runs(data, tmp_path):
    """When backward is over, every bucket's sum has begun; without overlap, none.

    megatron-core learns in the first step which gradients a bucket waits for. With few tokens,
    some experts have none in a step, and others in the next.
    """
    short = {"sequence_length": 8, "global_batch_size": 2}
    seen = {}
    for overlap in (False, True):
        parallelism = {"world_size": 1, "overlap_grad_reduce": overlap}
        if overlap:
            parallelism["gradient_bucket_size"] = 2000
        config = tiny_run(data, tmp_path, parallelism=parallelism, training=short)
        with run_alone(config) as run:
            groups = run.chunks[0].bucket_groups + run.chunks[0].expert_parallel_bucket_groups
            finalize, begun = run.transformer.finalize_model_grads_func, []

            def noted(*arguments, groups=groups, finalize=finalize, begun=begun, **named):
                begun.append({group.grad_reduce_handle is not None for group in groups})
                finalize(*arguments, **named)

            run.transformer.finalize_model_grads_func = noted
            outcomes = [train_step(run) for _ in range(3)]
        assert begun == [{False}, {overlap}, {overlap}]
        seen[overlap] = (len(groups), [(o.loss, o.gradient_norm) for o in outcomes])
    assert seen[True][0] > 3 * seen[False][0]
    assert seen[True][1] == seen[False][1]
