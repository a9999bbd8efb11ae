"""No document is repeated or left out, whatever changes on the way."""

from __future__ import annotations

import copy
import itertools
import json
import pickle
import random
import shutil

import numpy as np
import pytest

from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.data.ledger import lanes
from equilibrium_mcore.data.ledger.dataset import LedgerDataset
from equilibrium_mcore.data.ledger.lanes import LANES, padded
from equilibrium_mcore.data.ledger.ledger import Ledger
from equilibrium_mcore.data.ledger.source import START
from tests.data.ledger.support import (
    assert_given_once,
    documents_in_order,
    laned,
    open_source,
    write_source,
)

SPLIT = "100"  # all documents, so that epochs are short


def opened(sources, names, **settings):
    return [
        open_source(sources.prefixes[name], name, **{"split": SPLIT, **settings}) for name in names
    ]


def read(ledger, plan):
    """A sample's token ids, and the one after it."""
    source = ledger.sources[plan.source]
    ids = np.concatenate([source.read(span) for span in plan.spans])
    return ids, source.read(plan.label)[0]


def saved(ledger):
    """Through JSON, as a checkpoint's state.json and ledger.jsonl hold it."""
    return json.loads(json.dumps(ledger.state()))


# ------------------------------------------------------------------------------- the contract


@pytest.mark.parametrize("seed", range(30))
def test_no_schedule_of_changes_repeats_or_skips_a_token(sources, seed, monkeypatch):
    """Weights, sources, sequence length, batch and ranks change; the process is killed or goes on.

    Of each source, what was trained on is exactly its epochs' orders, read in lanes.
    """
    rng = random.Random(seed)
    monkeypatch.setattr(lanes, "LANES", rng.choice([1, 2, 5, LANES]))
    names = list(sources.prefixes)
    consumed = {name: [] for name in names}
    state, position = None, 0
    for _ in range(rng.randint(3, 8)):
        here = rng.sample(names, rng.randint(1, len(names)))
        weights = [rng.choice([0.01, 0.3, 1.0, 5.0]) for _ in here]
        multiple = rng.choice([1, 1, 4])
        dataset = LedgerDataset(
            opened(sources, here),
            weights,
            sequence_length=rng.choice([1, 2, 7, 16, 33, 128]) * multiple,
            packing=rng.choice(["stream", "documents"]) if multiple == 1 else "documents",
            document_multiple=multiple,
            samples=10**6,
            vocab_size=10**6,
            state=state,
            first_sample=position,
        )
        ranks, micro = rng.choice([1, 2, 4]), rng.choice([1, 2, 3])
        micro_steps = rng.randint(1, 3)
        batch = ranks * micro * micro_steps
        iterators = [
            dataset.micro_batches(
                consumed_samples=position,
                micro_batch_size=micro,
                data_parallel_rank=rank,
                data_parallel_size=ranks,
            )
            for rank in range(ranks)
        ]
        trained = dataset.cursor_at(position)
        steps = rng.randint(1, 6)
        for _ in range(steps):
            for _ in range(micro_steps):
                for iterator in iterators:
                    for plan in next(iterator):
                        note(consumed, dataset, plan, multiple)
            trained.skip(batch)
            position += batch
        state = saved(trained)
        if rng.random() < 0.5:  # planned ahead, as loader workers do, and then killed
            for iterator in iterators:
                next(iterator)
    for name, ids in consumed.items():
        if ids:
            source = open_source(sources.prefixes[name], name, split=SPLIT)
            assert_given_once(source, ids, state["cursors"][name])
            for given, expected in zip(ids, laned(source, map(len, ids)), strict=True):
                assert np.array_equal(given, expected), name


def note(consumed, dataset, plan, multiple):
    source = dataset.sources[plan.source]
    assert sum(padded(span.tokens, multiple) for span in plan.spans) == dataset.sequence_length
    ids = np.concatenate([source.read(span) for span in plan.spans])
    consumed[source.name].append(ids)


