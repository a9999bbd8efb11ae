"""Talks with an exported model in the terminal: continues a text, or answers in a chat."""

from __future__ import annotations

import contextlib
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from equilibrium_mcore.checkpoint.directory import latest_checkpoint
from equilibrium_mcore.config.chat import ConversationsConfig
from equilibrium_mcore.export.convert import export_hugging_face, read_run_config

EXIT = "/exit"
ENDS = f"(Ctrl-C ends an answer; {EXIT} or Ctrl-D ends the talk)"
BOLD, PLAIN = "\033[1m", "\033[0m"


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How the next token is chosen; temperature 0 takes the likeliest."""

    temperature: float = 0.7
    top_p: float = 0.9
    max_new_tokens: int = 256

    def __post_init__(self) -> None:
        """Raises ValueError for what no token could be chosen with."""
        if self.temperature < 0:
            raise ValueError(f"temperature={self.temperature:g}: it is 0 (the likeliest) or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p:g}: it is more than 0, and 1 at most")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens}: it is 1 or more")

    def settings(self) -> dict[str, Any]:
        """As `generate` of transformers takes them."""
        chosen: dict[str, Any] = {"do_sample": False}
        if self.temperature:
            chosen = {"do_sample": True, "temperature": self.temperature, "top_p": self.top_p}
        return {**chosen, "max_new_tokens": self.max_new_tokens}


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
        speaker = Speaker(folder, sampling, chat=chat, seed=seed)
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
            "tools/convert_checkpoint.py wrote, a run's output directory, or one of its "
            "checkpoints/step_... folders"
        )
    config = read_run_config(checkpoint)
    if chat and not isinstance(config.data, ConversationsConfig):
        raise _no_template(f"{path}, a run on text,", f"--checkpoint {path} --output NEW")
    with tempfile.TemporaryDirectory(prefix="equilibrium_mcore_") as temporary:
        folder = Path(temporary) / checkpoint.name
        print(f"exporting {checkpoint} for this talk", file=sys.stderr)
        dtype = "float32" if config.training.precision == "fp32" else "bfloat16"
        export_hugging_face(checkpoint, folder, dtype=dtype)
        yield folder


def _no_template(what: str, options: str) -> ValueError:
    return ValueError(
        f"--chat, but {what} has no chat template: give it one (python "
        f"tools/convert_checkpoint.py {options} --chat-template chatml, then talk with NEW), or "
        "leave --chat out to continue a text"
    )


class Said(NamedTuple):
    """An answer."""

    text: str
    tokens: int
    seconds: float


class Speaker:
    """A model with its tokenizer, on the GPU where there is one."""

    def __init__(self, folder: Path, sampling: Sampling, *, chat: bool, seed: int) -> None:
        """Raises ValueError where a chat is asked for and the folder has no template for it."""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()  # of loading weights: it would stand before the text
        logging.set_verbosity_error()
        self.sampling = sampling
        self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        if chat and self.tokenizer.chat_template is None:
            raise _no_template(str(folder), "--checkpoint RUN --output NEW")
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        self.model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(seed)

    def say(self, inputs: Any) -> Said:
        """Print the continuation of `inputs` as it comes; Ctrl-C ends it, and what came counts."""
        import torch
        from transformers import TextStreamer

        class Noted(TextStreamer):
            ids: list[int]

            def put(self, value: torch.Tensor) -> None:
                if not self.next_tokens_are_prompt:
                    self.ids.extend(value.tolist())
                super().put(value)

        decoding = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        streamer = Noted(self.tokenizer, skip_prompt=True, **decoding)
        streamer.ids, start = [], time.monotonic()
        given = {
            name: inputs[name].to(self.model.device) for name in ("input_ids", "attention_mask")
        }
        try:
            with torch.inference_mode():
                self.model.generate(**given, streamer=streamer, **self.sampling.settings())
        except KeyboardInterrupt:
            streamer.end()
            print("(stopped)", file=sys.stderr, flush=True)
        text = self.tokenizer.decode(streamer.ids, **decoding)
        return Said(text, len(streamer.ids), time.monotonic() - start)


def _converse(speaker: Speaker, questions: Iterable[str], system: str | None) -> Said:
    from jinja2 import TemplateError

    said = Said("", 0, 0.0)
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


def _continue(speaker: Speaker, questions: Iterable[str], prompt: str | None) -> Said:
    said = Said("", 0, 0.0)
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
