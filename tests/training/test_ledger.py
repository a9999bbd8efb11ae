"""What a run really trains on is what its ledger says, through kills, resumes and changes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.schema import RunConfig
from equilibrium_mcore.data.ledger.record import open_sources, plans_of, read_segments, segment_of
from equilibrium_mcore.data.ledger.report import documents_of_step, ledger_report
from equilibrium_mcore.parallel.launch import RankInfo
from equilibrium_mcore.training.run_data import build_run_datasets
from equilibrium_mcore.training.run_folder import owned_run_folder
from tests.data.ledger.support import laned
from tests.support.pool import RankError
from tests.support.runs import MODEL, tiny_run

ROOT = Path(__file__).parents[2]
SMALL = {
    **MODEL,
    "layer_pattern": "*-",
    "hidden_size": 32,
    "mla": None,
    "moe": None,
    "mamba": None,
    "mlp": {"ffn_hidden_size": 32},
    "attention": {"num_heads": 2, "num_query_groups": 2, "head_dim": 16},
}


def train_and_note(rank_info: RankInfo, config: RunConfig, killed_at: int | None) -> int:
    """Train with all callbacks; what each rank was fed goes to `seen/`, by step and rank.

    With `killed_at`, all ranks end after that step as if killed. Returns the step it began at.
    """
    from equilibrium_mcore.training.all_callbacks import build_callbacks
    from equilibrium_mcore.training.loop import Callback, train
    from equilibrium_mcore.training.setup import setup, teardown

    run = setup(config, rank_info)
    began, fed = run.progress.step, []
    folder = Path(config.output_directory) / "seen"
    folder.mkdir(exist_ok=True)
    if rank_info.rank == 0:  # of steps that were lost, also by ranks that are no more
        for path in folder.iterdir():
            if int(path.name.split("_")[0]) > began:
                path.unlink()

    draw = run.stream.next_batches

    def noting(count):
        batches = draw(count)
        fed.extend({n: batch[n].numpy() for n in ("tokens", "labels")} for batch in batches)
        return batches

    run.stream.next_batches = noting

    class Note(Callback):
        def on_step(self, run, outcome):
            tokens = np.stack([batch["tokens"] for batch in fed])
            np.save(folder / f"{run.progress.step}_{run.groups.dp.rank()}.npy", tokens)
            fed.clear()
            if run.progress.step == killed_at:
                os._exit(9)

    # Behind the checkpoint's callback, so that a kill comes after the save of its step.
    train(run, [*build_callbacks(config), Note()])
    teardown(run)
    return began


def lives(data: dict, folder: Path) -> list[tuple[RunConfig, int, int | None]]:
    """Config, ranks, and the step of its kill, of each process of one run."""

    def config(ranks: int, weights: dict[str, float], **training: int) -> RunConfig:
        known = {source["name"]: source for source in data["sources"]}
        sources = [{**known[name], "weight": weight} for name, weight in weights.items()]
        return tiny_run(
            {**data, "sources": sources, "num_workers": training.pop("workers", 0)},
            folder,
            model=SMALL,
            parallelism={"world_size": ranks},
            training={"steps": 30, **training},
            checkpoint={"save_interval_steps": 3},
        )

    both = {"first": 0.7, "second": 0.3}
    return [
        (config(1, both), 1, 5),  # saved at 3
        (config(2, both, sequence_length=48, global_batch_size=4, workers=1), 2, 7),  # saved at 6
        (config(2, {"second": 0.8, "first": 0.2}, micro_batch_size=2), 2, 10),  # saved at 9
        (config(1, {"first": 1.0}, global_batch_size=8, stop_after_steps=12), 1, None),
        (config(2, both, sequence_length=96, global_batch_size=2, steps=16), 2, None),
    ]


BEGINNINGS = [0, 3, 6, 9, 12]


@pytest.fixture(scope="module")
def eventful(ranks, data, tmp_path_factory) -> Path:
    """The directory of a run of five lives."""
    folder = tmp_path_factory.mktemp("eventful")
    for (config, size, killed_at), began in zip(lives(data, folder), BEGINNINGS, strict=True):
        if killed_at is None:
            assert ranks.run(size, train_and_note, config, None) == [began] * size
        else:
            with pytest.raises(RankError, match="exit status 9"):
                ranks.run(size, train_and_note, config, killed_at)
    return folder


def fed_in(folder: Path, step: int) -> np.ndarray:
    """Token ids of the step's samples in the order of the global batch, as ranks were fed them."""
    by_rank = [np.load(path) for path in sorted((folder / "seen").glob(f"{step}_*.npy"))]
    # (micro-step, sample, token) per rank; ranks follow each other within a micro-step.
    return np.concatenate(by_rank, axis=1).reshape(-1, by_rank[0].shape[-1])


