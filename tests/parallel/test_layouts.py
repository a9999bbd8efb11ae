"""The same numbers in every layout: from one checkpoint, losses and gradient norms agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.runs import MODEL, tiny_run, train_steps

# Re-ordered sums in float32 differ by some 1e-6; the issue allows 1e-4 over five steps.
TOLERANCE = 1e-4
STEPS = 5

GQA_MODEL = {
    **MODEL,
    "layer_pattern": "M-|*E",
    "mla": None,
    "attention": {"num_heads": 4, "num_query_groups": 2, "head_dim": 16, "qkv_bias": True},
    "tie_embeddings": True,
    "moe": {**MODEL["moe"], "score_function": "sigmoid", "expert_bias": True},
}

LAYOUTS: dict[str, tuple[int, dict[str, Any]]] = {
    "dp2": (2, {}),
    "dp2_undistributed_optimizer": (2, {"distributed_optimizer": False}),
    "tp2_sp": (2, {"tensor": 2, "sequence": True}),
    "etp2_ep2": (4, {"expert_tensor": 2, "expert": 2}),
    "pp2": (2, {"pipeline": 2}),
    "pp2_vpp2": (2, {"pipeline": 2, "virtual_pipeline": 2}),
    "ep2": (2, {"expert": 2}),
    "etp2": (2, {"expert_tensor": 2}),
    "cp2": (2, {"context": 2}),
    "tp2_cp2_pp2_ep2": (
        8,
        {"tensor": 2, "sequence": True, "context": 2, "pipeline": 2, "expert": 2},
    ),
}
GQA_LAYOUTS = {name: LAYOUTS[name] for name in ("dp2", "tp2_sp", "pp2", "ep2", "cp2")}
GQA_LAYOUTS["cp4"] = (4, {"context": 4})  # more ranks than key/value heads


class Reference:
    """A checkpoint after two steps, and five more steps on one rank."""

    def __init__(self, ranks, data: dict, folder: Path, model: dict) -> None:
        self.data, self.folder, self.model = data, folder, model
        start = tiny_run(data, folder / "start", model=model)
        ranks.run(1, train_steps, start, 2, True)
        self.checkpoint = folder / "start"
        self.curve = self.train(ranks, 1, {})

    def train(self, ranks, world_size: int, parallelism: dict, **changes: Any) -> dict[str, Any]:
        """Five steps from the checkpoint's weights in a layout; rank 0's outcome."""
        config = tiny_run(
            {**self.data, **changes.pop("data", {})},
            self.folder / "unused",
            model=self.model,
            parallelism={"world_size": world_size, **parallelism},
            checkpoint={"initial_weights": str(self.checkpoint), "resume": "never"},
            **changes,
        )
        outcomes = ranks.run(world_size, train_steps, config, STEPS)
        squares: dict[str, float] = {}
        for outcome in outcomes:
            for name, square in outcome.pop("gradient_squares").items():
                squares[name] = squares.get(name, 0.0) + square
        assert all(outcome == outcomes[0] for outcome in outcomes), "ranks disagree"
        gradients = {name: square**0.5 for name, square in squares.items()}
        return {**outcomes[0], "gradients": gradients}


@pytest.fixture(scope="module")
def hybrid(ranks, data, tmp_path_factory) -> Reference:
    return Reference(ranks, data, tmp_path_factory.mktemp("hybrid"), MODEL)


@pytest.fixture(scope="module")
def gqa(ranks, data, tmp_path_factory) -> Reference:
    return Reference(ranks, data, tmp_path_factory.mktemp("gqa"), GQA_MODEL)


@pytest.fixture(scope="module")
def dense(ranks, data, tmp_path_factory) -> Reference:
    model = {**MODEL, "layer_pattern": "M-+-", "moe": None}
    return Reference(ranks, data, tmp_path_factory.mktemp("dense"), model)


def assert_same_curve(outcome: dict[str, Any], reference: dict[str, Any]) -> None:
    for name in ("loss", "norm", "aux"):
        if reference[name][0] is None:  # no experts, so no auxiliary loss
            continue
        assert outcome[name] == pytest.approx(reference[name], rel=TOLERANCE), name
    # A curve of a few steps hides a gradient that is wrong by a part; each by itself does not.
    assert outcome["gradients"] == pytest.approx(reference["gradients"], rel=TOLERANCE)


@pytest.mark.parametrize("name", LAYOUTS)
def test_hybrid_model_has_the_curve_of_one_rank(ranks, hybrid, name):
    world_size, parallelism = LAYOUTS[name]
    assert_same_curve(hybrid.train(ranks, world_size, parallelism), hybrid.curve)


def test_tensor_parallelism_without_sequence_parallelism(ranks, dense):
    """Another path through MLA; a model with MoE may not take it."""
    assert_same_curve(dense.train(ranks, 2, {"tensor": 2}), dense.curve)


@pytest.mark.parametrize("name", GQA_LAYOUTS)
def test_gqa_model_has_the_curve_of_one_rank(ranks, gqa, name):
    world_size, parallelism = GQA_LAYOUTS[name]
    assert_same_curve(gqa.train(ranks, world_size, parallelism), gqa.curve)


OVERLAP = {"overlap_grad_reduce": True, "gradient_bucket_size": 2000}
# Two data ranks: sums of two numbers do not depend on where a bucket begins.
OVERLAPPED = {
    "ep2": (2, {"expert": 2}),
    "pp2_vpp2_dp2": (4, {"pipeline": 2, "virtual_pipeline": 2}),
}


@pytest.mark.parametrize("name", OVERLAPPED)
def test_gradients_reduced_during_backward_are_the_same(ranks, hybrid, name):
    """Over several micro-batches, in buckets of a layer or two: equal to the bit."""
    world_size, parallelism = OVERLAPPED[name]
    after, during = (
        hybrid.train(ranks, world_size, {**parallelism, **more}) for more in ({}, OVERLAP)
    )
    assert during == after
    assert_same_curve(during, hybrid.curve)


def test_shared_experts_beside_the_exchange_of_tokens_are_the_same(ranks, hybrid):
    layout = {"tensor": 2, "sequence": True, "expert": 2, "overlap_shared_experts": True}
    fused = {"fused": {"activation": True}}
    assert_same_curve(hybrid.train(ranks, 2, layout, training=fused), hybrid.curve)


PACKED = {"packing": "documents", "document_multiple": 4}
PACKED_LAYOUTS = {name: LAYOUTS[name] for name in ("cp2", "tp2_cp2_pp2_ep2")}


def test_packed_documents_have_the_curve_of_one_rank(ranks, hybrid):
    long = {"sequence_length": 256}  # several documents in a sequence
    stream = hybrid.train(ranks, 1, {}, training=long)
    one = hybrid.train(ranks, 1, {}, data=PACKED, training=long)
    assert one["gradients"] != pytest.approx(stream["gradients"], rel=100 * TOLERANCE)
    for world_size, parallelism in PACKED_LAYOUTS.values():
        outcome = hybrid.train(ranks, world_size, parallelism, data=PACKED, training=long)
        assert_same_curve(outcome, one)


def test_packed_sequences_of_a_micro_batch_are_one(ranks, dense):
    one, both = (
        dense.train(ranks, 1, {}, data=PACKED, training={"micro_batch_size": size})
        for size in (1, 2)
    )
    assert_same_curve(both, one)


@pytest.mark.parametrize(
    "recompute",
    [
        {"recompute": "full"},
        {"recompute": "selective", "recompute_modules": ["core_attn", "moe", "mla_up_proj"]},
    ],
    ids=["full", "selective"],
)
def test_recomputation_changes_nothing(ranks, hybrid, recompute):
    outcome = hybrid.train(ranks, 1, {}, training=recompute)
    assert_same_curve(outcome, hybrid.curve)


def test_bf16_follows_fp32(ranks, hybrid):
    """bfloat16 has 8 bits: a loss near 6 over a few hundred tokens agrees to about 1e-2."""
    outcome = hybrid.train(
        ranks, 2, {"tensor": 2, "sequence": True}, training={"precision": "bf16"}
    )
    assert outcome["loss"] == pytest.approx(hybrid.curve["loss"], rel=1e-2)
    assert outcome["loss"] != hybrid.curve["loss"]
