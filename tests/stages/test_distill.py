"""Distillation through the stage's own function: layouts, another teacher, stored targets."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from equilibrium_mcore.checkpoint.manifest import describe_file, read_manifest, write_manifest
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.files.lock import FileLock
from equilibrium_mcore.parallel.launch import RankInfo
from equilibrium_mcore.training.ready import check_ready
from equilibrium_mcore.training.target_files import check_stored_targets
from tests.data.chat.support import messages_of, random_chats, write_rows
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
    packed = {} if "type" in data else {"packing": "documents"}  # conversations always are
    return tiny_run(
        {**data, **packed, "document_multiple": 4},
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


STORED = {"top_k": 8, "temperature": 2.0}


def store(rank_info: RankInfo, config: RunConfig) -> None:
    """What `tools/store_targets.py` runs in a rank."""
    from equilibrium_mcore.training.store_targets import store_rank

    store_rank(rank_info, config=config)


@pytest.fixture(scope="module")
def targets(ranks, data, teacher, start, tmp_path_factory) -> Path:
    """Targets of a whole run, stored by one rank."""
    folder = tmp_path_factory.mktemp("stored") / "targets"
    objective = {**STORED, "targets": str(folder)}
    config = build_config(data, teacher, start, folder.parent / "unused", objective=objective)
    ranks.run(1, store, config)
    assert not (folder.parent / "unused").exists()
    return folder


def rows_of(folder: Path) -> dict[int, tuple]:
    """What is stored of each sample."""
    found = {}
    for part in sorted(folder.glob("part_*.npy")):
        for row in np.load(part):
            found[int(row["key"])] = (row["ids"], row["log_q"])
    return found


def test_what_is_stored_is_the_teachers_distribution(ranks, targets, data, teacher, start):
    """Bins that sum to 1, ids of real tokens, of every sample of the run and its validation."""
    rows = rows_of(targets)
    assert len(rows) == 4 * 4 + 4
    for ids, log_q in rows.values():
        assert ids.shape == (64, 8) and log_q.shape == (64, 9)
        assert ids.min() >= 0 and ids.max() < 512 and (np.diff(ids, axis=1) > 0).all()
        np.testing.assert_allclose(np.exp(log_q.astype(float)).sum(1), 1, rtol=1e-5)


def test_a_run_on_targets_loads_no_teacher(ranks, data, start, targets, tmp_path):
    """The teacher is not even named; the figures are those of bins, so near the whole's."""
    objective = {**STORED, "targets": str(targets)}
    ranks.run(1, stage_rank, build_config(data, None, start, tmp_path, objective=objective))
    found = records(tmp_path, "train")
    assert [record["step"] for record in found] == [1, 2, 3, 4]
    assert all(record["divergence"] > 0 for record in found)


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYOUTS)
def test_targets_are_the_same_in_every_layout(ranks, data, teacher, start, targets, tmp_path, name):
    """Stored in a layout, and learned from in it."""
    layout = LAYOUTS[name]
    expected, folder = tmp_path / "expected", tmp_path / "targets"
    for output, its_targets, given in ((expected, targets, {}), (tmp_path / "out", folder, layout)):
        objective = {**STORED, "targets": str(its_targets)}
        config = build_config(
            data, teacher, start, output, objective=objective,
            parallelism=given or {"world_size": 1},
        )  # fmt: skip
        size = given.get("world_size", 1)
        if its_targets == folder:
            ranks.run(size, store, config)
        ranks.run(size, stage_rank, config)
    assert_same(tmp_path / "out", expected)
    ours, theirs = rows_of(folder), rows_of(targets)
    assert ours.keys() == theirs.keys()
    for key, (ids, log_q) in ours.items():
        same = ids == theirs[key][0]  # equally likely ids may change places
        assert same.mean() > 0.999
        rows = same.all(axis=1)
        np.testing.assert_allclose(log_q[rows], theirs[key][1][rows], atol=1e-4)


