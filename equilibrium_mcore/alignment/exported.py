"""A model that is compared as an exported folder, by transformers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from equilibrium_mcore.alignment.models import Answered, Asking
from equilibrium_mcore.alignment.prompts import AskedPrompt
from equilibrium_mcore.hugging_face.intact import loading


class ExportedModel:
    """A Model: what `tools/convert_checkpoint.py` wrote. It runs the folder's modelling code."""

    def __init__(self, path: Path) -> None:
        """Raises ValueError for a folder that is damaged."""
        from transformers import AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        logging.set_verbosity_error()
        self.name = str(path)
        with loading(path):
            self.tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
            model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
        self.model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")

    def answers(self, prompts: Sequence[AskedPrompt], asking: Asking) -> list[Answered]:
        """See Model. One after the other, each from a seed of its own."""
        return [self._answer(prompt, asking, number) for number, prompt in enumerate(prompts)]

    @torch.no_grad()
    def log_probabilities(self, answered: Answered) -> Tensor:
        """See Model."""
        ids = torch.from_numpy(answered.ids[:-1].astype(np.int64))[None].to(self.model.device)
        logits = self.model(input_ids=ids).logits[0]
        return logits[answered.start - 1 :, : len(self.tokenizer)].float().log_softmax(-1)

    def reads_as(self, other: Any) -> str | None:
        """See Model."""
        if not isinstance(other, ExportedModel):
            return "one is an exported folder and the other a checkpoint"
        if self.tokenizer.get_vocab() != other.tokenizer.get_vocab():
            return "they have different tokenizers"
        return None

    @torch.no_grad()
    def _answer(self, prompt: AskedPrompt, asking: Asking, number: int) -> Answered:
        given = self._given(prompt)
        torch.manual_seed(asking.seed + number)
        sampling: dict[str, Any] = {"do_sample": asking.temperature > 0}
        if asking.temperature > 0:
            sampling |= {"temperature": asking.temperature, "top_k": 0, "top_p": 1.0}
        made = self.model.generate(
            **{name: value.to(self.model.device) for name, value in given.items()},
            max_new_tokens=asking.max_new_tokens,
            **sampling,
        )[0]
        start = given["input_ids"].shape[1]
        ids = made.cpu().numpy().astype(np.int32)
        text = self.tokenizer.decode(made[start:], skip_special_tokens=True)
        return Answered(ids, start, text, len(ids) - start < asking.max_new_tokens)

    def _given(self, prompt: AskedPrompt) -> dict[str, Tensor]:
        if self.tokenizer.chat_template is None:
            given = self.tokenizer(prompt.text, return_tensors="pt")
        else:
            messages = [{"role": turn.role, "content": turn.content} for turn in prompt.turns]
            given = self.tokenizer.apply_chat_template(
                messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
            )
        return {name: given[name] for name in ("input_ids", "attention_mask")}
