"""Log-probabilities of given tokens: one answer in every layout, and nothing of the run changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.parallel.launch import RankInfo
from tests.support.runs import MODEL, VOCABULARY, tiny_run

# Rows 512 to 575 pad the vocabulary: a normaliser with them is off by about 0.1.
MULTIPLE = 192
SCORED_MODEL = {
    **MODEL,
    "vocab_size_multiple": MULTIPLE,
    "moe": {**MODEL["moe"], "score_function": "sigmoid", "expert_bias": True},
}
TEMPERATURES = (1.0, 0.6)
LAYOUTS: dict[str, dict[str, Any]] = {
    "cp2": {"world_size": 2, "context": 2},
    "pp2": {"world_size": 2, "pipeline": 2},
    "pp2_vpp2": {"world_size": 2, "pipeline": 2, "virtual_pipeline": 2},
    "dp2_ep2": {"world_size": 2, "expert": 2},
    "tp2_sp_cp2_pp2": {"world_size": 8, "tensor": 2, "sequence": True, "context": 2, "pipeline": 2},
}
TP_SP_EP = {"world_size": 2, "tensor": 2, "sequence": True, "expert": 2}
# Log-probabilities near -6: sums in another order, in float32.
TOLERANCE = 2e-5
BATCHES, SAMPLES, LENGTH = 3, 2, 64  # three micro-batches are no whole group of VPP's


def made_up_batches(document_multiple: int | None = None) -> list[dict[str, Tensor]]:
    """Three of [2, 64]; with documents that begin at multiples, or one a sequence."""
    from equilibrium_mcore.certify.tokens import MadeUpTokens

    tokens = MadeUpTokens(
        samples=BATCHES * SAMPLES,
        sequence_length=LENGTH,
        vocab_size=VOCABULARY,
        seed=3,
        document_multiple=document_multiple,
    )
    samples = [tokens[index] for index in range(len(tokens))]
    return [
        {name: torch.stack([sample[name] for sample in group]) for name in samples[0]}
        for group in (samples[first : first + SAMPLES] for first in range(0, len(samples), SAMPLES))
    ]


def score(rank_info: RankInfo, config: RunConfig) -> dict[str, Any]:
    """All scores of the made-up batches, by name and batch, from the run's initial weights."""
    from equilibrium_mcore.certify.tokens import made_up_datasets
    from equilibrium_mcore.training.scoring import log_probabilities
    from equilibrium_mcore.training.setup import setup, teardown

    run = setup(config, rank_info, datasets=made_up_datasets(config))
    before = _state(run, fill_gradients=True)
    modes: set[bool] = set()
    for chunk in run.chunks:
        chunk.module.register_forward_pre_hook(lambda module, given: modes.add(module.training))
    found: dict[str, dict[int, Tensor]] = {}
    # Each data rank has the batches in an order of its own.
    order = [(index + run.groups.dp.rank()) % BATCHES for index in range(BATCHES)]
    for name, multiple in {"plain": None, "packed": 8}.items():
        packing = {"packing": "documents" if multiple else "none"}
        run.config = config.model_copy(update={"data": config.data.model_copy(update=packing)})
        batches = made_up_batches(multiple)
        for temperature in TEMPERATURES:
            values = log_probabilities(
                run, [batches[index] for index in order], temperature=temperature
            )
            found[f"{name} {temperature}"] = dict(zip(order, values, strict=True))
    document = _first_document(batches[0])
    alone = {key: value[:1, :document] for key, value in batches[0].items()}
    found["alone"] = {0: log_probabilities(run, [alone])[0]}
    changed = [name for name, value in _state(run).items() if not _same(value, before[name])]
    teardown(run)
    return {"found": found, "changed": changed, "modes": modes}


def _first_document(batch: dict[str, Tensor]) -> int:
    return int((batch["position_ids"][0] == 0).nonzero()[1])


def _state(run: Any, *, fill_gradients: bool = False) -> dict[str, Any]:
    """All that scoring must leave as it is."""
    from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

    from equilibrium_mcore.parallel.random_states import random_states

    state: dict[str, Any] = {"random": random_states(), "training": []}
    for index, chunk in enumerate(run.chunks):
        buffers = [*chunk.buffers, *chunk.expert_parallel_buffers]
        for number, buffer in enumerate(buffers):
            if fill_gradients:
                buffer.grad_data.uniform_()
            state[f"{index} gradients {number}"] = buffer.grad_data.clone()
        for name, tensor in [*chunk.named_parameters(), *chunk.named_buffers()]:
            state[f"{index} {name}"] = tensor.detach().clone()
            assert tensor.grad is None
        state["training"].append(chunk.training)
    state["balancing"] = dict(get_moe_metrics_tracker().metrics)
    assert any("expert_bias" in name for name in state)
    if fill_gradients:  # drew random numbers
        state["random"] = random_states()
    return state


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor):
        return torch.equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_same(one[key], other[key]) for key in one)
    if isinstance(one, tuple | list):
        return len(one) == len(other) and all(map(_same, one, other))
    return (one == other).all() if hasattr(one, "all") else one == other


