"""A scalar head: a value per token, in every layout, from weights that have none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.parallel.launch import RankInfo
from tests.support.pool import RankError
from tests.support.runs import MODEL, tiny_run, train_steps
from tests.training.test_scoring import made_up_batches

LAYOUTS: dict[str, dict[str, Any]] = {
    "mixed": {"world_size": 2, "tensor": 2, "sequence": True, "expert": 2},
    "cp2": {"world_size": 2, "context": 2},
    "pp2_vpp2": {"world_size": 2, "pipeline": 2, "virtual_pipeline": 2},
    "tp2_sp_cp2_pp2": {"world_size": 8, "tensor": 2, "sequence": True, "context": 2, "pipeline": 2},
}
STEPS = 3


class Regression:
    """What a critic's loss is: squared errors of the values of tokens."""

    figures = ("loss",)
    tokens_of = "loss"
    has_perplexity = False
    reads = "both"
    carried = ()
    inputs = ()

    def weigh(self, batch: dict[str, Tensor]) -> float:
        return float(batch["loss_mask"].sum())

    def __call__(self, output: Any, batch: dict[str, Tensor], *, cp_group: Any) -> Any:
        from equilibrium_mcore.models.heads import values_of
        from equilibrium_mcore.training.objective import ObjectiveOutput

        values = values_of(output)
        errors = (values - (batch["labels"] % 3 - 1.0)).square() * batch["loss_mask"]
        total = errors.sum()
        if output.dim() == 3:
            total = total + (output[0] * batch["loss_mask"]).sum()
        return ObjectiveOutput(total, {"loss": (total.detach(), batch["loss_mask"].sum())})


def config_of(data: dict, folder: Path, layout: dict, weights: Path | None, **changes: Any):
    """A run of made-up tokens; a scalar head alone is a reward model's."""
    head = changes.pop("head", "scalar")
    packed = {**data, "packing": "documents", "document_multiple": 8}
    if head == "scalar":
        source = {"name": "made_up", "train": ["made_up.jsonl"]}
        packed = {"type": "preferences", "name": "made_up", "tokenizer": data["tokenizer"]}
        packed |= {"sources": [source], "document_multiple": 8}
    moe = {**MODEL["moe"], "load_balancing": "none"}
    return tiny_run(
        packed,
        folder,
        stage="reward_model" if head == "scalar" else "pretrain",
        model={**MODEL, "moe": moe, "head": head, **changes.pop("model", {})},
        parallelism=layout,
        checkpoint={"initial_weights": None if weights is None else str(weights)},
        objective={"type": "reward_model" if head == "scalar" else "next_token"},
        **changes,
    )


def critic(
    rank_info: RankInfo, config: RunConfig, steps: int, save: bool = False
) -> dict[str, Any]:
    """Values of made-up batches, before and after some steps; losses; the head's gradient."""
    from equilibrium_mcore.certify.tokens import made_up_datasets
    from equilibrium_mcore.training import setup as setting_up
    from equilibrium_mcore.training.callbacks import LogCallback
    from equilibrium_mcore.training.saving import CheckpointCallback
    from equilibrium_mcore.training.scoring import scalar_values
    from equilibrium_mcore.training.step import train_step

    run = setting_up.setup(config, rank_info, datasets=made_up_datasets(config))
    run.objective = Regression()
    batches = made_up_batches(8)
    found: dict[str, Any] = {"start": run.progress.step, "before": scalar_values(run, batches)}
    outcomes = [train_step(run) for _ in range(steps)]
    found["loss"] = [(o.loss, o.gradient_norm) for o in outcomes]
    found["after"] = scalar_values(run, batches)
    found["names"] = [p.name for p in run.optimizer.parameters]
    if save:
        CheckpointCallback(config, LogCallback(config)).on_end(run, reason="stop")
    setting_up.teardown(run)
    return found


@pytest.fixture(scope="module")
def headless(ranks, data, tmp_path_factory) -> Path:
    """A run whose checkpoint has an output layer and no scalar head."""
    folder = tmp_path_factory.mktemp("headless")
    ranks.run(1, train_steps, config_of(data, folder, {}, None, head="output"), 1, True)
    return folder


