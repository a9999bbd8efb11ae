"""The objective: one sum, whatever the layout, the accumulation and the share that counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.parallel.launch import RankInfo
from tests.support.runs import MODEL, tiny_run

TP_SP_EP = {"world_size": 2, "tensor": 2, "sequence": True, "expert": 2}


def kept_gradients(run: Any) -> list:
    """Filled with every gradient that this rank owns when the optimizer steps."""
    from equilibrium_mcore.certify.whole import pieces_of

    found: list = []
    update = run.optimizer.step

    def noted() -> Any:
        found.extend(pieces_of(run, {p.name: p.gradient for p in run.optimizer.parameters}))
        return update()

    run.optimizer.step = noted
    return found


def gradients(
    rank_info: RankInfo, config: RunConfig, weights: str | None, mask: str = "made up"
) -> dict[str, Any]:
    """The first step's loss, and every gradient that this rank owns, by parameter name."""
    from equilibrium_mcore.certify.tokens import made_up_datasets
    from equilibrium_mcore.training.callbacks import LogCallback
    from equilibrium_mcore.training.saving import CheckpointCallback
    from equilibrium_mcore.training.setup import setup, teardown
    from equilibrium_mcore.training.step import train_step

    if weights:
        checkpoint = {"initial_weights": weights}
        config = config.model_copy(
            update={"checkpoint": config.checkpoint.model_copy(update=checkpoint)}
        )
    run = setup(config, rank_info, datasets=made_up_datasets(config))
    draw = run.stream.next_batches

    def masked(count: int) -> list:
        batches = draw(count)
        for batch in batches:
            if mask == "none":
                batch["loss_mask"].zero_()
        return batches

    run.stream.next_batches = masked
    found = kept_gradients(run)
    if not weights:
        CheckpointCallback(config, LogCallback(config)).on_end(run, reason="stop")
    outcome = train_step(run)
    teardown(run)
    return {"loss": outcome.loss, "tokens": outcome.tokens, "pieces": found}