def config_of(data: dict, folder: Path, layout: dict, weights: str | None = None, **changes: Any):
    return tiny_run(
        {**data, "document_multiple": 8},
        folder,
        parallelism=layout,
        checkpoint={"initial_weights": weights},
        **{"model": SCORED_MODEL, **changes},
    )


def train_and_save(rank_info: RankInfo, config: RunConfig) -> None:
    """Some steps, so that routers have a bias, and a checkpoint."""
    from equilibrium_mcore.certify.tokens import made_up_datasets
    from equilibrium_mcore.training.callbacks import LogCallback
    from equilibrium_mcore.training.saving import CheckpointCallback
    from equilibrium_mcore.training.setup import setup, teardown
    from equilibrium_mcore.training.step import train_step

    run = setup(config, rank_info, datasets=made_up_datasets(config))
    for _ in range(3):
        train_step(run)
    CheckpointCallback(config, LogCallback(config)).on_end(run, reason="stop")
    teardown(run)


@pytest.fixture(scope="module")
def start(ranks, data, tmp_path_factory) -> Path:
    """A run with a checkpoint after some steps, on one rank."""
    folder = tmp_path_factory.mktemp("start")
    ranks.run(1, train_and_save, config_of(data, folder, {}))
    return folder


TEACHER_MODEL = {
    **MODEL,
    "layer_pattern": "M-|+-|M-|+-",
    "hidden_size": 96,
    "moe": None,
    "vocab_size_multiple": 64,
}


def score_by_teacher(rank_info: RankInfo, config: RunConfig, weights: Path) -> list[Tensor]:
    """Scores of a frozen model that is another than the run's."""
    from equilibrium_mcore.certify.tokens import made_up_datasets
    from equilibrium_mcore.config.errors import ConfigError
    from equilibrium_mcore.training.frozen import load_frozen
    from equilibrium_mcore.training.scoring import log_probabilities
    from equilibrium_mcore.training.setup import setup, teardown

    run = setup(config, rank_info, datasets=made_up_datasets(config))
    teacher = load_frozen(weights, config=config, groups=run.groups)
    values = log_probabilities(run, made_up_batches(), chunks=teacher)
    smaller = config.model.model_copy(update={"vocab_size": VOCABULARY - 1})
    other = config.model_copy(update={"model": smaller})
    with pytest.raises(ConfigError, match=f"model.vocab_size={VOCABULARY} of the frozen model"):
        load_frozen(weights, config=other, groups=run.groups)
    teardown(run)
    return values


@pytest.mark.slow
def test_a_teacher_of_another_shape_scores_in_the_runs_layout(ranks, data, start, tmp_path):
    """Pipeline stages send its activations, of its width, not the run's."""
    teacher = config_of(data, tmp_path / "teacher", {}, model=TEACHER_MODEL)
    ranks.run(1, train_and_save, teacher)
    scored = {
        name: ranks.run(
            layout.get("world_size", 1),
            score_by_teacher,
            config_of(data, tmp_path / name, layout, str(start)),
            tmp_path / "teacher",
        )
        for name, layout in {"one": {}, "pp2": LAYOUTS["pp2"]}.items()
    }
    for values in scored["pp2"]:
        for found, expected in zip(values, scored["one"][0], strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=TOLERANCE)


@pytest.fixture(scope="module")
def one_rank(ranks, data, start, tmp_path_factory) -> dict[str, Any]:
    config = config_of(data, tmp_path_factory.mktemp("one"), {}, str(start))
    return ranks.run(1, score, config)[0]


@pytest.fixture(scope="module")
def exported(start, tmp_path_factory) -> Path:
    from equilibrium_mcore.hugging_face.convert import export_hugging_face

    folder = tmp_path_factory.mktemp("exported") / "model"
    export_hugging_face(start, folder, dtype="float32")
    return folder


@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_scores_are_those_of_the_exported_model(one_rank, exported, temperature):
    """transformers' class knows no padding rows: with them in the normaliser this fails."""
    from equilibrium_mcore.hugging_face.verify import hugging_face_logits

    for index, batch in enumerate(made_up_batches()):
        logits = hugging_face_logits(exported, batch["tokens"])
        assert logits.shape[-1] == VOCABULARY
        expected = (logits / temperature).log_softmax(-1)
        expected = expected.gather(-1, batch["labels"].unsqueeze(-1)).squeeze(-1)
        found = one_rank["found"][f"plain {temperature}"][index]
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_trap_a_packed_document_has_the_scores_that_it_has_alone(one_rank):
    found = one_rank["found"]
    length = _first_document(made_up_batches(8)[0])
    alone = found["alone"][0]
    assert alone.shape == (1, length)
    packed = found["packed 1.0"][0][:1, :length]
    torch.testing.assert_close(packed, alone, rtol=0, atol=TOLERANCE)
    # The second document does not see the first, as it does in a plain sequence.
    plain = found["plain 1.0"][0]
    second = slice(length, length + 8)
    assert (plain[0, second] - found["packed 1.0"][0][0, second]).abs().max() > 1e-3


