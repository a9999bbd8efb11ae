"""A small server in the dialect of `generation.http_engine`, of an exported model, in a thread."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from safetensors.torch import load

Handler = Callable[[str, bytes], tuple[int, Any]]


class Served:
    """A model and what is true of its weights. `asked` is every request, by its path."""

    def __init__(self, model: torch.nn.Module, *, version: int | None = 0) -> None:
        self.model, self.version = model, version
        self.asked: list[tuple[str, Any]] = []
        self.received: dict[str, torch.Tensor] = {}
        self._lock = threading.Lock()

    def __call__(self, path: str, content: bytes) -> tuple[int, Any]:
        """A status, and what is answered."""
        if path == "/weights/tensor":
            self.received |= load(content)
            return 200, {}
        values = json.loads(content) if content else None
        self.asked.append((path, values))
        if path == "/weights/version":
            return 200, {"version": self.version}
        if path == "/weights/begin":
            self.version, self.received = None, {}
            return 200, {}
        if path == "/weights/end":
            return self._take(values)
        if path == "/v1/completions":
            with self._lock:
                return 200, {"choices": [self.choice(values)]}
        return 404, {"error": "no such path"}

    def _take(self, values: dict[str, int]) -> tuple[int, Any]:
        if values["tensors"] != len(self.received):
            return 400, {"error": f"{len(self.received)} tensors came"}
        wanted = self.model.state_dict().keys() - {"lm_head.weight"}
        if missing := wanted - self.received.keys():
            return 400, {"error": f"missing: {sorted(missing)}"}
        self.model.load_state_dict(self.received, strict=False)
        self.version = values["version"]
        return 200, {}

    @torch.no_grad()
    def choice(self, values: dict[str, Any]) -> dict[str, Any]:
        """Greedy where the temperature is 0, else drawn by the request's seed."""
        generator = torch.Generator().manual_seed(values["seed"])
        ids, found, logprobs = list(values["prompt"]), [], []
        for _ in range(values["max_tokens"]):
            logits = self.model(torch.tensor([ids])).logits[0, -1].float()
            log_p = (logits / (values["temperature"] or 1.0)).log_softmax(-1)
            token = int(log_p.argmax())
            if values["temperature"]:
                token = int(torch.multinomial(log_p.exp(), 1, generator=generator))
            ids.append(token)
            found.append(token)
            logprobs.append(float(log_p[token]))
            if token in values["stop_token_ids"]:
                break
        ended = found[-1] in values["stop_token_ids"]
        return {
            "token_ids": found,
            "prompt_token_ids": values["prompt"],
            "logprobs": {"token_logprobs": logprobs},
            "finish_reason": "stop" if ended else "length",
        }


@contextmanager
def serving(handle: Handler) -> Iterator[str]:
    """The URL of a server that answers by `handle` while inside."""

    class OfThis(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._answer(b"")

        def do_POST(self) -> None:
            self._answer(self.rfile.read(int(self.headers["Content-Length"])))

        def _answer(self, content: bytes) -> None:
            status, values = handle(self.path, content)
            body = values if isinstance(values, bytes) else json.dumps(values).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *arguments: object) -> None:
            """Nothing: pytest shows what matters."""

    class Waiting(ThreadingHTTPServer):
        request_queue_size = 128  # connections that wait while a busy machine accepts none

    server = Waiting(("127.0.0.1", 0), OfThis)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
