"""Requests to a server over HTTP with bounded patience, and errors that say what happened."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

AGAIN = (408, 429, 500, 502, 503, 504)  # statuses after which the same request may succeed
MOST_SHOWN = 300  # characters of an answer in a message


class ServerError(RuntimeError):
    """A server that does not do what was asked; the message says what was tried."""


@dataclass(frozen=True)
class Client:
    """Asks the server at `url`, e.g. http://host:8000.

    A request that is not answered in `timeout_seconds`, is cut off, or is refused for the moment
    (a status of AGAIN) is sent again, `attempts` times in all, after pauses that double from
    `pause_seconds`. Any other refusal is final. `headers` go with every request.
    """

    url: str
    timeout_seconds: float = 600.0
    attempts: int = 4
    pause_seconds: float = 1.0
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)  # they may hold a key

    def __post_init__(self) -> None:
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"url={self.url!r}: give it with http:// or https://")
        if self.attempts < 1 or not self.timeout_seconds > 0 or self.pause_seconds < 0:
            raise ValueError(
                f"attempts={self.attempts}, timeout_seconds={self.timeout_seconds}, pause_seconds="
                f"{self.pause_seconds}: at least 1, above 0, and not negative"
            )

    def get(self, path: str) -> Any:
        """The JSON that the server answers. Raises ServerError."""
        return self._json(path, None, {})

    def post(self, path: str, values: Any) -> Any:
        """The JSON that it answers to `values` as JSON. Raises ServerError."""
        return self._json(path, json.dumps(values).encode(), {"Content-Type": "application/json"})

    def post_bytes(self, path: str, content: bytes) -> Any:
        """The JSON that it answers to raw bytes. Raises ServerError."""
        return self._json(path, content, {"Content-Type": "application/octet-stream"})

    def _json(self, path: str, content: bytes | None, headers: dict[str, str]) -> Any:
        answer = self._send(path, content, headers)
        try:
            return json.loads(answer)
        except ValueError:
            raise ServerError(
                f"{self._at(path)} answered {_shown(answer)}, which is no JSON: is it the server "
                "that was meant?"
            ) from None

    def _send(self, path: str, content: bytes | None, headers: dict[str, str]) -> bytes:
        what = ""
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(self.pause_seconds * 2 ** (attempt - 1))
            request = urllib.request.Request(
                self._at(path), data=content, headers={**self.headers, **headers}
            )
            try:
                with urllib.request.urlopen(request, timeout=self.timeout_seconds) as answer:
                    return answer.read()
            except urllib.error.HTTPError as error:
                with error:
                    what = f"refused it with status {error.code}: {_shown(_body(error))}"
                if error.code not in AGAIN:
                    raise ServerError(f"{self._at(path)} {what}") from None
            except (OSError, http.client.HTTPException) as error:
                what = self._in_words(error)
        times = "once" if self.attempts == 1 else f"{self.attempts} times"
        raise ServerError(
            f"{self._at(path)} {what}; tried {times}. Is the server running, and reachable from "
            "this host?"
        )

    def _in_words(self, error: Exception) -> str:
        reason = getattr(error, "reason", error)
        if isinstance(reason, TimeoutError):
            return f"did not answer in {self.timeout_seconds:g} s"
        return f"could not be asked: {reason or type(error).__name__}"

    def _at(self, path: str) -> str:
        return self.url.rstrip("/") + path


def _body(error: urllib.error.HTTPError) -> bytes:
    try:
        return error.read()
    except (OSError, http.client.HTTPException):
        return b""


def _shown(answer: bytes) -> str:
    text = answer.decode("utf-8", "replace").strip()
    return repr(text if len(text) <= MOST_SHOWN else text[:MOST_SHOWN] + "...")
