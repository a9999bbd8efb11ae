"""Talks with an exported model in the terminal: continues a text, or answers in a chat."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from equilibrium_mcore.checkpoint.directory import latest_checkpoint
from equilibrium_mcore.config.chat import ChatsConfig
from equilibrium_mcore.config.installation import command
from equilibrium_mcore.files.temporary import temporary_folder
from equilibrium_mcore.hugging_face.convert import export_hugging_face, read_run_config
from equilibrium_mcore.hugging_face.sampling import Sampling
from equilibrium_mcore.hugging_face.speaker import Completion, TextGenerator, no_template

EXIT = "/exit"
ENDS = f"(Ctrl-C ends an answer; {EXIT} or Ctrl-D ends the talk)"
BOLD, PLAIN = "\033[1m", "\033[0m"


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

    `path` is an exported folder, a checkpoint, or a run's output directory; of the last two a
    release is written to a temporary folder, which is gone before the first question. With `chat` a
    question is a user's turn and follows on those before; else each is a text to continue. Raises
    FileNotFoundError and ValueError for what cannot be talked with.
    """
    if prompt is not None and not prompt:
        raise ValueError("the prompt is empty: give some text, or none to be asked for it")
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is signal.SIG_DFL:  # so that what is temporary is removed
            signal.signal(number, lambda number, frame: sys.exit(128 + number))
    with _released(path, chat=chat) as folder:
        speaker = TextGenerator(folder, sampling, chat=chat, seed=seed)
    if prompt is None and sys.stdin.isatty():
        print(ENDS, file=sys.stderr)
    questions = _asked() if prompt is None else [prompt]
    said = _converse(speaker, questions, system) if chat else _continue(speaker, questions, prompt)
    if prompt is not None:
        print(f"({said.tokens} tokens, {said.seconds:.1f} s)", file=sys.stderr)


@contextlib.contextmanager
def _released(path: Path, *, chat: bool) -> Iterator[Path]:
    """The exported folder at `path`, or one that is made of the checkpoint there, and removed."""
    if (path / "config.json").is_file():
        yield path
        return
    checkpoint = latest_checkpoint(path)
    if checkpoint is None:
        raise FileNotFoundError(
            f"{path} holds no config.json and no checkpoint: give the folder that "
            f"`{command('convert')}` wrote, a run's output directory, or one of its "
            "checkpoints/step_... folders"
        )
    config = read_run_config(checkpoint)
    if chat and not isinstance(config.data, ChatsConfig):
        raise no_template(f"{path}, a run on text,", f"--checkpoint {path} --output NEW")
    with temporary_folder("equilibrium_mcore_") as temporary:
        folder = temporary / checkpoint.name
        print(f"exporting {checkpoint} for this talk", file=sys.stderr)
        dtype = "float32" if config.training.precision == "fp32" else "bfloat16"
        export_hugging_face(checkpoint, folder, dtype=dtype)
        yield folder


def _converse(speaker: TextGenerator, questions: Iterable[str], system: str | None) -> Completion:
    from jinja2 import TemplateError

    said = Completion("", 0, 0.0)
    messages = [] if system is None else [{"role": "system", "content": system}]
    for question in questions:
        messages.append({"role": "user", "content": question})
        try:
            inputs = speaker.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except TemplateError as error:
            raise ValueError(f"the chat template refuses this talk: {error}") from None
        said = speaker.say(inputs)
        messages.append({"role": "assistant", "content": said.text})
    return said


def _continue(speaker: TextGenerator, questions: Iterable[str], prompt: str | None) -> Completion:
    said = Completion("", 0, 0.0)
    bold = prompt is not None and sys.stdout.isatty()
    for question in questions:
        if prompt is not None:
            print(question + (BOLD if bold else ""), end="", flush=True)
        said = speaker.say(speaker.tokenizer(question, return_tensors="pt"))
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
