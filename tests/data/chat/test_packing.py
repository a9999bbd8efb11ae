"""Packing: nothing lost, nothing leaks; an order that resumes exactly whatever changes."""

from __future__ import annotations

import json
import random

import numpy as np
import pytest
import torch

from equilibrium_mcore.config.chat import ConversationsConfig, ConversationSourceConfig
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.data.chat.build import build_conversations, epoch_sequences
from equilibrium_mcore.data.chat.dataset import ConversationDataset
from equilibrium_mcore.data.chat.epochs import count_sequences, packed_epoch
from equilibrium_mcore.data.chat.examples import Example, Examples
from equilibrium_mcore.data.chat.fill import fill_sequence, first_fit_decreasing
from equilibrium_mcore.data.chat.order import ExampleOrder, Packing
from equilibrium_mcore.data.loader import batches
from equilibrium_mcore.models.packing import document_lengths, rank_tokens
from tests.data.chat.support import messages_of, random_chats, write_rows

PAD, VOCABULARY = 7, 10**6


def made_up(count: int, longest: int, seed: int = 0) -> Examples:
    """Examples whose ids are all different, so that a token tells where it is from."""
    draw = np.random.default_rng(seed)
    lengths = draw.integers(2, longest + 1, count)
    ends = 100 + np.cumsum(lengths)
    examples = []
    for end, length in zip(ends, lengths, strict=True):
        produced = draw.random(length) < 0.5
        produced[-1] = True
        examples.append(Example(np.arange(end - length, end), produced, "s", len(examples), 1.0))
    return Examples.of(examples)


def dataset_of(examples, **changes) -> ConversationDataset:
    settings = {
        "sequence_length": 64,
        "samples": 10**6,
        "seed": 3,
        "vocab_size": VOCABULARY,
        "pad_id": PAD,
        "window": 50,
        **changes,
    }
    return ConversationDataset(examples, **settings)


# ------------------------------------------------------------------------------------ filling


@pytest.mark.parametrize("seed", range(20))
def test_first_fit_decreasing(seed):
    """Against the plainest way."""
    draw = np.random.default_rng(seed)
    capacity = int(draw.integers(5, 200))
    lengths = draw.integers(1, capacity + 1, int(draw.integers(1, 120)))
    plain: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        room = [b for b in plain if sum(lengths[i] for i in b) + lengths[place] <= capacity]
        (room[0] if room else plain.append([]) or plain[-1]).append(place)
    bins = first_fit_decreasing(lengths, capacity)
    assert bins == plain
    with pytest.raises(ValueError, match="does not fit"):
        first_fit_decreasing(np.array([capacity + 1]), capacity)


