"""tools/generate.py as a process: chats and texts, from a run and from an exported folder."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from equilibrium_mcore.hugging_face.speaker import Sampling
from tests.hugging_face.chat_run import ANSWERS, QUESTIONS

ROOT = Path(__file__).parents[2]
PATIENCE_SECONDS = 600  # only what hangs takes as long
GREEDY = ("--temperature", "0")


def _heed_interrupts() -> None:
    """A shell that starts the tests in the background has interrupts ignored."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


class Talks:
    """Starts the tool, with a folder of this test's own for temporary files."""

    def __init__(self, folder: Path) -> None:
        self.temporary = folder / "temporary"
        self.temporary.mkdir()

    def start(self, *arguments: object) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "tools/generate.py"), *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "TMPDIR": str(self.temporary)},
            preexec_fn=_heed_interrupts,
        )

    def __call__(self, *arguments: object, said: str = "") -> tuple[int, str, str]:
        """Exit status, standard output, standard error."""
        process = self.start(*arguments)
        out, err = process.communicate(said, timeout=PATIENCE_SECONDS)
        assert self.left() == []
        return process.returncode, out, err

    def left(self) -> list[str]:
        """The exports that were not removed."""
        return [path.name for path in self.temporary.glob("equilibrium_mcore_*")]


@pytest.fixture
def talks(tmp_path) -> Talks:
    return Talks(tmp_path)


def test_a_run_answers_every_line_and_leaves_nothing(talks, fine_tuned):
    """The end of a turn ends an answer: what follows it in the sequence is not said."""
    said = f"\n{QUESTIONS[0]}\n\n"
    status, out, err = talks(fine_tuned.output_directory, "--chat", *GREEDY, said=said)
    assert (status, out) == (0, f"{ANSWERS[QUESTIONS[0]]}\n"), err


def test_a_run_answers_before_the_next_question_and_exports_nothing(talks, fine_tuned):
    process = talks.start(fine_tuned.output_directory, "--chat", *GREEDY)
    for question in QUESTIONS[:1]:
        process.stdin.write(f"{question}\n")
        process.stdin.flush()
        assert process.stdout.readline() == f"{ANSWERS[question]}\n"
    assert talks.left() == []
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=PATIENCE_SECONDS)
    assert process.returncode == -signal.SIGTERM  # of a shell's caller 143


# A template that shows what a model was asked with, in the error that it raises.
SHOWING = "{{ raise_exception('asked with ' ~ messages) }}"


@pytest.fixture(scope="module")
def released(fine_tuned, tmp_path_factory) -> Path:
    from equilibrium_mcore.hugging_face.convert import export_hugging_face

    folder = tmp_path_factory.mktemp("released") / "chat"
    export_hugging_face(fine_tuned.output_directory, folder, dtype="float32")
    return folder


def test_turns_and_the_system_s_words_are_one_conversation(talks, released, tmp_path):
    """The template is changed to refuse a second question, and to say what it was given."""
    folder = Path(shutil.copytree(released, tmp_path / "chat"))
    template = folder / "chat_template.jinja"
    plain = template.read_text()
    template.write_text("{% if messages | length > 3 %}" + SHOWING + "{% endif %}" + plain)
    said = f"{QUESTIONS[0]}\n{QUESTIONS[1]}\n"
    status, out, err = talks(folder, "--chat", *GREEDY, "--system", "Be brief.", said=said)
    answer = out.removesuffix("\n")
    assert status == 1 and answer
    assert "the chat template refuses this talk: asked with" in err
    told = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": QUESTIONS[0]},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": QUESTIONS[1]},
    ]
    assert str(told) in err


def test_exit_ends_the_talk_and_a_prompt_is_the_only_question(talks, released):
    said = f"{QUESTIONS[2]}\n/exit\n{QUESTIONS[3]}\n"
    status, out, _ = talks(released, "--chat", *GREEDY, said=said)
    assert (status, out) == (0, f"{ANSWERS[QUESTIONS[2]]}\n")
    status, out, _ = talks(released, "--chat", *GREEDY, "--prompt", QUESTIONS[3], said=said)
    assert (status, out) == (0, f"{ANSWERS[QUESTIONS[3]]}\n")


@pytest.fixture
def endless(exported, tmp_path) -> Path:
    """A model of random weights that nothing stops."""
    folder = Path(shutil.copytree(exported("llama"), tmp_path / "endless"))
    for name in ("config.json", "generation_config.json"):
        values = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps({**values, "eos_token_id": None}))
    return folder


def test_texts_are_continued_each_by_itself_and_alike_with_a_seed(talks, endless):
    options = ("--max-new-tokens", 12, "--temperature", 1.5, "--seed", 7)
    status, one, err = talks(endless, *options, "--prompt", "abc de")
    assert status == 0 and one.startswith("abc de") and "(12 tokens" in err
    status, lines, _ = talks(endless, *options, said="abc de\n")
    assert (status, lines) == (0, one.removeprefix("abc de"))
    assert talks(endless, *options[:-1], 8, "--prompt", "abc de")[1] != one


def test_an_interrupt_ends_the_answer_and_not_the_talk(talks, endless):
    """Twice: after the first the next question is answered, too."""
    process = talks.start(endless, "--max-new-tokens", 10**6, "--temperature", 2, "--top-p", 1)
    hangs = threading.Timer(PATIENCE_SECONDS, process.kill)
    hangs.start()
    out = process.stdout.fileno()
    for _ in range(2):
        process.stdin.write("def f(x):\n")
        process.stdin.flush()
        assert os.read(out, 1)  # it streams: the whole would take hours
        process.send_signal(signal.SIGINT)
        while "(stopped)" not in process.stderr.readline():
            assert process.poll() is None
        os.set_blocking(out, False)  # all that was said is there
        with contextlib.suppress(BlockingIOError):
            while os.read(out, 1 << 16):
                pass
        os.set_blocking(out, True)
    process.stdin.write("/exit\n")
    process.stdin.flush()
    process.communicate(timeout=PATIENCE_SECONDS)
    hangs.cancel()
    assert process.returncode == 0


def test_what_cannot_be_talked_with_is_told(talks, exported, saved, tmp_path):
    cases = {
        (exported("llama"), "--chat"): "has no chat template: give it one (python tools/convert",
        (saved("llama").directory, "--chat"): "a run on text, has no chat template",
        (tmp_path / "nothing", "--prompt", "a"): "holds no config.json and no checkpoint",
    }
    for arguments, message in cases.items():
        status, out, err = talks(*arguments)
        assert (status, out) == (1, "")
        assert err.startswith("error: ") and message in err
    assert talks(tmp_path, "--system", "Be brief.")[0] == 2


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": -1.0}, "temperature=-1: it is 0"),
        ({"top_p": 0.0}, "top_p=0: it is more than 0"),
        ({"max_new_tokens": 0}, "max_new_tokens=0: it is 1 or more"),
    ],
)
def test_no_token_could_be_chosen_so(wrong, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**wrong)
