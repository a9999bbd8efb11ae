"""Talks with a model in the terminal: continues a text, or answers in a chat."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

from equilibrium_mcore.checkpoint.directory import latest_checkpoint
from equilibrium_mcore.config.installation import command
from equilibrium_mcore.hugging_face.sampling import Sampling
from equilibrium_mcore.hugging_face.speaker import Completion, TextGenerator

EXIT = "/exit"
ENDS = f"(Ctrl-C ends an answer; {EXIT} or Ctrl-D ends the talk)"
BOLD, PLAIN = "\033[1m", "\033[0m"


class Speaker(Protocol):
    """What answers: `TextGenerator`, or `run_speaker.RunGenerator`."""

    def of_text(self, text: str) -> Any: ...

    def of_chat(self, messages: list[dict[str, str]]) -> Any: ...

    def say(self, inputs: Any) -> Completion: ...


def talk(
    path: Path,
    *,
    chat: bool,
    prompt: str | None,
    system: str | None,
    sampling: Sampling,
    seed: int,
) -> None:
    """Answer `prompt`, or what is read from standard input line by line until it ends.

    `path` is an exported folder, which transformers runs, or a checkpoint or a run's output
    directory, whose model answers by the modules that trained it. With `chat` a question is a
    user's turn and follows on those before; else each is a text to continue. Raises
    FileNotFoundError and ValueError for what cannot be talked with.
    """
    if prompt is not None and not prompt:
        raise ValueError("the prompt is empty: give some text, or none to be asked for it")
    speaker = _speaker(path, sampling, chat=chat, seed=seed)
    if prompt is None and sys.stdin.isatty():
        print(ENDS, file=sys.stderr)
    questions = _asked() if prompt is None else [prompt]
    said = _converse(speaker, questions, system) if chat else _continue(speaker, questions, prompt)
    if prompt is not None:
        print(f"({said.tokens} tokens, {said.seconds:.1f} s)", file=sys.stderr)


def _speaker(path: Path, sampling: Sampling, *, chat: bool, seed: int) -> Speaker:
    """An exported folder by transformers, a checkpoint by the modules that trained it."""
    if (path / "config.json").is_file():
        return TextGenerator(path, sampling, chat=chat, seed=seed)
    if latest_checkpoint(path) is None:
        raise FileNotFoundError(
            f"{path} holds no config.json and no checkpoint: give the folder that "
            f"`{command('convert')}` wrote, a run's output directory, or one of its "
            "checkpoints/step_... folders"
        )
    from equilibrium_mcore.hugging_face.run_speaker import RunGenerator

    return RunGenerator(path, sampling, chat=chat, seed=seed)


def _converse(speaker: Speaker, questions: Iterable[str], system: str | None) -> Completion:
    said = Completion("", 0, 0.0)
    messages = [] if system is None else [{"role": "system", "content": system}]
    for question in questions:
        messages.append({"role": "user", "content": question})
        said = speaker.say(speaker.of_chat(messages))
        messages.append({"role": "assistant", "content": said.text})
    return said


def _continue(speaker: Speaker, questions: Iterable[str], prompt: str | None) -> Completion:
    said = Completion("", 0, 0.0)
    bold = prompt is not None and sys.stdout.isatty()
    for question in questions:
        if prompt is not None:
            print(question + (BOLD if bold else ""), end="", flush=True)
        said = speaker.say(speaker.of_text(question))
        print(PLAIN if bold else "", end="", flush=True)
    return said


def _asked() -> Iterator[str]:
    """Lines of standard input that hold something, until its end or /exit."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (lines can be edited, and called up again)
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "")
        except EOFError:
            if sys.stdin.isatty():
                print()  # so that the shell's prompt has a line of its own
            return
        except KeyboardInterrupt:
            print(f"\n{ENDS}", file=sys.stderr)
            continue
        if line.strip() == EXIT:
            return
        if line.strip():
            yield line
