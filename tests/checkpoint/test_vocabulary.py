"""Weights of a model with fewer tokens: old rows stay, new ones begin at their mean."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from equilibrium_mcore.checkpoint.compatibility import check_same_model
from equilibrium_mcore.config.errors import ConfigError
from tests.support.runs import MODEL, tiny_run

OLD = 520  # tokens, in 576 rows
EMBEDDING, OUTPUT = "embedding.word_embeddings.weight", "output_layer.weight"
ONE = {"world_size": 1}
TP2 = {"world_size": 2, "tensor": 2, "sequence": True}
PP2 = {"world_size": 2, "pipeline": 2}


def tables(rank_info, config, steps: int, save: bool = False) -> dict[str, Any]:
    """This rank's rows of the tables as loaded, and losses of steps from there."""

    from equilibrium_mcore.optim.parameters import layout_free_names
    from equilibrium_mcore.training.callbacks import LogCallback
    from equilibrium_mcore.training.saving import CheckpointCallback
    from equilibrium_mcore.training.setup import setup, teardown
    from equilibrium_mcore.training.step import train_step

    run = setup(config, rank_info)
    log = LogCallback(config)
    log.on_start(run)
    named = dict(pair for chunk in run.chunks for pair in layout_free_names(chunk))
    seen: dict[str, Any] = {
        name: named[name].detach().numpy().copy() for name in (EMBEDDING, OUTPUT) if name in named
    }
    main = [p.main for p in run.optimizer.parameters if p.name == EMBEDDING and p.is_owned]
    seen["main_is_the_model's"] = all(
        np.array_equal(m.detach().numpy(), seen[EMBEDDING]) for m in main
    )
    seen["loss"] = [train_step(run).loss for _ in range(steps)]
    if save:
        CheckpointCallback(config, log).on_end(run, reason="stop")
    teardown(run)
    return seen


def run_of(data: dict, folder: Path, tokens: int, layout: dict, tied: bool, start: Path | None):
    return tiny_run(
        data,
        folder,
        model={"vocab_size": tokens, "tie_embeddings": tied, "layer_pattern": "M-|+E"},
        parallelism=layout,
        checkpoint={"initial_weights": None if start is None else str(start)},
    )


@pytest.fixture(scope="module")
def start(ranks, data, tmp_path_factory):
    made: dict[bool, Path] = {}

    def make(tied: bool) -> Path:
        if tied not in made:
            made[tied] = tmp_path_factory.mktemp("start")
            ranks.run(1, tables, run_of(data, made[tied], OLD, ONE, tied, None), 2, True)
        return made[tied]

    return make


@pytest.fixture
def loaded(ranks, data, tmp_path, start):
    """Whole tables by name, and losses, of a run with so many tokens."""

    def load(name: str, tokens: int, layout: dict, *, tied: bool = False) -> dict[str, Any]:
        config = run_of(data, tmp_path / name, tokens, layout, tied, start(tied))
        seen = ranks.run(layout["world_size"], tables, config, 2)
        assert all(rank["main_is_the_model's"] for rank in seen)
        whole = {
            table: np.concatenate([rank[table] for rank in seen if table in rank])
            for table in (EMBEDDING, OUTPUT)
            if any(table in rank for rank in seen)
        }
        return {**whole, "loss": seen[0]["loss"]}

    return load


@pytest.mark.parametrize(("tokens", "rows"), [(530, 576), (600, 640)])
def test_new_rows_are_the_mean_in_both_tables_and_layouts(loaded, tokens, rows):
    """530 tokens fit into the padding; for 600 the tables grow."""
    before = loaded("before", OLD, ONE)
    one, two = loaded("one", tokens, ONE), loaded("two", tokens, TP2)
    for table in (EMBEDDING, OUTPUT):
        was, now = before[table], one[table]
        assert now.shape == (rows, 64) and np.array_equal(now[:OLD], was[:OLD])
        mean = was[:OLD].mean(axis=0, dtype=np.float64).astype(np.float32)
        new = list(range(OLD, tokens)) + list(range(576, rows))
        assert np.array_equal(now[new], np.broadcast_to(mean, (len(new), 64)))
        padding = [row for row in range(tokens, rows) if row not in new]
        assert np.array_equal(now[padding], was[padding])
        assert np.array_equal(two[table], now)
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    assert one["loss"][1] != one["loss"][0]


def test_a_tied_table_and_its_copy_on_the_last_stage_grow_alike(loaded):
    one, two = loaded("one", 600, ONE, tied=True), loaded("two", 600, PP2, tied=True)
    assert np.array_equal(two[EMBEDDING], one[EMBEDDING])
    assert np.array_equal(two[OUTPUT], one[EMBEDDING])
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)


def test_the_log_says_so(loaded, tmp_path):
    def told(name: str) -> dict[str, Any]:
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        return {r["event"]: r["details"] for r in map(json.loads, lines) if r["kind"] == "event"}

    loaded("grown", 600, ONE)
    loaded("same", OLD, ONE)
    assert told("grown")["vocabulary_grown"] == {
        "tokens": "520 -> 600",
        "rows": "576 -> 640",
        "new_rows": "the mean of the old ones",
    }
    assert "vocabulary_grown" not in told("same")


def test_fewer_tokens_and_other_changes_are_refused(data, tmp_path):
    saved = run_of(data, tmp_path, OLD, ONE, False, None)
    with pytest.raises(ConfigError, match=r"vocab_size=512 is less than the 520 .* Set it to 520"):
        check_same_model(
            saved, run_of(data, tmp_path, 512, ONE, False, None), checkpoint="runs/first"
        )
    other = tiny_run(data, tmp_path, model={**MODEL, "vocab_size": 600, "hidden_size": 128})
    with pytest.raises(ConfigError, match=r"hidden_size=128 differs"):
        check_same_model(saved, other, checkpoint="runs/first")