@pytest.mark.parametrize("name", ["small", "one", "mixed", "books"])
def test_the_last_label_is_the_lanes_next_token(sources, name):
    """Its document's, or the first token of the document that is begun next."""
    (source,) = opened(sources, [name])
    ledger = Ledger([source], [1.0], sequence_length=4)
    count = ledger.lanes[0].count
    samples = [read(ledger, ledger.take()) for _ in range(40 + 6 * count)]
    order = (ids[0] for _, _, ids in documents_in_order(source))
    coming, kinds = next(order), set()
    epoch = itertools.islice(documents_in_order(source), source.documents)
    firsts = {ids[0] for _, _, ids in epoch}
    for number, (ids, label) in enumerate(samples[:-count]):
        for token in ids:
            if token in firsts:
                assert token == coming
                coming = next(order)
        goes_on = label == ids[-1] + 1 and label not in firsts
        kinds.add(goes_on)
        assert label == (samples[number + count][0][0] if goes_on else coming)
    assert kinds == ({True, False} if name != "books" else {True})


def test_pieces_of_a_long_document_lie_far_apart(sources):
    """A batch of books is many books; a book's next piece comes LANES samples later."""
    (source,) = opened(sources, ["books"])
    ledger = Ledger([source], [1.0], sequence_length=64)
    plans = [ledger.take() for _ in range(40 * LANES)]
    read_in: dict[tuple[int, int], list[int]] = {}
    for number, plan in enumerate(plans):
        for span in plan.spans:
            read_in.setdefault((span.epoch, span.document), []).append(number)
    assert max(len(numbers) for numbers in read_in.values()) > 20
    for numbers in read_in.values():
        assert np.all(np.diff(numbers) == LANES)
    for begin in range(0, len(plans), LANES):
        batch = plans[begin : begin + LANES]
        pieces = [(span.epoch, span.document) for plan in batch for span in plan.spans]
        assert len(pieces) == len(set(pieces)) >= LANES


def test_a_source_of_few_documents_reads_each_of_them_at_first(sources):
    """No more lanes than documents: several copies of one text are not read side by side."""
    (source,) = opened(sources, ["small"])
    ledger = Ledger([source], [1.0], sequence_length=1)
    documents = [ledger.take().spans[0].document for _ in range(6)]
    assert sorted(documents) == list(range(6))
    (source,) = opened(sources, ["one"])
    ledger = Ledger([source], [1.0], sequence_length=25)
    plans = [ledger.take() for _ in range(6)]
    assert [(p.spans[0].epoch, p.spans[0].offset) for p in plans] == [
        (epoch, offset) for epoch in range(3) for offset in (0, 25)
    ]


def test_every_epoch_has_each_document_once_and_its_own_order(sources):
    (source,) = opened(sources, ["middling"])
    orders = [source.order(epoch, 0, source.documents) for epoch in range(4)]
    for order in orders:
        assert np.array_equal(np.sort(order), np.arange(300))
    for one, other in zip(orders, orders[1:], strict=False):
        assert (one == other).mean() < 0.05


def test_the_order_follows_from_seed_name_and_part(sources):
    def order(**changes):
        settings = {"name": "middling", "split": "50,50", "part": "train", **changes}
        return open_source(sources.prefixes["middling"], **settings).order(0, 0, 150)

    assert np.array_equal(order(), order())
    for changes in ({"seed": 12}, {"name": "other"}):
        assert not np.array_equal(order(), order(**changes))
    assert set(order()) == set(range(150))
    assert set(order(part="validation")) == set(range(150, 300))


# ---------------------------------------------------------------------------------- the blend


