"""Training on pairs through the stage's own function: layouts, references, resumes, data."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.parallel.launch import RankInfo
from equilibrium_mcore.stages.table import STAGE_RANKS
from tests.data.chat.support import write_rows
from tests.support.pool import RankError
from tests.support.runs import MODEL, tiny_run, train_steps

UNBALANCED = {**MODEL, "moe": {**MODEL["moe"], "load_balancing": "none"}}
LAYOUTS = {
    "mixed": {"world_size": 2, "tensor": 2, "sequence": True, "expert": 2},
    "mixed_data": {"world_size": 4, "tensor": 2, "sequence": True, "expert": 2},
    "context_pipeline": {"world_size": 4, "context": 2, "pipeline": 2},
    "virtual": {"world_size": 2, "pipeline": 2, "virtual_pipeline": 2},
    "data": {"world_size": 2},
}
KINDS = {  # stage, and whether adapters train
    "dpo": ("dpo", False),
    "dpo of adapters": ("dpo", True),
    "ipo": ("ipo", False),
    "simpo": ("simpo", False),
    "orpo": ("orpo", False),
    "kto": ("kto", False),
    "kto of adapters": ("kto", True),
    "reward_model": ("reward_model", False),
    "reward_model of adapters": ("reward_model", True),
}
IN_CI = {("dpo of adapters", "mixed"), ("kto", "mixed"), ("reward_model of adapters", "mixed")}
OF_PAIRS = ("loss", "nll", "accuracy", "margin", "chosen_reward")
FIGURES = {
    "kto": ("loss", "nll", "kl", "desirable_reward", "undesirable_reward"),
    "reward_model": ("loss", "score", "accuracy", "margin", "chosen_score", "rejected_score"),
}


def pairs(count: int, seed: int) -> list[dict]:
    """Questions whose good answer repeats one word and whose bad one another."""
    draw = random.Random(seed)
    words = ["".join(draw.choices("abcdefgh", k=4)) for _ in range(40)]
    return [
        {
            "prompt": f"say {draw.choice(words)}",
            "chosen": " ".join(["good"] * draw.randint(1, 5)),
            "rejected": " ".join(["bad"] * draw.randint(1, 5)),
            "margin": draw.choice([0, 0.5, 1]),
        }
        for _ in range(count)
    ]


@pytest.fixture(scope="module")
def preferences(data: dict, tmp_path_factory) -> dict[str, Any]:
    """The `data` section of a run on preferences."""
    folder = tmp_path_factory.mktemp("preferences")
    return {
        "type": "preferences",
        "name": "pairs",
        "tokenizer": data["tokenizer"],
        "template": "plain",
        "sources": [
            {
                "name": "made_up",
                "train": [str(write_rows(folder / "train.jsonl", pairs(60, 1)))],
                "validation": [str(write_rows(folder / "validation.jsonl", pairs(12, 2)))],
            }
        ],
        "window": 16,
        "document_multiple": 4,
    }


@pytest.fixture(scope="module")
def pretrained(ranks, data: dict, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    ranks.run(1, train_steps, tiny_run(data, folder, parallelism={"world_size": 1}), 2, True)
    return folder


def config_of(kind: str, preferences: dict, pretrained: Path, output: Path, **changes: Any) -> Any:
    stage, adapts = KINDS[kind]
    training = {
        "sequence_length": 128,
        "micro_batch_size": 1,
        "global_batch_size": 2,
        "steps": 6,
        "precision": "fp32",
        "validation_interval_steps": 3,
        "validation_batches": 1,
    }
    head = {"head": "scalar"} if stage == "reward_model" else {}
    return tiny_run(
        {**preferences, "unpaired": stage == "kto"},
        output,
        stage=stage,
        model={**UNBALANCED, **head, **changes.pop("model", {})},
        training={**training, **changes.pop("training", {})},
        parallelism=changes.pop("parallelism", {"world_size": 1}),
        checkpoint={"initial_weights": str(pretrained)},
        objective={"type": stage, **changes.pop("objective", {})},
        adapters={"rank": 4} if adapts else None,
        **changes,
    )


def stage_rank(rank_info: RankInfo, config: RunConfig) -> None:
    """What `python -m equilibrium_mcore.train` runs in a rank."""
    STAGE_RANKS[config.stage](rank_info, config=config)


def records(folder: Path, kind: str) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [record for record in map(json.loads, lines) if record["kind"] == kind]


@pytest.fixture(scope="module")
def one_rank(ranks, preferences, pretrained, tmp_path_factory):
    """Folders of runs on one rank, made when asked for."""
    made: dict[str, Path] = {}

    def folder_of(kind: str) -> Path:
        if kind not in made:
            made[kind] = tmp_path_factory.mktemp("one_rank")
            ranks.run(1, stage_rank, config_of(kind, preferences, pretrained, made[kind]))
        return made[kind]

    return folder_of


CASES = [
    pytest.param(k, n, marks=[] if (k, n) in IN_CI else [pytest.mark.slow])
    for k in KINDS
    for n in LAYOUTS
]


@pytest.mark.parametrize(("kind", "name"), CASES)
def test_pairs_are_the_same_in_every_layout(
    ranks, preferences, pretrained, one_rank, tmp_path, kind, name
):
    layout = LAYOUTS[name]
    config = config_of(kind, preferences, pretrained, tmp_path, parallelism=layout)
    ranks.run(layout["world_size"], stage_rank, config)
    for what in ("train", "validation"):
        found, expected = records(tmp_path, what), records(one_rank(kind), what)
        assert len(found) == len(expected) > 0
        for record, other in zip(found, expected, strict=True):
            assert record.get("tokens") == other.get("tokens")
            for figure in FIGURES.get(KINDS[kind][0], OF_PAIRS):
                assert record[figure] == pytest.approx(other[figure], rel=1e-4, abs=2e-5), figure


def test_trap_the_first_step_is_on_the_reference(one_rank):
    """Ratios of 1: loss log 2 and no margin, though the vocabulary is padded."""
    first = records(one_rank("dpo of adapters"), "train")[0]
    assert first["loss"] == pytest.approx(0.6931472, abs=1e-6)
    assert first["margin"] == pytest.approx(0.0, abs=1e-5)


def test_it_learns_the_preference(one_rank):
    """By the held-out pairs."""
    last = records(one_rank("dpo of adapters"), "validation")[-1]
    assert last["accuracy"] > 0.9 and last["margin"] > 0


def test_a_resumed_run_is_the_straight_one_to_the_bit(
    ranks, preferences, pretrained, one_rank, tmp_path
):
    kind = "dpo of adapters"
    stops = {"training": {"stop_after_steps": 3}}
    ranks.run(1, stage_rank, config_of(kind, preferences, pretrained, tmp_path, **stops))
    ranks.run(1, stage_rank, config_of(kind, preferences, pretrained, tmp_path))

    def curve(folder: Path) -> list:
        return [(r["step"], r["tokens"], r["loss"], r["margin"]) for r in records(folder, "train")]

    assert curve(tmp_path) == curve(one_rank(kind))


@pytest.mark.slow
def test_a_frozen_copy_is_the_reference_that_adapters_leave(
    ranks, preferences, pretrained, one_rank
):
    """Before a step, both score alike: the same loss, though one has a second model."""
    losses = [records(one_rank(kind), "train")[0]["loss"] for kind in ("dpo", "dpo of adapters")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def first_values(rank_info: RankInfo, config: RunConfig) -> dict[str, Any]:
    """What a run prepares for its first step, and whether it holds a second model."""
    from equilibrium_mcore.stages.preferences import with_reference
    from equilibrium_mcore.training.setup import setup, teardown

    run = setup(config, rank_info)
    with_reference(run)
    batches = run.stream.next_batches(run.micro_batches)
    run.prepare(run, batches)
    found = [(b["reference"] * (b["answer"] > 0), b.get("kl", b["answer"]).max()) for b in batches]
    prepare = getattr(run.prepare, "_reference", run.prepare)
    frozen = getattr(prepare, "_frozen", None)
    teardown(run)
    return {"found": found, "second_model": frozen is not None}


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_a_stored_reference_is_the_live_one(ranks, preferences, pretrained, tmp_path, kind):
    """But for rounding: it is scored in other packs; and without a second model."""
    found = {}
    for name in ("live", "stored"):
        objective = {"reference": name}
        config = config_of(kind, preferences, pretrained, tmp_path / name, objective=objective)
        found[name] = ranks.run(1, first_values, config)[0]
    assert found["live"]["second_model"] and not found["stored"]["second_model"]
    for live, stored in zip(found["live"]["found"], found["stored"]["found"], strict=True):
        assert live[0].abs().max() > 1
        for one, other in zip(live, stored, strict=True):
            assert (one - other).abs().max() < 1e-4


def test_a_stored_reference_is_made_once_and_refused_of_others(
    ranks, preferences, pretrained, one_rank, tmp_path
):
    """Stopped and resumed it gives the straight run's curve; the files are not written again."""
    folder = tmp_path / "reference"
    stored = {"reference": "stored", "reference_directory": str(folder)}

    def run(where: Path, **changes: Any) -> None:
        config = config_of("dpo", preferences, pretrained, where, objective=stored, **changes)
        ranks.run(config.parallelism.world_size, stage_rank, config)

    run(tmp_path / "straight", parallelism=LAYOUTS["data"])
    written = {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}
    assert {path.name for path in written} == {"log_p.npy", "facts.json"} and len(written) == 4
    run(tmp_path / "halves", training={"stop_after_steps": 3})
    run(tmp_path / "halves")
    assert {path: path.stat().st_mtime_ns for path in written} == written
    curves = [
        [r["loss"] for r in records(where, "train")]
        for where in (tmp_path / "straight", tmp_path / "halves", one_rank("dpo"))
    ]
    assert curves[1] == pytest.approx(curves[0], rel=1e-5)
    assert curves[1] == pytest.approx(curves[2], rel=1e-4)  # the live reference
    other = {**preferences, "template": "chatml"}
    for what, changes in {
        "packing": {"training": {"sequence_length": 256}},
        "data and template": {"preferences": other},
        "weights": {"pretrained": tmp_path / "straight"},
    }.items():
        given = {"preferences": preferences, "pretrained": pretrained, **changes}
        config = config_of("dpo", output=tmp_path / "other", objective=stored, **given)
        with pytest.raises(RankError, match=f"is of another {what}: put back"):
            ranks.run(1, stage_rank, config)
    values = folder / "train" / "log_p.npy"
    values.write_bytes(values.read_bytes()[:-4])
    with pytest.raises(RankError, match="remove the folder to have it made again"):
        run(tmp_path / "damaged")


