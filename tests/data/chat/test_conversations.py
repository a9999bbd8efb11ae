"""Rows of all forms become turns; errors name file, line and key; long ones go by rule."""

from __future__ import annotations

import gzip

import numpy as np
import pytest

from equilibrium_mcore.config.chat import (
    BUILT_IN,
    ConversationsConfig,
    ConversationSourceConfig,
    parse_conversations,
)
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.data.chat.conversations import read_conversations
from equilibrium_mcore.data.chat.encode import encode_sources
from equilibrium_mcore.data.chat.render import build_renderer
from equilibrium_mcore.data.chat.segments import Turn, joined
from equilibrium_mcore.data.chat.store import load_or_encode
from equilibrium_mcore.data.chat.templates import TEMPLATES
from tests.data.chat.support import messages_of, random_chats, write_rows

ASKED, SAID = Turn("user", "a?"), Turn("assistant", "b")
FORMS = {
    "messages": ({"messages": messages_of([ASKED, SAID])}, [ASKED, SAID]),
    "messages, other roles": (
        {"messages": [{"role": "human", "content": "a?"}, {"role": "model", "content": "b"}]},
        [ASKED, SAID],
    ),
    "context only": (
        {"messages": [*messages_of([ASKED]), {"role": "assistant", "content": "b", "weight": 0}]},
        [ASKED, SAID._replace(trained=False)],
    ),
    "parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "?"}]},
                *messages_of([SAID]),
            ]
        },
        [ASKED, SAID],
    ),
    "ShareGPT": (
        {
            "system": "s",
            "conversations": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}],
        },
        [Turn("system", "s"), ASKED, SAID],
    ),
    "Alpaca": ({"instruction": "a?", "input": "", "output": "b"}, [ASKED, SAID]),
    "Alpaca with input": (
        {"instruction": "Add.", "input": "1, 2", "output": "3", "system": "s"},
        [Turn("system", "s"), Turn("user", "Add.\n\n1, 2"), Turn("assistant", "3")],
    ),
}
BAD = {
    r"messages\[1\]\.role: 'narrator' is none of": {
        "messages": [*messages_of([ASKED]), {"role": "narrator", "content": ""}]
    },
    r"messages\[0\]\.content: holds None": {"messages": [{"role": "user", "content": None}]},
    r"messages\[0\]\.tool_calls: only the content": {
        "messages": [{"role": "assistant", "content": "", "tool_calls": [{"name": "f"}]}]
    },
    r"messages\[0\]: is 'hi'": {"messages": ["hi"]},
    "messages: holds \\[\\]": {"messages": []},
    r"conversations\[0\]\.value: holds 3": {"conversations": [{"from": "gpt", "value": 3}]},
    "output: missing": {"instruction": "a"},
    "weight: -1 is no number": {"messages": messages_of([ASKED, SAID]), "weight": -1},
    "none of the keys messages.*other stages": {"prompt": [], "chosen": []},
    "not a JSON object but an array": [1],
}


@pytest.mark.parametrize("name", FORMS)
def test_forms(tmp_path, name):
    row, turns = FORMS[name]
    path = write_rows(tmp_path / "x.jsonl", [row])
    assert [list(c.turns) for c in read_conversations(path)] == [turns]


def test_every_problem_with_its_line(tmp_path):
    good = FORMS["messages"][0]
    rows = [good, *BAD.values(), good]
    path = write_rows(tmp_path / "x.jsonl", rows)
    path.write_text(path.read_text() + "\n{broken\n")
    with pytest.raises(ConfigError) as error:
        list(read_conversations(path))
    problems = error.value.problems
    assert len(problems) == len(BAD) + 1
    for (pattern, _), (line, problem) in zip(BAD.items(), enumerate(problems, 2), strict=False):
        with pytest.raises(ConfigError, match=rf"x\.jsonl, line {line}: (key )?{pattern}"):
            raise ConfigError(problem)
    assert f"line {len(rows) + 2}: not JSON" in problems[-1]
    with pytest.raises(ConfigError, match=r"no\.jsonl: no such file"):
        list(read_conversations(tmp_path / "no.jsonl"))


