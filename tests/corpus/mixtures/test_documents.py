"""Rows to documents: text, turns and preferences in the forms that public sets have."""

import json
from pathlib import Path

import pytest

from equilibrium_mcore.config.chat import parse_conversations
from equilibrium_mcore.config.mixture import DatasetConfig
from equilibrium_mcore.config.problems import parse
from equilibrium_mcore.config.yaml_io import read_mapping
from equilibrium_mcore.corpus.mixtures.command import summary
from equilibrium_mcore.corpus.mixtures.documents import (
    RowError,
    SkippedRowError,
    field_of,
    to_document,
)
from equilibrium_mcore.data.chat.conversations import read_rows
from equilibrium_mcore.data.chat.preferences import parse_preference
from equilibrium_mcore.data.chat.prompts import read_prompts

USER, ASSISTANT = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "So."}
WORSE = {"role": "assistant", "content": "No."}


def dataset(**changes) -> DatasetConfig:
    values = {"name": "a", "source": "a.jsonl", "mix_ratio": 1.0, **changes}
    config = parse(DatasetConfig, values)
    assert isinstance(config, DatasetConfig), config
    return config


def test_texts():
    row = {"body": {"text": "x"}, "a.b": "dots", "meta": '{"k": {"n": 3}}', "q": "Q", "none": None}
    assert to_document("text", dataset(text_field="body.text"), row).text == "x"
    assert to_document("text", dataset(text_field="a.b"), row).text == "dots"
    assert to_document("text", dataset(text_field="none"), row).text == ""
    assert to_document("text", dataset(text_template="{q}: {body.text}\n"), row).text == "Q: x\n"
    assert field_of(row, "meta.k.n") == 3
    for name, message in [
        ("missing", "no field 'missing'; the row has 'body'"),
        ("body", "is not text but dict"),
    ]:
        with pytest.raises(RowError, match=message):
            to_document("text", dataset(text_field=name), row)
    with pytest.raises(RowError, match="half of a surrogate pair"):
        to_document("text", dataset(), {"text": "\ud800"})


def test_turns_as_text():
    columns = {"messages": "conversations", "system": "system"}
    row = {
        "conversations": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}],
        "system": "Be brief.",
    }
    document = to_document("text", dataset(columns=columns), row)
    assert document.text == "System: Be brief.\n\nUser: Why?\n\nAssistant: So."
    assert document.record is None


