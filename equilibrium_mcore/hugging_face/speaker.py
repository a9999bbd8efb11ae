"""A model that speaks: an exported folder with its tokenizer, one answer at a time, streamed."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from equilibrium_mcore.config.installation import command
from equilibrium_mcore.hugging_face.intact import loading
from equilibrium_mcore.hugging_face.sampling import Sampling


class Completion(NamedTuple):
    """An answer."""

    text: str
    tokens: int
    seconds: float


class TextGenerator:
    """A model with its tokenizer, on the GPU where there is one."""

    def __init__(self, folder: Path, sampling: Sampling, *, chat: bool, seed: int) -> None:
        """Raises ValueError for a folder that is damaged, or has no template for a wanted chat."""
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()  # of loading weights: it would stand before the text
        logging.set_verbosity_error()
        self.sampling = sampling
        _refuse_scores(folder)
        with loading(folder):
            self.tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        if chat and self.tokenizer.chat_template is None:
            raise no_template(str(folder), "--checkpoint RUN --output NEW")
        with loading(folder):
            model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
        self.model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
        torch.manual_seed(seed)

    def of_text(self, text: str) -> Any:
        """The ids that are continued."""
        return self.tokenizer(text, return_tensors="pt")

    def of_chat(self, messages: list[dict[str, str]]) -> Any:
        """The ids of a conversation, up to the answer that is wanted. Raises ValueError for one
        that the template refuses.
        """
        from jinja2 import TemplateError

        try:
            return self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        except TemplateError as error:
            raise ValueError(f"the chat template refuses this talk: {error}") from None

    def say(self, inputs: Any) -> Completion:
        """Print the continuation of `inputs` as it comes; Ctrl-C ends it, and what came counts."""
        import torch
        from transformers import TextStreamer

        class RecordingStreamer(TextStreamer):
            ids: list[int]

            def put(self, value: torch.Tensor) -> None:
                if not self.next_tokens_are_prompt:
                    self.ids.extend(value.tolist())
                super().put(value)

        decoding = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        streamer = RecordingStreamer(self.tokenizer, skip_prompt=True, **decoding)
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
        return Completion(text, len(streamer.ids), time.monotonic() - start)


def _refuse_scores(folder: Path) -> None:
    path = folder / "config.json"
    if path.is_file() and "ForSequenceClassification" in path.read_text(encoding="utf-8"):
        raise ValueError(
            f"{folder} holds a reward model, which gives answers a score and writes none: name the "
            "folder of a language model"
        )


def no_template(what: str, options: str) -> ValueError:
    """The error of a chat with a model that has no chat template."""
    return ValueError(
        f"--chat, but {what} has no chat template: give it one ("
        f"{command('convert')} {options} --chat-template chatml, then talk with NEW), or "
        "leave --chat out to continue a text"
    )