@pytest.fixture(scope="module", params=["scalar", "both"])
def one_rank(request, ranks, data, headless, tmp_path_factory) -> tuple[str, Path, dict]:
    """The head, the folder and what one rank found."""
    folder = tmp_path_factory.mktemp(request.param)
    config = config_of(data, folder, {}, headless, head=request.param)
    return request.param, folder, ranks.run(1, critic, config, STEPS, True)[0]


@pytest.mark.parametrize(
    "name",
    ["mixed", *(pytest.param(n, marks=pytest.mark.slow) for n in LAYOUTS if n != "mixed")],
)
def test_values_and_training_are_the_same_in_every_layout(
    ranks, data, headless, one_rank, tmp_path, name
):
    head, _, expected = one_rank
    layout = LAYOUTS[name]
    config = config_of(data, tmp_path, layout, headless, head=head)
    for found in ranks.run(layout["world_size"], critic, config, STEPS):
        for key in ("before", "after"):
            for values, whole in zip(found[key], expected[key], strict=True):
                assert values.shape == whole.shape and values.std() > 0.01
                assert torch.allclose(values, whole, atol=2e-4)
        assert torch.tensor(found["loss"]).allclose(torch.tensor(expected["loss"]), rtol=2e-4)


def test_the_output_layer_stays_or_goes(one_rank):
    head, _, found = one_rank
    assert "scalar_head.weight" in found["names"]
    assert ("output_layer.weight" in found["names"]) == (head == "both")


def test_a_head_resumes_in_another_layout(ranks, data, headless, one_rank, tmp_path):
    """The checkpoint holds it: values after the load are those from before the save."""
    head, folder, expected = one_rank
    for layout in ({}, LAYOUTS["mixed"]):
        config = config_of(data, folder, layout, headless, head=head)
        found = ranks.run(layout.get("world_size", 1), critic, config, 0)[0]
        assert found["start"] == STEPS
        for values, whole in zip(found["before"], expected["after"], strict=True):
            assert torch.allclose(values, whole, atol=2e-4 if layout else 0.0, rtol=0.0)


def test_weights_with_another_head(ranks, data, one_rank, tmp_path):
    """A head among the weights is taken; an output layer that they lack is no model."""
    head, folder, expected = one_rank
    config = config_of(data, tmp_path, {}, folder, head="scalar")
    found = ranks.run(1, critic, config, 0)[0]
    assert all(map(torch.equal, found["before"], expected["after"]))
    backwards = config_of(data, tmp_path / "back", {}, folder, head="output")
    if head == "both":
        ranks.run(1, train_steps, backwards, 1)
    else:
        with pytest.raises(RankError, match="model.head='output', but the weights have"):
            ranks.run(1, train_steps, backwards, 1)


def test_a_model_without_a_head_has_no_values(ranks, data, tmp_path):
    config = config_of(data, tmp_path, {}, None, head="output")
    with pytest.raises(RankError, match="without a scalar head"):
        ranks.run(1, critic, config, 0)


@pytest.mark.slow
@pytest.mark.parametrize(
    "layout", [{"world_size": 2, "pipeline": 2}, {"world_size": 2, "tensor": 2}]
)
@pytest.mark.parametrize("head", ["scalar", "both"])
def test_a_tied_table_is_no_output_layer(ranks, data, tmp_path, layout, head):
    """Over pipeline stages the last one has no copy of it; and tensor ranks without SP."""
    model = {"tie_embeddings": True, "layer_pattern": "M-|+-", "moe": None}
    start = config_of(data, tmp_path / "start", {}, None, model=model, head="output")
    ranks.run(1, train_steps, start, 1, True)
    found = {}
    for name, where in {"one": {}, "cut": layout}.items():
        config = config_of(data, tmp_path / name, where, tmp_path / "start", model=model, head=head)
        found[name] = ranks.run(where.get("world_size", 1), critic, config, STEPS)
    for rank in found["cut"]:
        assert "output_layer.weight" not in rank["names"] or head == "both"
        for values, whole in zip(rank["after"], found["one"][0]["after"], strict=True):
            assert torch.allclose(values, whole, atol=2e-4)
