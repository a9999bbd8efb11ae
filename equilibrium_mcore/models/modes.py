"""Modes that a model's chunks have for a while: evaluation, and an end without logits."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from megatron.core.utils import get_attr_wrapped_model


@contextmanager
def evaluating(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """The chunks in eval mode inside, and in the mode that they had after it."""
    modes = [chunk.training for chunk in chunks]
    for chunk in chunks:
        chunk.eval()
    try:
        yield
    finally:
        for chunk, mode in zip(chunks, modes, strict=True):
            chunk.train(mode)


@contextmanager
def without_logits(chunks: Sequence[torch.nn.Module]) -> Iterator[None]:
    """Inside, the last stage gives what its output layer would be given, final norm and all."""
    models = [get_attr_wrapped_model(c, "post_process", return_model_obj=True) for c in chunks]
    before = [model.post_process for model in models]
    for model in models:
        model.post_process = False
    try:
        yield
    finally:
        for model, value in zip(models, before, strict=True):
            model.post_process = value
