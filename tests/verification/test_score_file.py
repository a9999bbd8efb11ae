"""A file of texts scored: the tool, its help and the guide, whose examples are run."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from equilibrium_mcore.cli import score_answers
from equilibrium_mcore.cli.command import run_subcommand
from equilibrium_mcore.config.rewards import parse_rewards
from equilibrium_mcore.config.yaml_io import parse_yaml
from equilibrium_mcore.verification.code_tests import CodeTests
from equilibrium_mcore.verification.sandbox.choose import NoSandboxError
from equilibrium_mcore.verification.scored import Example

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "rewards.md"


def blocks(language: str) -> list[str]:
    text = GUIDE.read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.M | re.S)


def run(*words: object) -> int:
    return run_subcommand("score-answers", [*map(str, words)], program="score-answers")


def write(path: Path, *records: object) -> Path:
    lines = (r if isinstance(r, str) else json.dumps(r) for r in records)
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def test_the_guides_first_example_prints_what_it_says(tmp_path, capsys):
    lines = blocks("jsonl")[0]
    file = write(tmp_path / "answers.jsonl", *lines.splitlines())
    (words,) = [block.split()[2:] for block in blocks("bash") if "answers.jsonl" in block]
    output = tmp_path / "scored.jsonl"
    assert run(file, *words[1:], "--output", output) == 0
    assert capsys.readouterr().out == blocks("text")[0]
    scored = [json.loads(line) for line in output.read_text().splitlines()]
    assert [one["line"] for one in scored] == [1, 2, 3, 4, 5]
    assert [one["verdict"] for one in scored] == ["ok", "ok", "wrong", "unparsed", "ok"]
    assert scored[0]["reward"] == pytest.approx(1.1) and scored[0]["answer_text"] == "7"


def test_the_guides_code_passes_its_tests():
    (config,) = parse_rewards([{"type": "code_tests"}]).rewards
    try:
        reward = CodeTests(config)
    except NoSandboxError as error:
        pytest.skip(str(error))
    records = [json.loads(line) for line in blocks("jsonl")[1].splitlines()]
    assert len(records) == 3
    for record in records:
        assert reward.score(Example(record["text"], record["truth"])).verdict == "ok", record


def test_the_guides_settings_and_python_are_right(capsys):
    settings, of_a_model, of_a_judge = blocks("yaml")
    for text, number in ((settings, 5), (of_a_model, 2)):
        assert len(parse_rewards(parse_yaml(text, source="the guide")).rewards) == number
    assert parse_yaml(of_a_judge.replace(", ...", ""), source="the guide")["stage"] == "rlaif"
    first, second = blocks("python")
    exec(compile(first, "the guide", "exec"), {})
    assert capsys.readouterr().out == "1.0 ok {'math_answer': 1.0}\n"
    names: dict = {}
    exec(compile(second, "the guide", "exec"), names)
    assert names["rhymes"](prompt="", text="a\nb", truth=None, lines=2) == 1.0


def test_the_lines_and_settings_of_the_help_are_right(tmp_path):
    text = score_answers.__doc__
    lines = [json.loads(line) for line in re.findall(r"^    (\{.*\})$", text, re.M)]
    assert [set(line) for line in lines] == [
        {"text", "truth"},
        {"answer", "truth"},
        {"text", "truth"},
    ]
    assert lines[0]["text"].endswith(r"\boxed{7}")
    settings = re.search(r"^    rewards:\n(?:      - .*\n)+", text, re.M)[0]
    assert len(parse_rewards(parse_yaml(settings, source="the help")).rewards) == 2


def test_an_answer_alone_a_text_and_other_keys(tmp_path, capsys):
    file = write(
        tmp_path / "a.jsonl",
        {"response": "#### 5", "gold": 5},
        {"guess": 5.0, "gold": "5"},
        {"guess": "6", "gold": "5"},
    )
    words = ("--reward", "type=math_answer,latex=own", "--text-field", "response")
    assert run(file, *words, "--answer-field", "guess", "--truth-field", "gold") == 0
    assert re.search(r"^all +2 +1 +0 +0 +0 +0.6667$", capsys.readouterr().out, re.M)


def test_rewards_of_a_file_come_first(tmp_path, capsys):
    rewards = tmp_path / "rewards.yaml"
    rewards.write_text("rewards: [{type: length, unit: words, max_length: 2}]\n")
    file = write(tmp_path / "a.jsonl", {"text": "one two three"}, {"text": "one"})
    assert run(file, "--rewards", rewards, "--reward", "type=format,tags=[a]") == 0
    table = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in table] == ["reward", "length", "format", "all"]
    assert table[-1].split()[-1] == "-0.5000"


def test_trap_too_many_errors_have_a_status_and_keep_what_was_scored(tmp_path, capsys):
    file = write(tmp_path / "a.jsonl", {"text": "#### 5", "truth": "5"}, *[{"text": "x"}] * 5)
    output = tmp_path / "scored.jsonl"
    assert run(file, "--reward", "type=math_answer,latex=own", "--output", output) == 1
    told = capsys.readouterr()
    assert "error: stopped after line 6: 5 of the last 6 texts" in told.err
    assert "(line 2), reward math_answer: its truth must be" in told.err
    assert "math_answer   1      0" in told.out
    assert len(output.read_text().splitlines()) == 6


@pytest.mark.parametrize(
    ("records", "words", "status", "told"),
    [
        ([{"text": "x"}], [], 2, "no reward is given: add --reward type=math_answer"),
        ([{"text": "x"}], ["--reward", "type=maths"], 2, "rewards.0.type='maths': must be one of"),
        ([{"text": "x"}], ["--reward", "maths"], 2, "no key=value"),
        ([{"txt": "x"}], ["--reward", "type=format"], 1, "line 1: neither 'text'.*it has 'txt'"),
        ([{"text": 3}], ["--reward", "type=format"], 1, "line 1: 'text' is no text but 3"),
        ([], ["--reward", "type=format"], 1, "has no records"),
        (["{"], ["--reward", "type=format"], 1, "a.jsonl, line 1: "),
        (None, ["--reward", "type=format"], 1, "no such file"),
    ],
)
def test_what_cannot_be_scored_is_told_and_writes_nothing(
    tmp_path, capsys, records, words, status, told
):
    file = tmp_path / "a.jsonl"
    if records is not None:
        write(file, *records)
    output = tmp_path / "scored.jsonl"
    assert run(file, *words, "--output", output) == status
    assert re.search(told, capsys.readouterr().err)
    assert not output.exists()
