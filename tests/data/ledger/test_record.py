"""The record of a run: later lives count, a cut line does no harm, and runs are compared."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.data.ledger.ledger import Ledger
from equilibrium_mcore.data.ledger.record import (
    LedgerFile,
    open_sources,
    plans_of,
    read_segments,
    segment_of,
)
from equilibrium_mcore.data.ledger.report import as_text, ledger_report
from equilibrium_mcore.data.ledger.trace import readings
from tests.data.ledger.support import SEED, write_source
from tools.bench.measure import ledger as benchmark

BATCH, LENGTH = 4, 16


def settings(prefixes, **changes):
    return {
        "steps": 100,
        "global_batch_size": BATCH,
        "sequence_length": LENGTH,
        "packing": "stream",
        "document_multiple": 1,
        "seed": SEED,
        "split": "90,8,2",
        "tokenizer": {"type": "SentencePieceTokenizer", "model": "unused.model"},
        "sources": [
            {"name": name, "prefix": str(prefix), "weight": 1.0}
            for name, prefix in prefixes.items()
        ],
        **changes,
    }


class Life:
    """A process of a run without a model: it takes samples, saves now and then, and may die."""

    def __init__(self, folder, values, *, state=None, step=0, samples=0):
        opened = open_sources(values)
        weights = [s["weight"] for s in values["sources"]]
        length = values["sequence_length"]
        self.ledger = Ledger(opened, weights, sequence_length=length, state=state)
        self.values, self.step, self.samples, self.plans = values, step, samples, {}
        self.file = LedgerFile(folder, goes_on=step > 0)
        self.file.start(step=step, samples=samples, settings=values, state=self.ledger.state())

    def train(self, steps, save_every=5):
        for _ in range(steps):
            batch = self.values["global_batch_size"]
            self.plans[self.step + 1] = [self.ledger.take() for _ in range(batch)]
            self.step, self.samples = self.step + 1, self.samples + batch
            if self.step % save_every == 0:
                self.saved = SimpleNamespace(
                    state=self.ledger.state(), step=self.step, samples=self.samples
                )
                self.file.checkpoint(**vars(self.saved))
        return self


@pytest.fixture
def prefixes(sources):
    return {name: sources.prefixes[name] for name in ("middling", "mixed")}


def killed_and_resumed(folder, prefixes):
    """12 steps, killed; from step 10 on with another length and batch, to step 17."""
    first = Life(folder, settings(prefixes)).train(12)
    changed = settings(prefixes, sequence_length=24, global_batch_size=3)
    second = Life(folder, changed, **vars(first.saved)).train(7)
    return {**first.plans, **second.plans}


def test_every_step_is_replayed_as_it_was_trained_at_last(tmp_path, prefixes):
    plans = killed_and_resumed(tmp_path, prefixes)
    segments = read_segments(tmp_path)
    for step, expected in plans.items():
        assert plans_of(segment_of(segments, step), step)[1] == expected, step


def test_a_run_that_was_killed_before_any_checkpoint(tmp_path, prefixes):
    Life(tmp_path, settings(prefixes, sequence_length=8)).train(3)
    second = Life(tmp_path, settings(prefixes)).train(3)  # moves the first record away
    segments = read_segments(tmp_path)
    assert len(segments) == 1
    assert plans_of(segments[0], 2)[1] == second.plans[2]
    assert (tmp_path / "archive/1/ledger.jsonl").exists()


def test_going_back_two_checkpoints_forgets_the_steps_between(tmp_path, prefixes):
    life = Life(tmp_path, settings(prefixes)).train(5)
    saved = life.saved
    life.train(10)
    other = settings(prefixes, global_batch_size=2)
    again = Life(tmp_path, other, **vars(saved)).train(2, save_every=1)
    segments = read_segments(tmp_path)
    assert [mark.step for segment in segments for mark in segment.marks] == [0, 5, 5, 6, 7]
    assert plans_of(segment_of(segments, 7), 7)[1] == again.plans[7]


def test_a_line_cut_short_is_left_out_and_does_not_spoil_the_next(tmp_path, prefixes):
    life = Life(tmp_path, settings(prefixes)).train(5)
    path = tmp_path / "ledger.jsonl"
    with path.open("a") as stream:
        stream.write('{"kind": "checkpoint", "st')
    assert len(read_segments(tmp_path)[0].marks) == 2
    Life(tmp_path, settings(prefixes), **vars(life.saved)).train(5)
    assert [segment.first.step for segment in read_segments(tmp_path)] == [0, 5]
    path.write_text("broken\n" + path.read_text())
    with pytest.raises(ValueError, match=r"ledger\.jsonl, line 1: no record"):
        read_segments(tmp_path)


def test_no_record_and_steps_that_are_not_there(tmp_path, prefixes):
    with pytest.raises(FileNotFoundError, match=r"output_directory of a run with data\.order"):
        read_segments(tmp_path)
    Life(tmp_path, settings(prefixes)).train(5)
    for step in (0, 101, -1):
        with pytest.raises(ConfigError, match=f"--step {step}.*1 to 100"):
            ledger_report(tmp_path, step=step)


def test_data_that_was_made_anew_since_is_not_taken_for_it(tmp_path, sources):
    prefix = write_source(tmp_path / "data", [5, 6, 7] * 40)
    run = tmp_path / "run"
    Life(run, settings({"a": prefix})).train(5)
    write_source(tmp_path / "data", [7, 6, 5] * 40)
    with pytest.raises(ConfigError, match="'a'.*is not the dataset"):
        ledger_report(run, step=3)
    (tmp_path / "data.bin").unlink()
    with pytest.raises(ConfigError, match=r"data\.bin does not exist"):
        ledger_report(run, step=3)
    assert ledger_report(run)["step"] == 5  # what was consumed needs no data


def test_the_report_names_what_a_step_took(tmp_path, prefixes):
    plans = killed_and_resumed(tmp_path, prefixes)
    values = ledger_report(tmp_path, step=11)
    assert json.loads(json.dumps(values)) == values
    assert len(values["samples"]) == len(plans[11]) == 3
    for sample, plan in zip(values["samples"], plans[11], strict=True):
        found = [(d["document"], d["offset"], d["tokens"]) for d in sample["documents"]]
        assert found == [span[:3] for span in plan.spans]
    assert values["tokens"] == 10 * BATCH * LENGTH + 3 * 24
    text = as_text(values)
    assert "after step 10: sequence_length 16 -> 24, global_batch_size 4 -> 3" in text
    assert f"{plans[11][0].spans[0].document}  " in text


def test_epochs_and_documents_are_counted(tmp_path, sources):
    """Of a source of one document of 50 tokens, 15 steps of 4 * 16 tokens are 19.2 epochs."""
    Life(tmp_path, settings({"one": sources.prefixes["one"]})).train(15)
    (row,) = ledger_report(tmp_path)["sources"]
    assert row["tokens"] == 960 and row["epochs"] == 19.2 and row["documents"] == 20


def test_a_document_leads_back_to_its_steps(tmp_path, sources):
    """Every document against a search through all plans of a run of three lives."""
    few = {name: sources.prefixes[name] for name in ("small", "middling")}
    first = Life(tmp_path, settings(few)).train(12)
    alone = settings({"middling": few["middling"]}, sequence_length=24, global_batch_size=3)
    second = Life(tmp_path, alone, **vars(first.saved)).train(7, save_every=3)
    third = Life(tmp_path, settings(few), **vars(second.saved)).train(80)
    segments = read_segments(tmp_path)
    last = segments[-1].marks[-1].step
    plans = {**first.plans, **second.plans, **third.plans}
    expected = {}
    for step in range(1, last + 1):
        names = [s["name"] for s in segment_of(segments, step).settings["sources"]]
        for number, plan in enumerate(plans[step]):
            for span in plan.spans:
                piece = (step, number, span.offset, span.tokens)
                expected.setdefault((names[plan.source], span.document), []).append(piece)
    for name, documents in (("small", 5), ("middling", 40)):
        for document in range(documents):
            read = readings(segments, name, document)["read"]
            found = [(p["step"], p["sample"], p["offset"], p["tokens"]) for p in read]
            assert found == expected.get((name, document), []), (name, document)
            epochs = [piece["epoch"] for piece in read if piece["offset"] == 0]
            assert epochs == list(range(len(epochs)))
    seen = next(document for name, document in expected if name == "middling")
    assert "was read in" in as_text(ledger_report(tmp_path, document=f"middling:{seen}"))


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ("other:1", "the sources are middling, mixed"),
        ("middling:9999", "has the documents 0 to 269 of middling"),
        ("middling", "must be SOURCE:NUMBER"),
    ],
)
def test_a_document_that_is_not_the_runs_is_an_error(tmp_path, prefixes, document, words):
    Life(tmp_path, settings(prefixes)).train(1)
    with pytest.raises(ConfigError, match=words):
        ledger_report(tmp_path, document=document)


@pytest.mark.parametrize(
    ("change", "because"),
    [
        ({"sequence_length": 32}, "sequence_length 16 -> 32"),
        ({"seed": SEED}, None),
        ({"split": "80,10,10"}, "split 90,8,2 -> 80,10,10"),
    ],
)
def test_two_runs_are_compared(tmp_path, prefixes, change, because):
    for name, changes in (("one", {}), ("other", change)):
        Life(tmp_path / name, settings(prefixes, **changes)).train(10)
    parting = ledger_report(tmp_path / "one", compare=tmp_path / "other")["parting"]
    assert (parting and (parting["step"], parting["because"][0])) == (because and (1, because))


def test_runs_part_where_one_changed_and_stay_apart(tmp_path, prefixes):
    life = Life(tmp_path / "one", settings(prefixes)).train(10)
    other = Life(tmp_path / "other", settings(prefixes)).train(5)
    heavier = settings(prefixes)
    heavier["sources"][0] = {**heavier["sources"][0], "weight": 3.0}
    Life(tmp_path / "other", heavier, **vars(other.saved)).train(5)
    values = ledger_report(tmp_path / "one", compare=tmp_path / "other")
    assert values["parting"] == {"step": 6, "because": ["weight of middling 1.0 -> 3.0"]}
    assert "differ from step 6 on" in as_text(values)
    assert life.step == 10


def test_the_benchmark_measures_both(tmp_path):
    sizes = {"prefixes": 20, "samples": 500, "sources": 3, "documents": 30_000}
    text = benchmark.report(*benchmark.measure(tmp_path, **sizes), **sizes)
    assert "times faster by the ledger" in text and "3 sources with 30,000 documents" in text