@pytest.mark.parametrize("weights", [[3, 1], [0.5, 0.3, 0.2], [1, 1, 1, 1], [0.9, 0.05, 0.05]])
def test_every_beginning_has_the_shares(sources, weights):
    names = list(sources.prefixes)[: len(weights)]
    ledger = Ledger(opened(sources, names), weights, sequence_length=8)
    shares = np.array(weights) / sum(weights)
    counts = np.zeros(len(weights))
    for number in range(1, 1001):
        counts[ledger.take().source] += 1
        assert np.abs(counts - shares * number).max() < len(weights) / 2
    assert ledger.taken == (counts * 8).tolist()


def test_after_a_change_the_new_shares_hold_at_once(sources):
    """The past is not made up for: a source whose share rises does not get everything at first."""
    names = ["middling", "mixed"]
    ledger = Ledger(opened(sources, names), [9, 1], sequence_length=8)
    ledger.skip(1000)
    ledger = Ledger(opened(sources, names), [1, 9], sequence_length=8, state=saved(ledger))
    chosen = [ledger.take().source for _ in range(100)]
    assert chosen.count(0) == 10
    assert chosen[:10].count(0) == 1


def test_many_sources_get_their_share(sources):
    rng = np.random.default_rng(0)
    weights = rng.exponential(size=500)
    many = [open_source(sources.prefixes["small"], f"s{i}", split=SPLIT) for i in range(500)]
    ledger = Ledger(many, weights, sequence_length=4)
    ledger.skip(20_000)
    shares = np.array(ledger.taken) / sum(ledger.taken)
    assert np.abs(shares - weights / weights.sum()).max() < 2 / 20_000


# ------------------------------------------------------------------------------- going on


def test_going_on_is_the_straight_order(sources):
    """In JSON and back at any sample, with the same settings: the same plans."""
    names = ["small", "mixed", "blocks"]
    whole = Ledger(opened(sources, names), [0.2, 0.3, 0.5], sequence_length=24)
    plans = [whole.take() for _ in range(300)]
    for cut in (0, 1, 17, 150, 299):
        first = Ledger(opened(sources, names), [0.2, 0.3, 0.5], sequence_length=24)
        first.skip(cut)
        second = Ledger(
            opened(sources, names), [0.2, 0.3, 0.5], sequence_length=24, state=saved(first)
        )
        assert [second.take() for _ in range(300 - cut)] == plans[cut:]
        assert saved(second) == saved(whole)


def test_a_copy_goes_its_own_way(sources):
    ledger = Ledger(opened(sources, ["small", "one"]), [1, 1], sequence_length=3)
    ledger.skip(5)
    before = saved(ledger)
    ledger.copy().skip(50)
    assert saved(ledger) == before


def test_a_source_that_comes_back_goes_on(sources):
    both, alone = ["middling", "small"], ["middling"]
    ledger = Ledger(opened(sources, both), [1, 1], sequence_length=5)
    ledger.skip(20)
    place = saved(ledger)["cursors"]["small"]
    assert ledger.lanes[1].pointer != START and place["held"]
    ledger = Ledger(opened(sources, alone), [1], sequence_length=5, state=saved(ledger))
    ledger.skip(20)
    assert saved(ledger)["cursors"]["small"] == place
    ledger = Ledger(opened(sources, both), [1, 1], sequence_length=5, state=saved(ledger))
    assert saved(ledger)["cursors"]["small"] == place


def test_moved_data_goes_on(sources, tmp_path):
    ledger = Ledger(opened(sources, ["middling"]), [1], sequence_length=5)
    ledger.skip(7)
    for ending in ("bin", "idx"):
        shutil.copy(f"{sources.prefixes['middling']}.{ending}", tmp_path / f"moved.{ending}")
    moved = open_source(tmp_path / "moved", "middling", split=SPLIT)
    again = Ledger([moved], [1], sequence_length=5, state=saved(ledger))
    assert again.take() == ledger.take()


