"""A small judge in the dialect of OpenAI's chat protocol, in a thread of the test."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# The request's text, answer A and answer B; what the judge replies.
Reply = Callable[[str, str, str], str]
_PARTS = re.compile(
    r"<request>\n(.*)\n</request>\n\n<answer_A>\n(.*)\n</answer_A>\n\n<answer_B>\n(.*)\n</answer_B>",
    re.DOTALL,
)


def shorter_is_better(prompt: str, a: str, b: str) -> str:
    """Reasons, and a verdict; a tie for answers of one length."""
    if len(a) == len(b):
        return "They say as much as each other.\n[[C]]"
    return f"One says less.\n[[{'A' if len(a) < len(b) else 'B'}]]"


def first_is_better(prompt: str, a: str, b: str) -> str:
    """A judge that looks at the place alone."""
    return "The first one, of course. [[A]]"


class JudgeServer:
    """`asked` are the bodies of all requests; `refusals` are statuses that come first."""

    def __init__(self, reply: Reply, *, refusals: tuple[int, ...] = ()) -> None:
        self.reply, self.refusals = reply, list(refusals)
        self.asked: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.url = ""
        self._lock = threading.Lock()

    def answer(self, path: str, headers: dict[str, str], body: dict[str, Any]) -> tuple[int, Any]:
        """A status and the body of the answer."""
        with self._lock:
            self.asked.append(body)
            self.headers.append(headers)
            refusal = self.refusals.pop(0) if self.refusals else None
        if path != "/v1/chat/completions":
            return 404, {"error": f"no path {path}"}
        if refusal is not None:
            return refusal, {"error": "not now"}
        found = _PARTS.fullmatch(body["messages"][-1]["content"])
        assert found is not None
        message = {"role": "assistant", "content": self.reply(*found.groups())}
        return 200, {"choices": [{"message": message}]}


@contextmanager
def judging(reply: Reply = shorter_is_better, **settings: Any) -> Iterator[JudgeServer]:
    """A server that replies so, until the block ends."""
    judge = JudgeServer(reply, **settings)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, answer = judge.answer(self.path, dict(self.headers), body)
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    judge.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield judge
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