def whole(results: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    from equilibrium_mcore.checkpoint.pieces import assemble

    pieces = [piece for result in results for piece in result["pieces"]]
    return {name: found.data.double() for name, found in assemble(pieces).items()}


def config_of(data: dict, folder: Any, *, objective: dict, parallelism: dict, **training: Any):
    coefficient = training.pop("coefficient", 0.01)
    balancing = training.pop("balancing", "seq_aux_loss")
    return tiny_run(
        {**data, "packing": "documents", "document_multiple": 4},
        folder,
        model={
            **MODEL,
            "layer_pattern": "ME|+E",
            "moe": {**MODEL["moe"], "load_balancing": balancing}
            | {"aux_loss_coefficient": coefficient},
        },
        objective=objective,
        parallelism=parallelism,
        training={"steps": 4, "global_batch_size": 4, "micro_batch_size": 1, **training},
    )


@pytest.fixture(scope="module")
def start(ranks, data, tmp_path_factory) -> str:
    """A run with a checkpoint of the first weights, which every case starts from."""
    folder = tmp_path_factory.mktemp("start")
    config = config_of(data, folder, objective={"type": "next_token"}, parallelism={})
    ranks.run(1, gradients, config, None)
    return str(folder)


@pytest.mark.parametrize(
    "objective",
    [
        {"type": "sft", "reduction": "sequence_mean"},
        {"type": "sft", "reduction": "constant_length", "constant_length": 32},
    ],
    ids=lambda objective: objective["reduction"],
)
def test_trap_8_token_mean_per_micro_batch_or_rank(ranks, data, tmp_path, start, objective):
    one = config_of(data, tmp_path / "one", objective=objective, parallelism={})
    expected = ranks.run(1, gradients, one, start)
    for name, layout in {"tp": TP_SP_EP, "cp": {"world_size": 2, "context": 2}}.items():
        config = config_of(data, tmp_path / name, objective=objective, parallelism=layout)
        found = ranks.run(2, gradients, config, start)
        assert found[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-5)
        assert found[0]["tokens"] == expected[0]["tokens"] < 4 * 64
        assert_close(whole(found), whole(expected), 1e-4)


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
def test_trap_8_the_same_batch_in_other_micro_batches(ranks, data, tmp_path, start, reduction):
    """1, 2 and 4 micro-batches, on one data rank and on two (trl#3021, open-instruct#1161)."""
    objective = {"type": "sft", "reduction": reduction}

    def seen(world_size: int, size: int) -> list[dict[str, Any]]:
        config = config_of(
            data,
            tmp_path / f"{world_size}_{size}",
            objective=objective,
            parallelism={"world_size": world_size},
            balancing="none",
            micro_batch_size=size,
        )
        return ranks.run(world_size, gradients, config, start)

    expected = seen(1, 1)
    for world_size, size in ((1, 2), (1, 4), (2, 1), (2, 2)):
        found = seen(world_size, size)
        assert found[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-6)
        assert_close(whole(found), whole(expected), 1e-4)


def assert_close(found: dict, expected: dict, tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        apart = (found[name] - tensor).norm() / tensor.norm().clamp(min=1e-12)
        assert apart < tolerance, f"{name}: {apart:.1e}"


def test_trap_9_denominator_re_weights_balancing(ranks, data, tmp_path, start):
    """Where nothing counts, what is left of the gradient is the balancing loss's, whole."""

    def run(name: str, coefficient: float, mask: str) -> dict[str, torch.Tensor]:
        config = config_of(
            data,
            tmp_path / name,
            objective={"type": "sft", "reduction": "sequence_mean"},
            parallelism={},
            coefficient=coefficient,
        )
        # Another coefficient makes no other weights; the check of models compares it all the same.
        return whole(ranks.run(1, gradients, config, start, mask))

    alone = run("alone", 0.01, "none")
    routers = [name for name, tensor in alone.items() if "router.weight" in name]
    assert routers and all(alone[name].norm() > 0 for name in routers)
    both, without = run("both", 0.01, "made up"), run("without", 0.0, "made up")
    for name in routers:
        left = both[name] - without[name]
        assert (left - alone[name]).norm() / alone[name].norm() < 1e-3


def of_pairs(rank_info: RankInfo) -> torch.Tensor:
    """The gradient of DPO to log p of this context rank's tokens, of four answers that all hold."""
    from equilibrium_mcore.config.objectives import DpoConfig
    from equilibrium_mcore.config.schema import ParallelismConfig
    from equilibrium_mcore.parallel import process_groups
    from equilibrium_mcore.training.all_objectives import build_objective

    layout = ParallelismConfig(context=rank_info.world_size)
    groups = process_groups.join(rank_info, layout, seed=1)
    draw = torch.Generator().manual_seed(1)
    losses, reference = torch.rand(2, 1, 32, generator=draw, dtype=torch.float64)
    whole = {
        "answer": torch.tensor([[0] * 6 + [1] * 5 + [2] * 7 + [3] * 10 + [4] * 4]),
        "reference": -reference,
    }
    objective = build_objective(DpoConfig(type="dpo"))
    objective.weigh(whole)
    mine = slice(groups.cp.rank(), None, groups.cp.size())  # of every answer some tokens
    losses = losses[:, mine].clone().requires_grad_()
    batch = {name: value[:, mine] for name, value in whole.items()}
    objective(losses, batch, cp_group=groups.cp).total.backward()
    process_groups.destroy()
    return losses.grad[0]


def test_trap_a_sum_over_context_ranks_counts_once(ranks):
    """A token's gradient is that of one rank, not as often as ranks have summed."""
    (expected,) = ranks.run(1, of_pairs)
    found = torch.stack(ranks.run(2, of_pairs), dim=1).flatten()
    assert expected.norm() > 0
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


class FromLogits:
    """-log p of each label and its entropy, both from the rank's slice of the logits."""

    figures, tokens_of, has_perplexity = ("loss", "entropy"), "loss", True
    reads, inputs, carried = "logits", (), ("note",)

    def weigh(self, batch: dict[str, Any]) -> float:
        """Positions that count; `note` is left for this rank alone."""
        batch["note"] = {"of": self}
        return float(batch["loss_mask"].sum())

    def __call__(self, logits: Any, batch: dict[str, Any], *, cp_group: Any) -> Any:
        """See Objective."""
        from equilibrium_mcore.training.objective import ObjectiveOutput

        assert batch["note"]["of"] is self
        log_p, entropy = logits.log_probabilities_and_entropies(batch["labels"])
        mask = batch["loss_mask"]
        total, of_entropy = (-log_p * mask).sum(), (entropy * mask).sum()
        figures = {
            "loss": (total.detach(), mask.sum()),
            "entropy": (of_entropy.detach(), mask.sum()),
        }
        return ObjectiveOutput(total, figures)


def gradients_from_logits(
    rank_info: RankInfo, config: RunConfig, weights: str | None
) -> dict[str, Any]:
    """`gradients` by an objective of logits."""
    from equilibrium_mcore.training import setup

    setup.build_objective = lambda settings: FromLogits()
    return gradients(rank_info, config, weights)


@pytest.mark.parametrize(
    "layout",
    [
        pytest.param(TP_SP_EP, id="tp2_sp_ep2"),
        pytest.param({"world_size": 2, "context": 2}, marks=pytest.mark.slow, id="cp2"),
        pytest.param({"world_size": 2, "pipeline": 2}, marks=pytest.mark.slow, id="pp2"),
    ],
)
def test_an_objective_of_logits_gets_each_ranks_slice(ranks, data, tmp_path, start, layout):
    """The vocabulary has no padding here: its gradients are those of next_token's losses."""
    config = config_of(data, tmp_path, objective={"type": "next_token"}, parallelism=layout)
    expected = ranks.run(2, gradients, config, start)
    found = ranks.run(2, gradients_from_logits, config, start)
    assert found[0]["loss"] == pytest.approx(expected[0]["loss"], rel=1e-6)
    assert_close(whole(found), whole(expected), 1e-5)