@pytest.mark.parametrize("lengths", [[3, 1, 9, 4, 1, 2], [1, 3, 9, 4, 1, 1], [19, 1]])
def test_data_made_anew_is_refused(sources, tmp_path, lengths):
    """Also with as many documents, or as many tokens."""
    ledger = Ledger(opened(sources, ["small"]), [1], sequence_length=5)
    ledger.skip(1)
    anew = open_source(write_source(tmp_path / "small", lengths), "small", split=SPLIT)
    with pytest.raises(ConfigError) as caught:
        Ledger([anew], [1], sequence_length=5, state=saved(ledger))
    for text in ("'small'", str(tmp_path / "small"), "6 documents", "put that dataset back"):
        assert text in str(caught.value)
    Ledger(
        [open_source(tmp_path / "small", "new", split=SPLIT)],
        [1],
        sequence_length=5,
        state=saved(ledger),
    )


def test_a_renamed_source_would_begin_again_and_is_refused(sources):
    ledger = Ledger(opened(sources, ["small"]), [1], sequence_length=5)
    ledger.skip(1)
    renamed = open_source(sources.prefixes["small"], "other", split=SPLIT)
    with pytest.raises(ConfigError, match="call it 'small' as before"):
        Ledger([renamed], [1], sequence_length=5, state=saved(ledger))


def test_a_state_of_another_version_is_refused(sources):
    ledger = Ledger(opened(sources, ["small"]), [1], sequence_length=5)
    state = {**saved(ledger), "version": 99}
    with pytest.raises(ConfigError, match="version 99"):
        Ledger(opened(sources, ["small"]), [1], sequence_length=5, state=state)


# ------------------------------------------------------------------------------- planted faults


@pytest.mark.parametrize("fault", ["early", "late", "lost", "skipped", "again"])
def test_the_contracts_test_can_fail(sources, fault):
    """The check above sees one token left out or given twice, a lost document, a wrong pointer."""
    (source,) = opened(sources, ["mixed"])
    ledger = Ledger([source], [1], sequence_length=16)
    samples = [read(ledger, ledger.take())[0] for _ in range(500)]
    assert_given_once(source, samples, saved(ledger)["cursors"]["mixed"])
    state = ledger.lanes[0]
    lane, held = next((lane, held) for lane, held in state.held.items() if held.length == 700)
    if fault in ("early", "late"):
        shift = 1 if fault == "late" else -1
        state.held[lane] = held._replace(offset=held.offset + shift)
    elif fault == "lost":
        del state.held[lane]
    else:
        shift = 1 if fault == "skipped" else -1
        state.pointer = state.pointer._replace(position=state.pointer.position + shift)
    samples += [read(ledger, ledger.take())[0] for _ in range(500)]
    with pytest.raises(AssertionError):
        assert_given_once(source, samples, saved(ledger)["cursors"]["mixed"])


# ---------------------------------------------------------------------------------- edge cases


def test_documents_without_tokens_are_passed_over(sources, tmp_path):
    """Megatron-LM's index may list them; in front, behind, in a row, and at a block's end."""
    prefix = write_source(tmp_path / "gaps", [1] * 3000)
    header_bytes = 34
    lengths = np.memmap(f"{prefix}.idx", np.int32, "r+", offset=header_bytes, shape=(3000,))
    lengths[np.random.default_rng(0).permutation(3000)[:1500]] = 0
    lengths[2999] = 1
    lengths.flush()
    source = open_source(prefix, "gaps", split=SPLIT)
    ledger = Ledger([source], [1.0], sequence_length=7)
    ids = [read(ledger, ledger.take())[0] for _ in range(500)]
    assert np.array_equal(ids, laned(source, [7] * 500))


def test_a_ledger_travels_to_another_process(sources):
    ledger = Ledger(opened(sources, ["blocks", "one"]), [1, 1], sequence_length=64)
    ledger.skip(10)
    assert len(pickle.dumps(ledger.sources[0])) < 4000  # no maps, no blocks
    other = pickle.loads(pickle.dumps(ledger))
    assert other.take() == ledger.take()
    assert copy.deepcopy(ledger.state()) == ledger.state()