def test_what_prepare_dataset_writes_is_read(tmp_path):
    """Its record, from its own code, compressed: the same turns come back."""
    from equilibrium_mcore.config.mixture import DatasetConfig
    from equilibrium_mcore.corpus.mixtures.documents import to_document

    dataset = DatasetConfig(
        name="d", source="x", mix_ratio=1.0, columns={"messages": "said", "system": "rules"}
    )
    row = {"said": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b"}], "rules": "s"}
    record = to_document("conversation", dataset, row).record
    path = write_rows(tmp_path / "d.train.jsonl", [record])
    packed = tmp_path / "d.train.jsonl.gz"
    packed.write_bytes(gzip.compress(path.read_bytes()))
    for file in (path, packed):
        (found,) = read_conversations(file)
        assert list(found.turns) == [Turn("system", "s"), ASKED, SAID] and found.line == 1


# ------------------------------------------------------------------------------------- examples


@pytest.fixture(scope="module")
def renderer(chat_tokenizers):
    return build_renderer("chatml", chat_tokenizers["llama3"])


@pytest.fixture
def source(tmp_path):
    chats = random_chats(60, seed=3)
    rows = [{"messages": messages_of(turns)} for turns in chats]
    rows.append({"messages": messages_of([ASKED])})  # nothing to learn
    two = [write_rows(tmp_path / f"{n}.jsonl", part) for n, part in enumerate((rows[:9], rows[9:]))]
    return ConversationSourceConfig(name="s", train=two), chats


def test_examples_are_what_is_rendered(renderer, source):
    config, chats = source
    examples, report = encode_sources([config], renderer, max_tokens=10**6, too_long="refuse")
    assert len(examples) == len(chats) == 60
    for number, turns in enumerate(chats):
        ids, produced = joined(renderer.segments(turns))
        found = examples[number]
        assert np.array_equal(found.ids, ids) and np.array_equal(found.produced, produced)
        assert (found.source, found.number, found.weight) == ("s", number + 1, 1.0)
    counts = report.sources["s"]
    assert (counts.read, counts.kept, counts.without_answer) == (61, 60, 1)
    assert counts.tokens == examples.lengths.sum() and counts.produced == examples.produced.sum()
    assert "60 of 61 conversations" in str(report)


def test_trap_6_mask_by_token_search_misses_truncated_turns(renderer, source):
    """Cut examples: whole turns, to the last answer that fits, masked as the uncut one is."""
    config, chats = source
    everything = [joined(renderer.segments(turns)) for turns in chats]
    limit = int(np.percentile([len(ids) for ids, _ in everything], 20))
    examples, report = encode_sources([config], renderer, max_tokens=limit, too_long="cut")
    counts = report.sources["s"]
    assert counts.cut > 5 and counts.too_long > 5
    assert counts.kept + counts.too_long == 60
    end = renderer.stop
    for example in (examples[i] for i in range(len(examples))):
        ids, produced = everything[example.number - 1]
        kept = len(example.ids)
        assert kept <= limit
        assert np.array_equal(example.ids, ids[:kept])
        assert np.array_equal(example.produced, produced[:kept])
        assert np.flatnonzero(example.produced)[-1] == np.flatnonzero(example.ids == end)[-1]
        if kept < len(ids):  # one more exchange would not have fitted
            turns = chats[example.number - 1]
            done = int((example.ids == end).sum())
            more = next(i for i in range(done, len(turns)) if turns[i].role == "assistant") + 1
            assert len(joined(renderer.segments(turns[:more]))[0]) > limit


def test_too_long_is_refused_or_dropped(renderer, source):
    config, chats = source
    lengths = [len(joined(renderer.segments(turns))[0]) for turns in chats]
    limit = sorted(lengths)[-7]
    with pytest.raises(ConfigError, match=r"jsonl, line \d+: [\d,]+ tokens.*too_long") as error:
        encode_sources([config], renderer, max_tokens=limit, too_long="refuse")
    over = sum(length > limit for length in lengths)
    assert over > 5 and f"{over - 5} more" in str(error.value)
    examples, report = encode_sources([config], renderer, max_tokens=limit, too_long="drop")
    assert len(examples) == 60 - over and report.sources["s"].too_long == over
    with pytest.raises(ConfigError, match="no conversation is left for train"):
        encode_sources([config], renderer, max_tokens=3, too_long="drop")


def test_the_cache_is_what_was_encoded(renderer, source, chat_configs, tmp_path):
    config = ConversationsConfig(
        name="c",
        tokenizer=chat_configs["llama3"],
        sources=[source[0]],
        cache_directory=tmp_path / "cache",
    )
    first = load_or_encode(config, renderer, part="train", max_tokens=4096)
    (folder,) = (tmp_path / "cache").iterdir()
    before = (folder / "facts.json").stat().st_mtime_ns
    second = load_or_encode(config, renderer, part="train", max_tokens=4096)
    assert (folder / "facts.json").stat().st_mtime_ns == before and second[1] == first[1]
    assert isinstance(second[0].ids, np.memmap)
    assert second[0].fingerprint == first[0].fingerprint
    second[0].__dict__.pop("fingerprint")
    assert second[0].fingerprint == first[0].fingerprint  # the hash of what was mapped
    (folder / "facts.json").unlink()  # a kill before the end
    assert load_or_encode(config, renderer, part="train", max_tokens=4096)[1] == first[1]
    path = config.sources[0].train[0]
    path.write_text(path.read_text() + path.read_text().splitlines()[0] + "\n")
    more, _ = load_or_encode(config, renderer, part="train", max_tokens=4096)
    assert len(more) == 61


def test_settings(chat_configs):
    values = {
        "name": "x",
        "tokenizer": chat_configs["llama3"].model_dump(mode="json"),
        "sources": [{"name": "s", "train": ["a.jsonl"]}],
    }
    assert parse_conversations(values).template == "chatml"
    own = parse_conversations({**values, "template": {"jinja": "mine.jinja"}})
    assert str(own.template.jinja) == "mine.jinja"
    for template in ("chatml2", {"jinj": "x"}, 3):
        with pytest.raises(ConfigError, match="template: .* is none of chatml, llama3, plain"):
            parse_conversations({**values, "template": template})


def test_the_built_in_templates_are_the_settings():
    assert tuple(TEMPLATES) == BUILT_IN


def test_random_chats_are_what_they_should_be():
    """The other tests stand on them: all roles, empty contents, markers, reserved code points."""
    texts = [turn.content for turns in random_chats(200) for turn in turns]
    assert "" in texts and any("<|im_end|>" in text for text in texts)
    assert any("\ufdd0" in text for text in texts) and any(text[:1] == "\n" for text in texts)
    assert {turn.role for turns in random_chats(200) for turn in turns} == {
        "system",
        "user",
        "assistant",
        "tool",
    }