@pytest.mark.parametrize("multiple", [1, 4])
def test_a_sequence_token_by_token(multiple):
    """Against the contract, read off the ids: labels, positions, mask, padding."""
    examples = made_up(40, 30)
    chosen = [3, 9, 1]
    found = fill_sequence(examples, chosen, length=96, multiple=multiple, pad_id=PAD)
    assert {name: (a.shape, a.dtype.name) for name, a in found.items()} == {
        "tokens": ((96,), "int64"),
        "labels": ((96,), "int64"),
        "position_ids": ((96,), "int64"),
        "loss_mask": ((96,), "float32"),
    }
    assert np.array_equal(found["tokens"][1:], found["labels"][:-1])
    at = 0
    for number in chosen:
        example = examples[number]
        count = len(example.ids)
        end = at + -(-count // multiple) * multiple
        assert np.array_equal(found["tokens"][at : at + count], example.ids)
        assert (found["tokens"][at + count : end] == example.ids[-1]).all()
        assert np.array_equal(found["position_ids"][at:end], np.arange(end - at))
        wanted = [*example.produced[1:], *[False] * (end - at - count + 1)]
        assert found["loss_mask"][at:end].tolist() == wanted
        at = end
    assert (found["tokens"][at:] == PAD).all() and not found["loss_mask"][at:].any()
    assert found["position_ids"][at:].tolist() == list(range(96 - at))  # a document of its own


@pytest.mark.parametrize("context", [1, 2, 4])
def test_trap_7_packing_leaks(context):
    """Every example is a document of the packed path, and context parallelism can cut each."""
    examples = made_up(300, 40)
    data = dataset_of(examples, document_multiple=2 * context)
    ends, order = np.cumsum(examples.lengths) + 100, data.cursor_at(0)
    for number in range(20):
        sample, wanted = data[number], order.take().examples
        lengths = document_lengths(sample["position_ids"][None])
        starts = (lengths.cumsum(0) - lengths).tolist()
        firsts = sample["tokens"][starts].numpy()
        # Each begins a document, and nothing else does but the padding.
        assert tuple(np.searchsorted(ends, firsts[firsts != PAD], "right")) == wanted
        held = [rank_tokens(lengths, cp_size=context, cp_rank=r) for r in range(context)]
        assert sorted(torch.cat(held).tolist()) == list(range(64))
        trained = sample["loss_mask"].bool()
        assert (sample["labels"][trained] == sample["tokens"][trained] + 1).all()


def test_weights_scale_the_mask():
    ids = np.arange(1, 6)
    example = Example(ids, np.array([0, 0, 1, 1, 1], bool), "s", 1, 0.5)
    found = fill_sequence(Examples.of([example]), [0], length=8, multiple=1, pad_id=0)
    assert found["loss_mask"].tolist() == [0, 0.5, 0.5, 0.5, 0, 0, 0, 0]


# ------------------------------------------------------------------------------------ order


def whole_epochs(data, epochs):
    """Examples of the first epochs, in order of the sequences."""
    order, found = data.cursor_at(0), []
    while (plan := order.take()).epoch < epochs:
        found.append(plan)
    return found


def test_each_epoch_has_every_example_once():
    examples = made_up(333, 40)
    data = dataset_of(examples)
    orders = []
    for epoch in range(3):
        numbers = [n for p in whole_epochs(data, 3) if p.epoch == epoch for n in p.examples]
        assert sorted(numbers) == list(range(333))
        orders.append(numbers)
    assert orders[0] != orders[1] != orders[2]
    other_seed = [n for p in whole_epochs(dataset_of(examples, seed=4), 1) for n in p.examples]
    assert other_seed != orders[0]
    lengths = [sum(examples.lengths[list(p.examples)]) for p in whole_epochs(data, 1)]
    assert max(lengths) <= 64
    # Packing sorts by length; what is given out does not.
    firsts = [int(examples.lengths[list(p.examples)].max()) for p in whole_epochs(data, 1)]
    assert firsts != sorted(firsts, reverse=True)


def test_counted_epochs_are_those_given_out():
    examples = made_up(333, 40)
    data = dataset_of(examples)
    plan = {"seed": 3, "window": 50, "packing": Packing(64, 1)}
    per_epoch = [sum(p.epoch == e for p in whole_epochs(data, 2)) for e in range(2)]
    assert count_sequences(examples.lengths, epochs=1, **plan) == per_epoch[0]
    assert count_sequences(examples.lengths, epochs=2, **plan) == sum(per_epoch)
    half = count_sequences(examples.lengths, epochs=1.5, **plan)
    assert half == per_epoch[0] + -(-per_epoch[1] // 2)
    epoch = packed_epoch(examples, examples.lengths, **plan)
    assert epoch.efficiency == examples.lengths.sum() / (per_epoch[0] * 64) > 0.85
    assert "333 examples in" in str(epoch)


CASES = [(333, 50), (40, 50), (7, 3), (100, 1)]  # examples and window; one window, many, of one


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize(("count", "window"), CASES)
def test_random_kills_and_resumes(seed, count, window):
    """Ranks and micro-batches change at every resume, and the sequence length at some.

    Every example comes exactly once per epoch, from what the ranks were given. With the length left
    alone, the sequences are also those of a run without a stop.
    """
    draw = random.Random(f"{seed}/{count}/{window}")
    examples = made_up(count, 40, seed)
    changes = seed % 2 == 1
    settings = {"window": window}
    straight = dataset_of(examples, **settings).cursor_at(0)
    state, sample, given = None, 0, []
    for _ in range(draw.randrange(3, 9)):
        if changes:
            settings = {
                "window": draw.choice([window, 13]),
                "sequence_length": draw.choice([64, 128, 48]),
                "document_multiple": draw.choice([1, 4]),
            }
        data = dataset_of(examples, state=state, first_sample=sample, **settings)
        ranks, micro = draw.randrange(1, 5), draw.randrange(1, 4)
        loaders = [
            data.micro_batches(
                consumed_samples=sample,
                micro_batch_size=micro,
                data_parallel_rank=rank,
                data_parallel_size=ranks,
            )
            for rank in range(ranks)
        ]
        trained = data.cursor_at(sample)
        for _ in range(draw.randrange(1, 12)):  # steps that were saved
            given += [plan for loader in loaders for plan in next(loader)]
            sample += ranks * micro
        trained.skip(sample - data.first_sample)
        for loader in loaders[: draw.randrange(ranks + 1)]:
            next(loader)  # prepared, and lost in the kill
        state = json.loads(json.dumps(trained.state()))
    if not changes:
        assert given == [straight.take() for _ in given]
    assert_once_per_epoch(given, count, state)


def assert_once_per_epoch(given, count, state):
    epochs = [plan.epoch for plan in given]
    assert epochs == sorted(epochs)
    for epoch in range(max(epochs) + 1):
        numbers = sorted(n for plan in given if plan.epoch == epoch for n in plan.examples)
        assert len(set(numbers)) == len(numbers), f"epoch {epoch} repeats an example"
        if epoch < max(epochs):
            assert numbers == list(range(count)), f"epoch {epoch} leaves one out"
    assert len(json.dumps(state)) < 2000


def test_resuming_in_the_middle_of_a_window_and_of_epochs():
    """At each of the first samples, through two borders of epochs."""
    examples = made_up(60, 40)
    data = dataset_of(examples, window=25)
    plans = [data.cursor_at(n).take() for n in range(80)]
    assert plans[-1].epoch >= 2
    for sample in range(0, 75, 3):
        state = json.loads(json.dumps(data.cursor_at(sample).state()))
        later = dataset_of(examples, window=25, state=state, first_sample=sample)
        assert [later.cursor_at(sample + k).take() for k in range(5)] == plans[sample : sample + 5]
        assert later.cursor_at(sample).state() == state
    with pytest.raises(ValueError, match="sample 71 lies before sample 72"):
        later[71]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 4}, "training.seed=4, and the run began with 3"),
        ({"examples": made_up(60, 40, seed=1)}, "not those that the run has trained on"),
        ({"state": {"version": 0}}, "version 0"),
    ],
)
def test_another_order_is_refused(changes, message):
    examples = made_up(60, 40)
    state = dataset_of(examples).cursor_at(5).state()
    settings = {"state": state, "first_sample": 5, **changes}
    with pytest.raises(ConfigError, match=message):
        dataset_of(settings.pop("examples", examples), **settings)


