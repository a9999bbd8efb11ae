"""An engine over HTTP: OpenAI's completions with token ids in and out.

    POST /v1/completions     {"prompt": [ids], "max_tokens", "temperature", "seed", "logprobs": 0,
                              "stop_token_ids", "ignore_eos", "return_token_ids", ...}
                             choices[0]: token_ids, logprobs.token_logprobs, finish_reason
    GET  /weights/version    {"version": 3}; null while weights are being sent
    POST /weights/begin      {"version": 4}
    POST /weights/tensor     a safetensors file of one tensor, by its Hugging Face name
    POST /weights/end        {"version": 4, "tensors": 212}

The first is vLLM's dialect (`return_token_ids`, `stop_token_ids`), in which ids need no text. The
others are ours: servers take weights in ways of their own, so a server needs a few lines for them.
Rank 0 alone talks; all ranks get what it got, errors too. It was run against the server of
tests/generation/test_http_engine.py, not against vLLM or SGLang.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor

from equilibrium_mcore.generation.interface import Request, Rollout, Sampling
from equilibrium_mcore.parallel.object_group import object_group
from equilibrium_mcore.processes.http_client import Client, ServerError

COMPLETIONS = "/v1/completions"
VERSION, BEGIN, TENSOR, END = (f"/weights/{name}" for name in ("version", "begin", "tensor", "end"))


class StaleWeightsError(ServerError):
    """The server has other weights than those that were asked for."""


class HttpEngine:
    """See generation.interface.Engine.

    Args:
        model: the server's name of it.
        vocab_size: ids of answers are below it.
        connections: requests that are under way at once.
    """

    def __init__(
        self, client: Client, *, model: str, vocab_size: int, connections: int = 32
    ) -> None:
        self.client, self.model = client, model
        self.vocab_size, self.connections = vocab_size, connections

    def generate(
        self, requests: Sequence[Request], sampling: Sampling, *, version: int = 0
    ) -> list[Rollout]:
        """See Engine. The server's weights are those of `version`, before and after.

        A draw is the server's: repeated by its seed, but not the same as another engine's.

        Raises ValueError for top-k or top-p, whose support no server tells; StaleWeightsError for
        other weights; ServerError for a server that is gone, slow, or answers what was not asked.
        """
        if sampling.top_k or sampling.top_p != 1:
            raise ValueError(
                f"top_k={sampling.top_k}, top_p={sampling.top_p} over HTTP: a server does not say "
                "which tokens could be drawn, so training could not score them; use 0 and 1"
            )
        return on_first_rank(lambda: self._generate(requests, sampling, version))

    def _generate(
        self, requests: Sequence[Request], sampling: Sampling, version: int
    ) -> list[Rollout]:
        self._check_version(version)
        with ThreadPoolExecutor(self.connections) as pool:
            found = list(pool.map(lambda one: self._answer(one, sampling, version), requests))
        self._check_version(version)  # nobody sent others meanwhile
        return found

    def _check_version(self, version: int) -> None:
        answer = self.client.get(VERSION)
        there = answer.get("version") if isinstance(answer, dict) else answer
        if there != version:
            state = "an unfinished update" if there is None else f"version {there}"
            raise StaleWeightsError(
                f"{self.client.url}: its weights are {state}, and version {version} was asked for: "
                "send them first (`send_weights`), and let no other run use this server"
            )

    def _answer(self, request: Request, sampling: Sampling, version: int) -> Rollout:
        answer = self.client.post(COMPLETIONS, self._asked(request, sampling))
        try:
            (choice,) = answer["choices"]
            ids = np.asarray(choice["token_ids"], dtype=np.int32)
            logprobs = np.asarray(choice["logprobs"]["token_logprobs"], dtype=np.float32)
            finish, echoed = choice["finish_reason"], choice.get("prompt_token_ids")
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise self._wrong(
                f"no token ids and log-probabilities in its answer ({type(error).__name__}: "
                f"{error}); of vLLM it takes a version that knows return_token_ids"
            ) from None
        self._check(request, sampling, ids, logprobs, finish, echoed)
        ended = "end" if finish == "stop" else "length"
        return Rollout(request, ids, logprobs, ended, version)

    def _asked(self, request: Request, sampling: Sampling) -> dict[str, Any]:
        return {
            "model": self.model,
            "prompt": request.prompt.ids.tolist(),
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "seed": seed_of(request, sampling),
            "logprobs": 0,  # of the chosen tokens alone
            "stop_token_ids": list(sampling.stop_ids),
            "ignore_eos": True,  # the stop ids say what ends an answer
            "skip_special_tokens": False,
            "return_token_ids": True,
        }

    def _check(
        self,
        request: Request,
        sampling: Sampling,
        ids: np.ndarray,
        logprobs: np.ndarray,
        finish: str,
        echoed: list[int] | None,
    ) -> None:
        """Raise ServerError for an answer that is not one to what was asked."""
        most, stops = sampling.max_new_tokens, sampling.stop_ids
        if ids.ndim != 1 or not 1 <= len(ids) <= most:
            raise self._wrong(f"{ids.size} tokens, where 1 to {most} were asked for")
        if logprobs.shape != ids.shape:
            raise self._wrong(f"{len(ids)} tokens and {logprobs.size} log-probabilities")
        if ids.min() < 0 or ids.max() >= self.vocab_size:
            raise self._wrong(f"ids from {ids.min()} to {ids.max()}, of {self.vocab_size} tokens")
        if not np.isfinite(logprobs).all() or logprobs.max() > 1e-3:
            raise self._wrong("log-probabilities that are none")
        if echoed is not None and list(echoed) != request.prompt.ids.tolist():
            raise self._wrong("another prompt's answer, or a prompt that it changed")
        if np.isin(ids[:-1], stops).any():
            raise self._wrong("tokens after one that ends an answer")
        ends = bool(np.isin(ids[-1], stops))
        if finish != ("stop" if ends else "length") or not (ends or len(ids) == most):
            raise self._wrong(
                f"finish_reason={finish!r} after {len(ids)} of {most} tokens, the last of which is "
                f"{'one' if ends else 'none'} of the stop ids"
            )

    def _wrong(self, what: str) -> ServerError:
        return ServerError(f"{self.client.url}{COMPLETIONS}: {what}")

    def send_weights(self, tensors: Iterable[tuple[str, Tensor]], *, version: int) -> None:
        """Give the server these weights, one tensor at a time. On rank 0 alone.

        `tensors` are Hugging Face's (`hugging_face.stream`). Until the last is there the server
        has no version, and generates nothing. Raises ServerError.
        """
        self.client.post(BEGIN, {"version": version})
        count = 0
        for name, tensor in tensors:
            self.client.post_bytes(TENSOR, save({name: tensor.contiguous()}))
            count += 1
        self.client.post(END, {"version": version, "tensors": count})


def seed_of(request: Request, sampling: Sampling) -> int:
    """31 bits from the sampling's seed, the prompt's key and the sample's number."""
    text = f"{sampling.seed} {request.prompt.key} {request.sample}".encode()
    return int.from_bytes(blake2b(text, digest_size=4).digest(), "little") >> 1


def on_first_rank[T](work: Callable[[], T]) -> T:
    """What `work` returns on rank 0, on every rank; what it raises there, too. Collective.

    Outside of a job, `work` alone.
    """
    if not torch.distributed.is_initialized():
        return work()
    outcome: list[Any] = [None, None]
    if torch.distributed.get_rank() == 0:
        try:
            outcome[0] = work()
        except Exception as error:
            outcome[1] = error
    torch.distributed.broadcast_object_list(outcome, src=0, group=object_group())
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]