CONVERSATIONS = {
    "messages": ({"messages": "m"}, {"m": [USER, ASSISTANT]}),
    "from and value": (
        {"messages": "m"},
        {"m": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
    ),
    "pair": ({"prompt": "q", "response": "a"}, {"q": "Why?", "a": "So."}),
}


@pytest.mark.parametrize("name", CONVERSATIONS)
def test_conversations(name):
    columns, row = CONVERSATIONS[name]
    document = to_document("conversation", dataset(columns=columns), row)
    assert document.record == {"messages": [USER, ASSISTANT]}
    assert document.text == "Why?\n\nSo."


PREFERENCES = {
    "turns with the prompt inside": (
        {"chosen": "c", "rejected": "r", "prompt": "p"},
        {"p": "Why?", "c": [USER, ASSISTANT], "r": [USER, WORSE]},
    ),
    "transcripts": (
        {"chosen": "c", "rejected": "r"},
        {"c": "\n\nHuman: Why?\n\nAssistant: So.", "r": "\n\nHuman: Why?\n\nAssistant: No."},
    ),
    "plain answers": (
        {"chosen": "c", "rejected": "r", "prompt": "p"},
        {"p": "Why?", "c": "So.", "r": "No."},
    ),
    "index of the better one": (
        {"prompt": "p", "responses": ["r0", "r1"], "preferred": "safer"},
        {"p": "Why?", "r0": "No.", "r1": "So.", "safer": 1},
    ),
}


@pytest.mark.parametrize("name", PREFERENCES)
def test_preferences(name):
    columns, row = PREFERENCES[name]
    document = to_document("preference", dataset(columns=columns), row)
    assert document.record == {"prompt": [USER], "chosen": [ASSISTANT], "rejected": [WORSE]}


def test_prompts():
    whole = to_document("prompt", dataset(columns={"messages": "m"}), {"m": [USER, ASSISTANT]})
    plain = to_document("prompt", dataset(columns={"prompt": "p"}), {"p": "Why?"})
    assert whole.record == plain.record == {"prompt": [USER]}


@pytest.mark.parametrize(
    ("kind", "columns", "row", "error", "message"),
    [
        ("conversation", {"messages": "m"}, {"m": [USER]}, SkippedRowError, "no answer"),
        ("conversation", {"messages": "m"}, {"m": [{"role": "king", "content": ""}]}, RowError,
         "role 'king' is none of"),
        ("conversation", {"messages": "m"}, {"m": [{"text": "x"}]}, RowError, "needs role and"),
        ("conversation", {"messages": "m"}, {"m": 3}, RowError, "turns are a list"),
        ("preference", {"chosen": "c", "rejected": "r", "prompt": "p"},
         {"p": "Why?", "c": "So.", "r": "So."}, SkippedRowError, "are the same"),
        ("preference", {"chosen": "c", "rejected": "r"}, {"c": "So.", "r": "No."}, RowError,
         "there is no prompt"),
        ("preference", {"prompt": "p", "responses": ["a", "b"], "preferred": "n"},
         {"p": "Why?", "a": "x", "b": "y", "n": 2}, RowError, "0 or 1 is needed"),
    ],
)  # fmt: skip
def test_rows_that_are_no_examples(kind, columns, row, error, message):
    with pytest.raises(error, match=message):
        to_document(kind, dataset(columns=columns), row)


def test_a_posttrain_phase_becomes_jsonl(tmp_path, write_rows, mixture, run):
    rows = [
        {"q": f"Question {n}? Ask me at someone@mailhost.net", "a": f"Answer {n} of them."}
        for n in range(40)
    ]
    config = mixture(
        ("qa", write_rows(tmp_path / "qa.jsonl", rows), 0.75,
         {"columns": {"prompt": "q", "response": "a"},
          "filters": [{"type": "pii_removal"}, {"type": "length", "min_length": 5}]}),
        ("more", write_rows(tmp_path / "more.parquet", rows[:10]), 0.25,
         {"columns": {"prompt": "q", "response": "a"}}),
        total_tokens=None,
        metadata={"phase": "posttrain_sft", "total_examples": 20},
        tokenizer=None,
    )  # fmt: skip
    manifest = run(config)
    assert manifest.blends == ["conversations.yaml"] and manifest.tokenizer is None
    named = read_mapping(tmp_path / "out/conversations.yaml")
    assert "tokenizer" not in named  # the mixture has none: the run names it
    named["tokenizer"] = {"type": "SentencePieceTokenizer", "model": "chat.model"}
    conversations = parse_conversations(named)
    taken = {}
    for facts in manifest.datasets:
        (output,) = facts.outputs
        files = [tmp_path / "out" / f"{output.prefix}.{s}.jsonl" for s in ("train", "validation")]
        lines = [[json.loads(line) for line in file.open()] for file in files]
        source = next(s for s in conversations.sources if s.name == facts.name)
        assert (source.train, source.validation) == ([files[0]], [files[1]])
        assert [len(part) for part in lines] == [
            output.train_documents, output.validation_documents,
        ]  # fmt: skip
        taken[facts.name] = [record for part in lines for record in part]
    assert [len(records) for records in taken.values()] == [17, 6]  # 15 and 5, and the held out
    for record in taken["qa"]:
        assert [turn["role"] for turn in record["messages"]] == ["user", "assistant"]
        assert "someone@" not in record["messages"][0]["content"]
        assert record["messages"][1]["content"].startswith("Answer")
    assert "someone@" in taken["more"][0]["messages"][0]["content"]


def test_conversations_have_the_tokenizer_of_the_mixture_and_what_was_held_out(
    tmp_path, write_rows, mixture, run, tokenizer_config
):
    rows = [{"q": f"Question {n}?", "a": f"Answer {n} of them."} for n in range(20)]
    config = mixture(
        ("qa", write_rows(tmp_path / "qa.jsonl", rows), 1.0,
         {"columns": {"prompt": "q", "response": "a"}}),
        total_tokens=None,
        metadata={"phase": "posttrain_sft"},
        validation={"ratio": 0.0},
    )  # fmt: skip
    assert "train with data" in summary(run(config), tmp_path / "out")
    named = parse_conversations(read_mapping(tmp_path / "out/conversations.yaml"))
    assert named.tokenizer == tokenizer_config and named.template == "chatml"
    (source,) = named.sources
    assert source.validation == [] and len(source.train[0].read_text().splitlines()) == 20


def test_preferences_have_a_file_that_a_run_names(tmp_path, write_rows, mixture, run):
    rows = [{"p": f"Question {n}?", "c": "Yes.", "r": f"No {n}."} for n in range(20)]
    config = mixture(
        ("pairs", write_rows(tmp_path / "pairs.jsonl", rows), 1.0,
         {"columns": {"prompt": "p", "chosen": "c", "rejected": "r"}}),
        total_tokens=None,
        metadata={"phase": "posttrain_dpo"},
    )  # fmt: skip
    manifest = run(config)
    assert manifest.blends == ["preferences.yaml"]
    named = read_mapping(tmp_path / "out/preferences.yaml")
    assert named["type"] == "preferences" and named["sources"][0]["name"] == "pairs"
    source = named["sources"][0]
    files = [Path(path) for path in (*source["train"], *source["validation"])]
    found = [pair for path in files for pair in read_rows(path, parse_preference)]
    assert len(found) == 20 and found[0].chosen[0].content == "Yes."


def test_prompts_without_truths_are_for_a_judge(tmp_path, write_rows, mixture, run):
    rows = [{"p": f"Question {n}?"} for n in range(20)]
    config = mixture(
        (
            "prompts",
            write_rows(tmp_path / "prompts.jsonl", rows),
            1.0,
            {"columns": {"prompt": "p"}},
        ),
        total_tokens=None,
        metadata={"phase": "posttrain_rlaif"},
    )
    manifest = run(config)
    assert manifest.blends == ["prompts.yaml"]
    path = tmp_path / "out/prompts.yaml"
    named = read_mapping(path)
    assert named["truth"] is None and "for stage rlaif" in path.read_text()
    files = [*named["sources"][0]["train"], *named["sources"][0]["validation"]]
    found = [prompt for path in files for prompt in read_prompts(Path(path), truth=None)]
    assert len(found) == 20 and found[0].truth is None
    assert str(path) in summary(manifest, tmp_path / "out")


def test_prompts_with_truths_are_data_that_a_run_names(tmp_path, write_rows, mixture, run):
    """GSM8K-like answers, of which one has no truth in its place; and tests of code."""
    sums = [{"q": f"{n} plus 1?", "a": f"{n} + 1 is\n#### {n + 1}"} for n in range(19)]
    sums.append({"q": "What?", "a": "Nothing."})
    code = [{"t": f"Write f{n}.", "tests": [f"assert f{n}(1) == {n}"]} for n in range(20)]
    config = mixture(
        (
            "sums",
            write_rows(tmp_path / "sums.jsonl", sums),
            0.5,
            {"columns": {"prompt": "q", "truth": "a", "truth_place": "hash"}},
        ),
        (
            "code",
            write_rows(tmp_path / "code.jsonl", code),
            0.5,
            {"columns": {"prompt": "t", "truth": "tests"}, "filters": [{"type": "pii_removal"}]},
        ),
        total_tokens=None,
        metadata={"phase": "posttrain_grpo"},
    )
    manifest = run(config)
    assert manifest.blends == ["prompts.yaml"]
    named = read_mapping(tmp_path / "out/prompts.yaml")
    assert named["type"] == "prompts"
    files = {s["name"]: [*s["train"], *s["validation"]] for s in named["sources"]}
    found = {
        name: [prompt for path in paths for prompt in read_prompts(Path(path), truth="truth")]
        for name, paths in files.items()
    }
    assert len(found["sums"]) == 19 and len(found["code"]) == 20
    for prompt in found["sums"]:
        assert int(prompt.truth) == int(prompt.turns[0].content.split()[0]) + 1
    for prompt in found["code"]:
        assert prompt.truth[0].startswith("assert f")