def test_what_does_not_fit_is_refused():
    examples = made_up(60, 40)
    with pytest.raises(ConfigError, match="max_tokens") as error:
        dataset_of(examples, sequence_length=30, document_multiple=4, vocab_size=50)
    text = str(error.value)
    assert "is no multiple of document_multiple=4" in text and "set model.vocab_size" in text


# ------------------------------------------------------------------------------------ the whole


def test_from_files_to_batches_on_every_rank(chat_configs, tmp_path):
    """JSONL to micro-batches: by number, and by plan on three ranks with workers."""
    rows = [{"messages": messages_of(turns)} for turns in random_chats(80, seed=5)]
    config = ConversationsConfig(
        name="c",
        tokenizer=chat_configs["sentencepiece"],
        sources=[
            ConversationSourceConfig(
                name=name,
                train=[write_rows(tmp_path / f"{name}.jsonl", part)],
                validation=[write_rows(tmp_path / f"{name}.validation.jsonl", part[:3])],
            )
            for name, part in (("a", rows[:50]), ("b", rows[50:]))
        ],
        too_long="cut",
        window=32,
        document_multiple=4,
    )
    counted = epoch_sequences(config, epochs=2, sequence_length=128, seed=1)
    settings = {
        "sequence_length": 128,
        "seed": 1,
        "vocab_size": 700,
        "samples": counted.sequences,
    }
    built = build_conversations(config, **settings)
    assert counted.epoch == built.epoch
    assert 0.7 < built.epoch.efficiency < 1 and "b: " in str(built)
    data = built.dataset
    rows = torch.stack([data[n]["tokens"] for n in range(12)])
    loaders = [
        batches(
            data,
            consumed_samples=0,
            micro_batch_size=2,
            data_parallel_rank=rank,
            data_parallel_size=3,
            num_workers=rank % 2,
        )
        for rank in range(3)
    ]
    seen = torch.cat([next(loader)["tokens"] for _ in range(2) for loader in loaders])
    assert torch.equal(seen, rows)
    plan = {"seed": 1, "window": 32, "packing": Packing(128, 4)}
    assert len(data) == count_sequences(data.examples.lengths, epochs=2, **plan)
    held_out = build_conversations(config, part="validation", **settings)
    assert sum(c.read for c in held_out.report.sources.values()) == 6
    with pytest.raises(ConfigError, match="max_tokens=129 is more than"):
        build_conversations(config.model_copy(update={"max_tokens": 129}), **settings)


def test_skipping_is_taking():
    order = ExampleOrder(made_up(90, 40).lengths, "", seed=1, window=20, packing=Packing(64, 1))
    taken = [order.copy().take(), *[order.take() for _ in range(60)]][1:]
    for ahead in (0, 1, 19, 59):
        other = ExampleOrder(order.lengths, "", seed=1, window=20, packing=Packing(64, 1))
        other.skip(ahead)
        assert other.take() == taken[ahead]