def test_every_step_was_fed_what_the_ledger_names(eventful):
    segments = read_segments(eventful)
    assert [segment.first.step for segment in segments] == BEGINNINGS
    for step in range(1, 17):
        ledger, plans = plans_of(segment_of(segments, step), step)
        named = [
            np.concatenate([ledger.sources[plan.source].read(span) for span in plan.spans])
            for plan in plans
        ]
        assert np.array_equal(np.stack(named), fed_in(eventful, step)), f"step {step}"


def test_no_token_came_twice_or_never(eventful):
    """From what ranks were fed alone: each source's samples are its epochs' orders, in lanes."""
    segments = read_segments(eventful)
    consumed: dict[str, list[np.ndarray]] = {"first": [], "second": []}
    for step in range(1, 17):
        rows = fed_in(eventful, step)
        samples = documents_of_step(segments, step)
        for row, sample in zip(rows, samples, strict=True):
            consumed[sample["source"]].append(row)
    for source in open_sources(segments[0].settings):
        rows = consumed[source.name]
        for row, expected in zip(rows, laned(source, map(len, rows)), strict=True):
            assert np.array_equal(row, expected), source.name


def test_the_report_counts_what_was_fed(eventful):
    values = ledger_report(eventful)
    assert values["step"] == 16
    tokens = sum(fed_in(eventful, step).size for step in range(1, 17))
    assert values["tokens"] == tokens == sum(s["tokens"] for s in values["sources"])
    assert [change["step"] for change in values["changes"]] == [3, 6, 9, 12]
    assert "weight of second 0.8 -> none" in values["changes"][2]["changed"]
    # A figure after an earlier step, which no checkpoint holds.
    earlier = ledger_report(eventful, step=8)
    assert earlier["tokens"] == sum(fed_in(eventful, step).size for step in range(1, 9))


def test_sequences_to_come_are_counted_at_the_batch_to_come(eventful, data):
    """max_epochs asks how many sequences are left; the batch was another in earlier lives."""
    from equilibrium_mcore.checkpoint.directory import latest_checkpoint, read_state
    from equilibrium_mcore.training.run_data import build_run_datasets

    config, _, _ = lives(data, eventful)[-1]
    longer = config.training.model_copy(update={"steps": 20})
    saved = read_state(latest_checkpoint(eventful))
    train = build_run_datasets(config.model_copy(update={"training": longer}), saved).train
    done = sum(len(fed_in(eventful, step)) for step in range(1, 17))
    assert train.first_sample == done and len(train) == done + 4 * 2


