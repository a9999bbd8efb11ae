"""What balances the experts: over the whole batch on any number of data ranks, or nothing."""

from __future__ import annotations

import pytest

from tests.support.runs import MODEL, tiny_run, train_steps


def _run(data, folder, *, ranks: int, **moe):
    return tiny_run(
        data,
        folder,
        model={**MODEL, "moe": {**MODEL["moe"], **moe}},
        parallelism={"world_size": ranks},
        training={"micro_batch_size": 4 // ranks},
    )


def test_a_global_balancing_loss_does_not_depend_on_the_data_ranks(ranks, data, tmp_path):
    """megatron-core's own is halved by two data ranks, its gradient too."""
    moe = {"load_balancing": "global_aux_loss", "aux_loss_coefficient": 1.0}
    one = ranks.run(1, train_steps, _run(data, tmp_path / "1", ranks=1, **moe), 2)
    two = ranks.run(2, train_steps, _run(data, tmp_path / "2", ranks=2, **moe), 2)
    assert two[0]["aux"] == pytest.approx(one[0]["aux"], rel=1e-5)
    router = [name for name in one[0]["gradient_squares"] if name.endswith("router.weight")]
    assert router
    for name in router:
        total = sum(rank["gradient_squares"].get(name, 0.0) for rank in two)
        assert total == pytest.approx(one[0]["gradient_squares"][name], rel=1e-4)


@pytest.mark.parametrize(
    "moe", [{"load_balancing": "none"}, {"aux_loss_coefficient": 0.0}], ids=["none", "coefficient"]
)
def test_without_a_balancing_loss_there_is_no_figure(ranks, data, tmp_path, moe):
    (found,) = ranks.run(1, train_steps, _run(data, tmp_path, ranks=1, **moe), 1)
    assert found["aux"] == [None]
