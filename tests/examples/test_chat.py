"""examples/chat.sh itself on a smaller budget, and the conversations that it is made of."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from examples import stdlib_chats

ROOT = Path(__file__).resolve().parents[2]
SOURCE = '''
"""A module."""

def join(first, *rest, sep="/"):
    """Join two or more parts.

    The second paragraph is left out.
    """

def silent():
    pass

def _private():
    """Not shown."""

class Reader:
    """Reads. Then it closes what it read."""
'''


def test_documented_names_become_conversations() -> None:
    join, reader = stdlib_chats.items(SOURCE, "parts")
    assert join.says == "Join two or more parts."
    assert join.signature == "join(first, *rest, sep='/')"
    assert (reader.kind, reader.signature) == ("class", None)
    draw = random.Random(0)
    chats = [stdlib_chats.conversation(join, draw) for _ in range(60)]
    for messages in chats:
        roles = [message["role"] for message in messages]
        talk = roles[roles[0] == "system" :]
        assert talk == ["user", "assistant"] * (len(talk) // 2)
        assert "parts.join" in messages[roles.index("user")]["content"]
    assert {len(messages) for messages in chats} == {2, 3, 4, 5, 6, 7}


def test_what_it_wrote_is_replaced_and_nothing_else(tmp_path: Path) -> None:
    script = [sys.executable, str(ROOT / "examples/stdlib_chats.py"), "--output-directory"]
    mine = tmp_path / "train.jsonl"
    mine.write_text('{"text": "mine"}\n')
    refused = subprocess.run([*script, tmp_path, "--overwrite"], capture_output=True, text=True)
    assert refused.returncode == 1 and mine.read_text() == '{"text": "mine"}\n'
    folder = tmp_path / "chats"
    for more in ([], ["--overwrite"]):
        subprocess.run([*script, folder, *more], check=True, capture_output=True)
    rows = [json.loads(line) for line in (folder / "validation.jsonl").open(encoding="utf-8")]
    known = {json.dumps(row) for row in map(json.loads, (folder / "train.jsonl").open())}
    assert 10 < len(rows) < len(known) / 10
    assert not known & {json.dumps(row) for row in rows}


@pytest.mark.slow
def test_chat_runs_whole_and_reuses_its_results(tmp_path: Path) -> None:
    command = ["bash", str(ROOT / "examples/chat.sh"), "--fast"]
    command += ["--quickstart", str(tmp_path / "quick start"), "--output", str(tmp_path / "a chat")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.rstrip().endswith("chat: OK"), done.stdout
    table = (tmp_path / "a chat/answers.md").read_text(encoding="utf-8")
    assert table.count("\n| ") == 9 and "held out" in table
    again = subprocess.run(command, capture_output=True, text=True)
    assert again.returncode == 0 and "done already" in again.stdout
    wrong = subprocess.run(["bash", command[1], "--fats"], capture_output=True, text=True)
    assert wrong.returncode == 2 and "--fats: unknown option" in wrong.stderr
