"""Models that are compared: a run's checkpoint by the modules that trained it, on one process."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from equilibrium_mcore.alignment.prompts import AskedPrompt
from equilibrium_mcore.checkpoint.opened import open_weights
from equilibrium_mcore.config.chat import ChatsConfig
from equilibrium_mcore.config.errors import ConfigError
from equilibrium_mcore.config.heads import has_output, has_scalar_head
from equilibrium_mcore.config.schema import ParallelismConfig
from equilibrium_mcore.data.chat.render import Renderer, build_renderer
from equilibrium_mcore.data.chat.segments import Turn, joined
from equilibrium_mcore.data.tokenizer import load_tokenizer
from equilibrium_mcore.generation.engine import OwnEngine
from equilibrium_mcore.generation.interface import Prompt, Request, Sampling
from equilibrium_mcore.hugging_face.run_speaker import frozen_alone
from equilibrium_mcore.parallel import process_groups
from equilibrium_mcore.parallel.launch import RankInfo


class Asking(NamedTuple):
    """How answers are drawn: from the whole distribution, or the likeliest at temperature 0."""

    max_new_tokens: int = 256
    temperature: float = 1.0
    seed: int = 1234


class Answered(NamedTuple):
    """An answer: `ids` int32 of prompt and answer, `start` the place of its first token."""

    ids: np.ndarray
    start: int
    text: str
    finished: bool  # it ended by itself


class Model(Protocol):
    """What is asked, and what it thinks of tokens."""

    name: str

    def answers(self, prompts: Sequence[AskedPrompt], asking: Asking) -> list[Answered]:
        """An answer to each."""

    def log_probabilities(self, answered: Answered) -> Tensor:
        """Before each token of the answer, of all tokens: float32 [m, vocabulary], in nats."""

    def reads_as(self, other: Any) -> str | None:
        """Why ids of this model do not mean the same to `other`; None where they do."""


@contextmanager
def one_process() -> Iterator[Any]:
    """The groups of this process as the one rank, for any number of models."""
    try:
        yield process_groups.join(RankInfo.alone(), ParallelismConfig(), seed=0)
    finally:
        process_groups.destroy()


class RunModel:
    """A Model: the latest checkpoint of a run, or one of its checkpoints."""

    def __init__(self, path: Path, groups: Any) -> None:
        """Raises ConfigError for one that writes no text, FileNotFoundError where there is no
        checkpoint, and DamagedCheckpointError."""
        opened = open_weights(path)
        if not has_output(opened.config.model):
            raise ConfigError(
                f"{path} gives scores and writes no text: name it as --reward-model, and here the "
                "models that answer"
            )
        self.name = str(path)
        config, self._chunks = frozen_alone(opened, groups)
        self._size = config.model.vocab_size
        self.tokenizer = load_tokenizer(opened.config.data.tokenizer)
        self._renderer = _renderer(opened.config.data, self.tokenizer)
        stop = None if self._renderer is None else self._renderer.stop
        self._stops = tuple({self.tokenizer.eod, *([] if stop is None else [stop])})
        layout = config.parallelism
        self._engine = OwnEngine(self._chunks, groups, model=config.model, layout=layout)

    def answers(self, prompts: Sequence[AskedPrompt], asking: Asking) -> list[Answered]:
        """See Model."""
        requests = [Request(Prompt.of(self._ids(prompt))) for prompt in prompts]
        sampling = Sampling(
            asking.seed, asking.max_new_tokens, self._stops, temperature=asking.temperature
        )
        return [
            Answered(
                np.concatenate([one.request.prompt.ids, one.ids]).astype(np.int32),
                len(one.request.prompt.ids),
                self.tokenizer.decode([int(i) for i in one.ids if i not in self._stops]),
                one.finish == "end",
            )
            for one in self._engine.generate(requests, sampling)
        ]

    def log_probabilities(self, answered: Answered) -> Tensor:
        """See Model."""
        logits = _forward(self._chunks, answered.ids[:-1])
        return logits[answered.start - 1 :, : self._size].float().log_softmax(-1)

    def reads_as(self, other: Any) -> str | None:
        """See Model."""
        if not isinstance(other, RunModel):
            return "one is a checkpoint and the other an exported folder"
        if self.tokenizer.fingerprint != other.tokenizer.fingerprint:
            return "they have different tokenizers"
        return None

    def _ids(self, prompt: AskedPrompt) -> np.ndarray:
        if self._renderer is None:
            return np.array(self.tokenizer.encode(prompt.text) or [self.tokenizer.eod])
        return joined(self._renderer.segments(prompt.turns, prompt=True))[0]


class RewardModel:
    """Scores of answers by a checkpoint of stage `reward_model`, in its own template."""

    def __init__(self, path: Path, groups: Any) -> None:
        """Raises ConfigError for a checkpoint that gives no scores."""
        self.name = str(path)
        opened = open_weights(path)
        if not has_scalar_head(opened.config.model):
            raise ConfigError(
                f"--reward-model {path} gives no scores: name a run of stage reward_model"
            )
        _, self._chunks = frozen_alone(opened, groups)
        tokenizer = load_tokenizer(opened.config.data.tokenizer)
        renderer = _renderer(opened.config.data, tokenizer)
        if renderer is None:
            raise ConfigError(f"--reward-model {path} was trained on texts, and not on answers")
        self._renderer = renderer

    def score(self, prompt: AskedPrompt, answer: str) -> float:
        """The value at the last token that the answer would have been produced with.

        Raises ValueError for one that is not finite.
        """
        turns = (*prompt.turns, Turn("assistant", answer))
        ids, produced = joined(self._renderer.segments(turns))
        last = int(np.flatnonzero(produced)[-1])
        score = float(_forward(self._chunks, ids)[last])
        if not math.isfinite(score):
            raise ValueError(
                f"the reward model {self.name} gave {score} for an answer to {prompt.text[:60]!r}: "
                "its weights are of no use"
            )
        return score


def _renderer(data: Any, tokenizer: Any) -> Renderer | None:
    """Of a chat template; None where the run was on texts."""
    return build_renderer(data.template, tokenizer) if isinstance(data, ChatsConfig) else None


@torch.no_grad()
def _forward(chunks: Sequence[torch.nn.Module], ids: np.ndarray) -> Tensor:
    """What the model gives for one sequence, without the batch: [S, ...]."""
    (chunk,) = chunks
    device = next(chunk.parameters()).device
    tokens = torch.from_numpy(ids.astype(np.int64)).to(device)[None]
    places = torch.arange(tokens.shape[1], device=device)[None]
    return chunk(input_ids=tokens, position_ids=places, attention_mask=None)[0]
