"""A run's checkpoint that speaks, by the modules that trained it and in their precision."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from equilibrium_mcore.checkpoint.opened import OpenedCheckpoint, open_weights
from equilibrium_mcore.config.chat import ChatsConfig
from equilibrium_mcore.config.schema import ParallelismConfig, RunConfig
from equilibrium_mcore.data.chat.render import build_renderer
from equilibrium_mcore.data.chat.segments import Turn, joined
from equilibrium_mcore.data.tokenizer import Tokenizer, load_tokenizer
from equilibrium_mcore.hugging_face.sampling import Sampling
from equilibrium_mcore.hugging_face.speaker import Completion, no_template
from equilibrium_mcore.parallel import accelerator

UNFINISHED = "\ufffd"  # what stands for a character of which some bytes are missing


class RunGenerator:
    """The latest checkpoint of a run, or one of its checkpoints, with the run's tokenizer."""

    def __init__(self, path: Path, sampling: Sampling, *, chat: bool, seed: int) -> None:
        """Raises ValueError for a wanted chat with a run on text, FileNotFoundError where there is
        no checkpoint, and DamagedCheckpointError.
        """
        opened = open_weights(path)
        config = opened.config
        if chat and not isinstance(config.data, ChatsConfig):
            raise no_template(f"{path}, a run on text,", f"--checkpoint {path} --output NEW")
        self.sampling, self.seed, self.said = sampling, seed, 0
        self.tokenizer = load_tokenizer(config.data.tokenizer)
        self.renderer = build_renderer(config.data.template, self.tokenizer) if chat else None
        stop = None if self.renderer is None else self.renderer.stop
        self.stops = tuple({self.tokenizer.eod, *([] if stop is None else [stop])})
        self.engine = _engine(opened)

    def of_text(self, text: str) -> list[int]:
        """The ids that are continued."""
        return self.tokenizer.encode(text) or [self.tokenizer.eod]

    def of_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """The ids of a conversation, up to the answer that is wanted. Raises ValueError for one
        that the template refuses.
        """
        turns = [Turn(message["role"], message["content"]) for message in messages]
        return [int(number) for number in joined(self.renderer.segments(turns, prompt=True))[0]]

    def say(self, ids: Sequence[int]) -> Completion:
        """Print the continuation of `ids` as it comes; Ctrl-C ends it, and what came counts."""
        from equilibrium_mcore.generation import interface

        start, made = time.monotonic(), []
        request = interface.Request(interface.Prompt.of(ids), sample=self.said)
        self.said += 1
        sampling = interface.Sampling(
            self.seed,
            self.sampling.max_new_tokens,
            self.stops,
            temperature=self.sampling.temperature,
            top_p=self.sampling.top_p,
        )
        try:
            for piece in pieces(
                self._noted(self.engine.stream(request, sampling), made), self.tokenizer
            ):
                print(piece, end="", flush=True)
        except KeyboardInterrupt:
            print("\n(stopped)", file=sys.stderr, flush=True)
        print(flush=True)
        return Completion(self.tokenizer.decode(made), len(made), time.monotonic() - start)

    def _noted(self, drawn: Iterable[int], made: list[int]) -> Iterator[int]:
        """The ids without the one that ends the answer, kept in `made`."""
        for token in drawn:
            if token not in self.stops:
                made.append(token)
                yield token


def pieces(ids: Iterable[int], tokenizer: Tokenizer) -> Iterator[str]:
    """The text of ids that come one by one, in pieces of whole characters."""
    known: list[int] = []
    said = ""
    for token in ids:
        known.append(token)
        text = tokenizer.decode(known)
        if not text.endswith(UNFINISHED) and text.startswith(said):
            yield text[len(said) :]
            said = text
    rest = tokenizer.decode(known)
    if rest.startswith(said):
        yield rest[len(said) :]


def _engine(opened: OpenedCheckpoint) -> Any:
    """The checkpoint's model on this process alone."""
    accelerator.quiet_libraries()
    accelerator.install()  # before megatron-core is imported
    from equilibrium_mcore.generation.engine import OwnEngine
    from equilibrium_mcore.parallel.process_groups import join
    from equilibrium_mcore.parallel.rank_job import RankInfo

    groups = join(RankInfo.alone(), ParallelismConfig(), seed=opened.config.training.seed)
    config, chunks = frozen_alone(opened, groups)
    return OwnEngine(chunks, groups, model=config.model, layout=config.parallelism)


def frozen_alone(opened: OpenedCheckpoint, groups: Any) -> tuple[RunConfig, list[Any]]:
    """The checkpoint's model in eval mode, without gradients, in `groups` of one rank; and the run
    on one rank. After `accelerator.install`.
    """
    from equilibrium_mcore.checkpoint.sharded import load_weights
    from equilibrium_mcore.models.provider import build_model

    config, on_gpu = _alone(opened.config), accelerator.has_cuda()
    layout, training = config.parallelism, config.training
    module = build_model(config.model, layout, training, groups, on_gpu=on_gpu)
    if on_gpu:
        module.cuda()
    chunks = [module.requires_grad_(False).eval()]
    load_weights(opened, config=config, chunks=chunks, groups=groups)
    return config, chunks


def _alone(config: RunConfig) -> RunConfig:
    """The run's model on one rank, without what only training has."""
    precision = config.training.precision
    training = {
        "precision": precision if precision in ("fp32", "bf16") else "bf16",
        "backend": "auto",
        "recompute": "none",
        "cuda_graphs": [],
        "fused": type(config.training.fused)(),
    }
    return config.model_copy(
        update={
            "parallelism": ParallelismConfig(),
            "training": config.training.model_copy(update=training),
            "adapters": None,  # those of the checkpoint are added to the weights
        }
    )