def test_the_tool_names_and_shows_documents(eventful):
    def tool(*arguments):
        done = subprocess.run(
            [sys.executable, "tools/data_ledger.py", str(eventful), *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert done.returncode == (2 if "--step=99" in arguments else 0), done.stderr
        return done.stdout + done.stderr

    assert "after step 9: " in tool()
    shown = json.loads(tool("--step", "4", "--show", "--json"))
    assert len(shown["samples"]) == 4
    document = shown["samples"][0]["documents"][0]
    assert document["text"] and document["tokens"] <= document["of"]
    assert "--step 99: this run's ledger has the steps 1 to 16" in tool("--step=99")
    assert "the same documents" in tool("--compare", str(eventful))


def test_two_runs_part_where_their_settings_do(ranks, data, eventful, tmp_path):
    first, _, _ = lives(data, tmp_path)[0]
    training = first.training.model_copy(update={"steps": 6})
    ranks.run(1, train_and_note, first.model_copy(update={"training": training}), None)
    parting = ledger_report(tmp_path, compare=eventful)["parting"]
    assert parting["step"] == 4
    assert parting["because"] == ["sequence_length 64 -> 48"]


def test_the_validation_batches_are_the_same_behind_every_step(ranks, data, tmp_path):
    config = tiny_run(
        data,
        tmp_path,
        model=SMALL,
        training={"validation_interval_steps": 2, "validation_batches": 2, "steps": 4},
    )
    first, again = ranks.run(1, _validation_batches, config)[0]
    assert np.array_equal(first, again)


def _validation_batches(rank_info: RankInfo, config: RunConfig) -> tuple[np.ndarray, np.ndarray]:
    from equilibrium_mcore.training.setup import setup, teardown
    from equilibrium_mcore.training.step import train_step

    run = setup(config, rank_info)

    def batches():
        stream = run.stream_of(run.datasets.validation, consumed_samples=0)
        return np.stack([batch["tokens"].numpy() for batch in stream.next_batches(8)])

    first = batches()
    train_step(run)
    again = batches()
    teardown(run)
    return first, again


# --------------------------------------------------------------------------- what is refused


@pytest.fixture(scope="module")
def started(ranks, data, tmp_path_factory) -> Path:
    """A run that stopped after two steps."""
    folder = tmp_path_factory.mktemp("started")
    config = tiny_run(data, folder, model=SMALL, training={"stop_after_steps": 2})
    ranks.run(1, train_and_note, config, None)
    return folder


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"data": {"order": "megatron"}}, ["data.order", "documents would come twice"]),
        ({"data": {"split": "80,10,10"}}, ["data.split='80,10,10'", "between training and"]),
        ({"training": {"seed": 5}}, ["training.seed=5", "it orders the documents"]),
    ],
)
def test_what_would_break_the_order_is_refused(ranks, data, started, changes, words):
    values = {"data": {**data, **changes.pop("data", {})}, **changes}
    config = tiny_run(values.pop("data"), started, model=SMALL, **values)
    with pytest.raises(RankError) as caught:
        ranks.run(1, train_and_note, config, None)
    for word in words:
        assert word in str(caught.value)


def _train_without_a_model(rank_info: RankInfo, config: RunConfig) -> None:
    from equilibrium_mcore.training import setup

    def too_late(*_: object) -> None:
        raise AssertionError("the model is being built")

    setup.build_chunks = too_late
    train_and_note(rank_info, config, None)


def test_data_made_anew_is_refused_before_the_model_is_built(ranks, data, started, tmp_path):
    first, second = data["sources"]
    sources = [{**first, "prefix": second["prefix"]}, second]
    swapped = {**data, "sources": sources, "allow_repeated_sources": True}
    with pytest.raises(RankError, match="'first'.*is not the dataset that the run has read"):
        ranks.run(1, _train_without_a_model, tiny_run(swapped, started, model=SMALL))


def test_a_checkpoint_without_a_ledger_is_refused(ranks, data, tmp_path):
    megatron = tiny_run(
        {**data, "order": "megatron"}, tmp_path, model=SMALL, training={"stop_after_steps": 1}
    )
    ranks.run(1, train_and_note, megatron, None)
    assert not (tmp_path / "ledger.jsonl").exists()
    with pytest.raises(RankError, match="data.order='ledger' differs from .* 'megatron' .the two"):
        ranks.run(1, train_and_note, tiny_run(data, tmp_path, model=SMALL), None)
    # One of before there was a choice says nothing of its order.
    with pytest.raises(ConfigError, match="holds no ledger.*data.order=megatron"):
        build_run_datasets(tiny_run(data, tmp_path, model=SMALL), {"step": 1, "samples": 4})


def test_a_start_from_scratch_keeps_the_old_record(ranks, data, started):
    config = tiny_run(
        data,
        started,
        model=SMALL,
        training={"stop_after_steps": 1},
        checkpoint={"resume": "never", "used_directory": "archive"},
    )
    with owned_run_folder(config, is_first_rank=True):
        ranks.run(1, train_and_note, config, None)
    for name in ("ledger.jsonl", "metrics.jsonl", "checkpoints/latest"):
        assert (started / "archive/1" / name).is_file()
    assert len(read_segments(started)) == 1