def test_a_killed_store_goes_on(ranks, data, teacher, start, targets, tmp_path):
    """Without its manifest a folder is unfinished: what is there stays, what is missing is made."""
    folder = tmp_path / "targets"
    shutil.copytree(targets, folder)
    (folder / "manifest.json").unlink()
    (part,) = folder.glob("part_*.npy")
    rows = np.load(part)
    np.save(part, rows[:7])
    half = part.read_bytes()
    objective = {**STORED, "targets": str(folder)}
    config = build_config(data, teacher, start, tmp_path / "out", objective=objective)
    with pytest.raises(ConfigError, match="not finished"):
        check_stored_targets(config)
    ranks.run(1, store, config)
    assert part.read_bytes() == half
    ours, theirs = rows_of(folder), rows_of(targets)
    assert ours.keys() == theirs.keys()
    assert all((ours[key][1] == theirs[key][1]).all() for key in theirs)
    check_stored_targets(config)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"objective": {"temperature": 3.0}}, "objective.temperature=3.0"),
        ({"objective": {"top_k": 4}}, "objective.top_k=4"),
        ({"training": {"sequence_length": 32}}, "training.sequence_length=32"),
        ({"packing": "none"}, "data.packing='none'"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_targets_of_other_settings_are_refused(data, start, targets, tmp_path, changes, words):
    objective = {**STORED, "targets": str(targets), **changes.pop("objective", {})}
    packing = changes.pop("packing", "documents")
    config = build_config(data, None, start, tmp_path, objective=objective, **changes)
    update = {"data": config.data.model_copy(update={"packing": packing})}
    with pytest.raises(ConfigError, match="were made with") as told:
        check_stored_targets(config.model_copy(update=update))
    assert words in str(told.value)


def test_targets_of_other_weights_data_or_bytes_are_refused(
    ranks, data, teacher, start, targets, tmp_path
):
    objective = {**STORED, "targets": str(targets)}
    with pytest.raises(ConfigError, match="has other weights than the teacher"):
        check_stored_targets(
            build_config(data, start, start, tmp_path / "other", objective=objective)
        )
    other = build_config(data, None, start, tmp_path / "seed", objective=objective)
    reseeded = other.training.model_copy(update={"seed": 7})
    with pytest.raises(RankError, match="a sample of this run has no targets"):
        ranks.run(1, stage_rank, other.model_copy(update={"training": reseeded}))
    folder = tmp_path / "targets"
    shutil.copytree(targets, folder)
    (part,) = folder.glob("part_*.npy")
    content = bytearray(part.read_bytes())
    content[-5] ^= 1
    part.write_bytes(content)
    objective = {**STORED, "targets": str(folder)}
    with pytest.raises(RankError, match="expected sha256"):
        ranks.run(
            1, stage_rank, build_config(data, None, start, tmp_path / "b", objective=objective)
        )
    part.write_bytes(content[:-5])
    with pytest.raises(ConfigError, match="bytes, found"):
        check_stored_targets(build_config(data, None, start, tmp_path / "b", objective=objective))


def rewrite(file: Path, text: str) -> None:
    """Another content of a checkpoint's file, as if it had been saved so."""
    file.write_text(text)
    files = read_manifest(file.parent)
    write_manifest(file.parent, {**files, file.name: describe_file(file)})


def test_what_is_checked_before_a_start(data, teacher, start, config_of, tmp_path):
    """Roles and their memory are said; a teacher of another tokenizer or vocabulary is refused."""
    told: list[str] = []
    check_ready(config_of(tmp_path / "out"), say=told.append)
    (line,) = [text for text in told if text.startswith("memory of a rank")]
    assert "policy (test_hybrid)" in line and "teacher (teacher)" in line

    def refused(folder: Path, words: str) -> None:
        config = build_config(data, folder, start, tmp_path / "out")
        with pytest.raises(ConfigError, match=words):
            check_ready(config, say=told.append)

    refused(tmp_path / "nothing", "objective.teacher=.*there is no checkpoint")
    other = tmp_path / "other"
    shutil.copytree(teacher, other)
    (saved,) = other.glob("checkpoints/step_*/config.yaml")
    text = saved.read_text()
    copy = tmp_path / "another.model"
    # An empty field that SentencePiece does not know: a whole model, of another hash.
    copy.write_bytes(Path(data["tokenizer"]["model"]).read_bytes() + b"\xfa\x7f\x00")
    rewrite(saved, text.replace(data["tokenizer"]["model"], str(copy)))
    refused(other, "another: an id would mean two things")
    copy.unlink()
    check_ready(build_config(data, other, start, tmp_path / "out"), say=told.append)
    assert any("was not compared with the run's" in text for text in told)
    rewrite(saved, text.replace("vocab_size: 512", "vocab_size: 511"))
    refused(other, "model.vocab_size=511 of the frozen model")


def test_two_processes_do_not_store_in_one_folder(ranks, data, teacher, start, tmp_path):
    folder = tmp_path / "targets"
    objective = {**STORED, "targets": str(folder)}
    config = build_config(data, teacher, start, tmp_path / "out", objective=objective)
    lock = FileLock(folder.with_name("targets.lock"), "another")
    lock.acquire()
    try:
        with pytest.raises(RankError, match="another process stores targets there"):
            ranks.run(1, store, config)
    finally:
        lock.release()
    assert not folder.exists()


def test_of_conversations_what_is_produced_counts(ranks, data, teacher, start, tmp_path):
    """Prompts do not: fewer tokens than positions, and the teacher's part is of the same ones."""
    rows = [{"messages": messages_of(turns)} for turns in random_chats(24, seed=3)]
    source = {"name": "random"}
    for part, some in (("train", rows[:18]), ("validation", rows[18:])):
        source[part] = [str(write_rows(tmp_path / f"{part}.jsonl", some))]
    chats = {
        "type": "conversations",
        "name": "chats",
        "tokenizer": data["tokenizer"],
        "sources": [source],
        "too_long": "cut",
        "window": 16,
    }
    output = tmp_path / "out"
    config = build_config(chats, teacher, start, output, training={"steps": 2})
    ranks.run(1, stage_rank, config)
    found = records(output, "train")
    assert all(0 < record["tokens"] < record["step"] * 4 * 64 for record in found)
    assert all(record["divergence"] > 0 for record in found)
