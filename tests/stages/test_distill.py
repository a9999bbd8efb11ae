"""Distillation through the stage's own function: layouts, another teacher, stored targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.parallel.launch import RankInfo
from tests.stages.test_preferences import LAYOUTS, records, stage_rank
from tests.support.pool import RankError
from tests.support.runs import MODEL, tiny_run, train_steps

STUDENT = {
    **MODEL,
    "layer_pattern": "ME|+E|M-|ME",
    "vocab_size_multiple": 192,  # rows 512 to 575 pad it
    "moe": {**MODEL["moe"], "load_balancing": "none"},
}
TEACHER = {  # wider, deeper, cut and padded otherwise
    **MODEL,
    "name": "teacher",
    "layer_pattern": "MEM-|+EME",
    "hidden_size": 96,
    "init_std": 0.1,  # it has something to say
    "vocab_size_multiple": 128,
    "moe": {**MODEL["moe"], "load_balancing": "none"},
}
FORMS = {
    "forward": {},
    "reverse": {"direction": "reverse", "temperature": 4.0, "cross_entropy_weight": 0.2},
}


@pytest.fixture(scope="module")
def teacher(ranks, data: dict, tmp_path_factory) -> Path:
    """A run that was saved."""
    folder = tmp_path_factory.mktemp("teacher")
    config = tiny_run(data, folder, model=TEACHER, parallelism={"world_size": 1})
    ranks.run(1, train_steps, config, 1, True)
    return folder


@pytest.fixture(scope="module")
def start(ranks, data: dict, tmp_path_factory) -> Path:
    """What students start from: random weights are each layout's own."""
    folder = tmp_path_factory.mktemp("start")
    config = tiny_run(data, folder, model=STUDENT, parallelism={"world_size": 1})
    ranks.run(1, train_steps, config, 1, True)
    return folder


@pytest.fixture
def config_of(data: dict, teacher: Path, start: Path):
    """A run of distillation in a folder, with changes."""

    def of(output: Path, **changes: Any) -> RunConfig:
        return build_config(data, teacher, start, output, **changes)

    return of


def build_config(
    data: dict, teacher: Path | None, start: Path, output: Path, **changes: Any
) -> RunConfig:
    objective = {"type": "distillation", "temperature": 2.0, **changes.pop("objective", {})}
    if teacher is not None:
        objective["teacher"] = str(teacher)
    training = {
        "global_batch_size": 4,
        "steps": 4,
        "validation_interval_steps": 2,
        "validation_batches": 1,
    }
    return tiny_run(
        {**data, "packing": "documents", "document_multiple": 4},
        output,
        stage="distill",
        model=STUDENT,
        objective=objective,
        checkpoint={"initial_weights": str(start)},
        training={**training, **changes.pop("training", {})},
        parallelism=changes.pop("parallelism", {"world_size": 1}),
        **changes,
    )


@pytest.fixture(scope="module")
def one_rank(ranks, data, teacher, start, tmp_path_factory):
    """Folders of runs on one rank, made when asked for."""
    made: dict[str, Path] = {}

    def folder_of(form: str) -> Path:
        if form not in made:
            made[form] = tmp_path_factory.mktemp("one_rank")
            config = build_config(data, teacher, start, made[form], objective=FORMS[form])
            ranks.run(1, stage_rank, config)
        return made[form]

    return folder_of


FIGURES = ("loss", "cross_entropy", "divergence")


def assert_same(found: Path, expected: Path) -> None:
    for what in ("train", "validation"):
        ours, theirs = records(found, what), records(expected, what)
        assert len(ours) == len(theirs) > 0
        for record, other in zip(ours, theirs, strict=True):
            assert record.get("tokens") == other.get("tokens")
            for figure in (*FIGURES, *(["gradient_norm"] if what == "train" else [])):
                assert record[figure] == pytest.approx(other[figure], rel=1e-4), figure


@pytest.mark.parametrize(
    ("form", "name"),
    [
        pytest.param(f, n, marks=[] if (f, n) == ("forward", "mixed") else [pytest.mark.slow])
        for f in FORMS
        for n in LAYOUTS
    ],
)
def test_a_student_learns_the_same_in_every_layout(
    ranks, config_of, one_rank, tmp_path, form, name
):
    layout = LAYOUTS[name]
    config = config_of(tmp_path, objective=FORMS[form], parallelism=layout)
    ranks.run(layout["world_size"], stage_rank, config)
    assert_same(tmp_path, one_rank(form))


def test_what_is_logged_adds_up(one_rank):
    for record in records(one_rank("forward"), "train"):
        whole = 0.5 * record["cross_entropy"] + 0.5 * 2.0**2 * record["divergence"]
        assert record["loss"] == pytest.approx(whole, rel=1e-5)
        assert record["divergence"] > 0


def test_a_resumed_run_is_the_straight_one_to_the_bit(ranks, config_of, one_rank, tmp_path):
    first = {"training": {"stop_after_steps": 2}}
    ranks.run(1, stage_rank, config_of(tmp_path, **first))
    ranks.run(1, stage_rank, config_of(tmp_path))

    def curve(folder: Path) -> list:
        lines = records(folder, "train")
        return [(r["step"], r["tokens"], *(r[figure] for figure in FIGURES)) for r in lines]

    assert curve(tmp_path) == curve(one_rank("forward"))
