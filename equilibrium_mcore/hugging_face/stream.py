"""The weights of a run, as transformers' class names them, to an engine that serves them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

import torch
from torch import Tensor

from equilibrium_mcore.config.schema import ModelConfig, RunConfig
from equilibrium_mcore.hugging_face.convert import source_of
from equilibrium_mcore.hugging_face.live import LiveTensors
from equilibrium_mcore.hugging_face.mapping import plan
from equilibrium_mcore.hugging_face.source import TensorSource
from equilibrium_mcore.hugging_face.weights import to_hugging_face


class TakesWeights(Protocol):
    """An engine that has weights of its own: `generation.http_engine.HttpEngine`."""

    def send_weights(self, tensors: Iterator[tuple[str, Tensor]], *, version: int) -> None:
        """Take all tensors as those of `version`."""


def stream_weights(
    chunks: list[torch.nn.Module], config: RunConfig, engine: TakesWeights, *, version: int
) -> None:
    """Send the weights as they are now, adapters folded in. Collective.

    They are gathered one tensor at a time, to rank 0, which sends it. Raises what the engine does,
    on every rank.
    """

    def send(source: TensorSource) -> None:
        merged = source_of(source, config)
        engine.send_weights(hugging_face_tensors(merged, config.model), version=version)

    LiveTensors(chunks).on_first_rank(send)


def hugging_face_tensors(source: TensorSource, model: ModelConfig) -> Iterator[tuple[str, Tensor]]:
    """Every tensor of the exported model, in the dtype that it has here."""
    rows = plan(model, source.names())
    for _, name, tensor in to_hugging_face(source.read, rows, model):
        yield name, tensor
