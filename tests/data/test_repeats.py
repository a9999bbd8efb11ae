"""The same data under two names is refused by what it holds, unless that is meant."""

import json
import shutil

import pytest

from equilibrium_mcore.config.chat import parse_conversations
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.data.blend import build_datasets
from equilibrium_mcore.data.chat.build import build_conversations
from equilibrium_mcore.data.repeats import PIECE_BYTES, PIECES, same_text


@pytest.mark.parametrize("order", ["ledger", "megatron"])
def test_sources_of_a_blend(two_sources, tmp_path, order):
    a, b = two_sources.sources
    for ending in ("bin", "idx"):
        shutil.copy(f"{a.prefix}.{ending}", tmp_path / f"copy.{ending}")
    sources = [a, b, a.model_copy(update={"name": "again", "prefix": tmp_path / "copy"})]
    data = two_sources.model_copy(update={"sources": sources, "order": order})
    asked = dict(sequence_length=16, train_samples=8, validation_samples=2, seed=1)
    with pytest.raises(ConfigError, match=r"again and a hold the same.*allow_repeated_sources"):
        build_datasets(data, **asked)
    meant = data.model_copy(update={"allow_repeated_sources": True})
    assert len(build_datasets(meant, **asked).train) >= 8


def test_conversations(tmp_path, tokenizer_config):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "(yes)"}]
    first, link = tmp_path / "a.jsonl", tmp_path / "link.jsonl"
    first.write_text((json.dumps({"messages": turns}) + "\n") * 20)
    link.symlink_to(first)
    values = {
        "name": "chats",
        "tokenizer": tokenizer_config.model_dump(mode="json"),
        "template": "plain",
        "sources": [{"name": n, "train": [str(p)]} for n, p in (("a", first), ("b", link))],
    }
    asked = dict(sequence_length=32, seed=1, vocab_size=700, samples=2)
    with pytest.raises(ConfigError, match=r"b \(.*link.*\) and a .*allow_repeated_sources=true"):
        build_conversations(parse_conversations(values), **asked)
    values["sources"] = [{"name": "a", "train": [str(first), str(link)]}]
    with pytest.raises(ConfigError, match="hold the same conversations"):
        build_conversations(parse_conversations(values), **asked)
    values["allow_repeated_sources"] = True
    build_conversations(parse_conversations(values), **asked)


def test_files_alike_and_not(tmp_path):
    large = bytes(range(256)) * (PIECES * PIECE_BYTES // 256)
    contents = {"a": large, "b": large[:-1] + b"x", "c": large, "d": b"", "e": b"", "f": b"x"}
    files = []
    for name, content in contents.items():
        files.append((name, tmp_path / name))
        files[-1][1].write_bytes(content)
    assert same_text(files) == [f"c ({tmp_path / 'c'}) and a ({tmp_path / 'a'})"]
    (tmp_path / "link").symlink_to(tmp_path / "f")
    shards = [("set", tmp_path / name) for name in ("a", "c", "f", "link")]
    assert same_text(shards) == [f"set: {tmp_path / 'link'} and {tmp_path / 'f'}"]
    one = tmp_path / "f"
    assert same_text([("set", one), ("set", one)]) == [f"set: {one} and {one}"]