def test_trap_ktos_z_is_of_the_global_batch(ranks, preferences, pretrained, one_rank, tmp_path):
    """However it is cut into micro-batches; from the second step on it is not 0."""
    together = {"training": {"micro_batch_size": 2}}
    config = config_of("kto", preferences, pretrained, tmp_path, **together)
    ranks.run(1, stage_rank, config)
    found, expected = records(tmp_path, "train"), records(one_rank("kto"), "train")
    for figure in ("kl", "loss"):
        values = [record[figure] for record in found]
        assert values == pytest.approx([record[figure] for record in expected], abs=2e-5)
    assert expected[0]["kl"] == pytest.approx(0.0, abs=1e-4) and expected[-1]["kl"] > 0.01


def test_trap_ktos_mean_needs_more_than_one_answer(preferences, pretrained, tmp_path):
    alone = {"training": {"global_batch_size": 1}}
    with pytest.raises(ConfigError, match="global_batch_size=1 with objective.type='kto'"):
        config_of("kto", preferences, pretrained, tmp_path, **alone)


def test_a_reward_model_learns_the_preference(one_rank):
    """By the held-out pairs."""
    last = records(one_rank("reward_model of adapters"), "validation")[-1]
    first = records(one_rank("reward_model of adapters"), "train")[0]
    assert last["accuracy"] > 0.9 and last["margin"] > first["margin"]


def test_an_objective_needs_its_head(preferences, pretrained, tmp_path):
    with pytest.raises(ConfigError, match="model.head='output' with objective.type='reward_model'"):
        config_of("reward_model", preferences, pretrained, tmp_path, model={"head": "output"})