def assert_one_answer(outcomes: list[dict[str, Any]], expected: dict[str, Any]) -> None:
    for outcome in outcomes:
        assert outcome["changed"] == []
        assert outcome["modes"] == {False}  # evaluated, not trained
        for name, values in expected["found"].items():
            for index, value in values.items():
                given = outcome["found"][name][index]
                torch.testing.assert_close(
                    given, value, rtol=0, atol=TOLERANCE, msg=lambda m, n=name: f"{n}: {m}"
                )
                assert given.dtype == torch.float32


def assert_same_bits(outcomes: list[dict[str, Any]]) -> None:
    for outcome in outcomes[1:]:
        for name, values in outcomes[0]["found"].items():
            assert all(torch.equal(outcome["found"][name][i], v) for i, v in values.items()), name


def test_tensor_and_expert_ranks_have_the_scores_of_one_rank(
    ranks, data, start, one_rank, tmp_path
):
    assert one_rank["changed"] == []
    config = config_of(data, tmp_path, TP_SP_EP, str(start))
    outcomes = ranks.run(2, score, config)
    assert_one_answer(outcomes, one_rank)
    assert_same_bits(outcomes)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_every_layout_has_the_scores_of_one_rank(ranks, data, start, one_rank, tmp_path, name):
    layout = LAYOUTS[name]
    outcomes = ranks.run(layout["world_size"], score, config_of(data, tmp_path, layout, str(start)))
    assert_one_answer(outcomes, one_rank)
    if not name.startswith("dp"):  # data ranks were given other batches
        assert_same_bits(outcomes)


def compare_weights(rank_info: RankInfo, config: RunConfig, other: Path) -> dict[str, Any]:
    """Scores with all the weights that a run can have, before and after some steps."""
    from equilibrium_mcore.certify.tokens import made_up_datasets
    from equilibrium_mcore.parallel.random_states import random_states
    from equilibrium_mcore.training.callbacks import LogCallback
    from equilibrium_mcore.training.frozen import load_frozen
    from equilibrium_mcore.training.saving import CheckpointCallback
    from equilibrium_mcore.training.scoring import log_probabilities
    from equilibrium_mcore.training.setup import setup, teardown
    from equilibrium_mcore.training.step import train_step

    run = setup(config, rank_info, datasets=made_up_datasets(config))
    batches = made_up_batches()[:1]
    found = {"initial": log_probabilities(run, batches)[0]}
    for _ in range(3):
        train_step(run)
    found["current"] = log_probabilities(run, batches)[0]
    found["evaluation"] = log_probabilities(run, batches, which="evaluation")[0]
    found["current again"] = log_probabilities(run, batches)[0]
    CheckpointCallback(config, LogCallback(config)).on_end(run, reason="stop")
    before = random_states()
    frozen = load_frozen(config.output_directory, config=config, groups=run.groups)
    same_random = _same(random_states(), before)
    found["frozen"] = log_probabilities(run, batches, chunks=frozen)[0]
    train_step(run)
    found["frozen again"] = log_probabilities(run, batches, chunks=frozen)[0]
    reference = load_frozen(other, config=config, groups=run.groups)
    found["reference"] = log_probabilities(run, batches, chunks=reference)[0]
    parameters = [p for chunk in frozen for p in chunk.parameters()]
    bare = all(
        not p.requires_grad and p.grad is None and not hasattr(p, "main_grad") for p in parameters
    )
    bare = bare and not any(hasattr(chunk, "module") for chunk in frozen)
    with pytest.raises(ValueError, match="one set of weights"):
        log_probabilities(run, batches, which="evaluation", chunks=frozen)
    with pytest.raises(ValueError, match="temperature=0"):
        log_probabilities(run, batches, temperature=0)
    with pytest.raises(ValueError, match=f"tokens are 0 to {VOCABULARY - 1}"):
        log_probabilities(run, [{**batches[0], "labels": batches[0]["labels"] - 100}])
    with pytest.raises(ValueError, match="one shape"):
        log_probabilities(run, [*batches, {k: v[:, :32] for k, v in batches[0].items()}])
    teardown(run)
    return {"found": found, "same_random": same_random, "bare": bare}


def test_which_weights_score(ranks, data, start, tmp_path):
    """Schedule-free training has two sets; a frozen model has what was saved, and keeps it."""
    config = config_of(
        data,
        tmp_path / "run",
        TP_SP_EP,
        str(start),
        optimizer={"schedule_free": {}, "schedule": {"kind": "constant", "warmup_steps": 2}},
    )
    for outcome in ranks.run(2, compare_weights, config, start):
        found = outcome["found"]
        assert outcome["same_random"] and outcome["bare"]
        assert torch.equal(found["current"], found["current again"])
        assert (found["current"] - found["evaluation"]).abs().max() > 1e-3
        assert torch.equal(found["frozen"], found["evaluation"])
        assert torch.equal(found["frozen"], found["frozen again"])
        assert torch.equal(found["reference"], found["initial"])
        assert (found["reference"] - found["frozen"]).abs().max() > 1e-3
