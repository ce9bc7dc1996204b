"""An OpenAI-compatible server on the loopback whose latencies are known, and which can die."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Seen:
    """One request as the server saw it."""

    received: float
    prompt: str
    max_tokens: int
    tokens: list[float] = field(default_factory=list)


class MockServer:
    """Waits `ttft` seconds, then sends a token every `itl` seconds; keeps what it did."""

    def __init__(
        self,
        ttft: float = 0.05,
        itl: float = 0.01,
        dies_after: int | None = None,
        metrics: Callable[[int], bytes] | None = None,
        most_tokens: int | None = None,
        has_usage: bool = True,
        error: str | None = None,
        key: str | None = None,
    ) -> None:
        """`metrics` is what /metrics answers while so many requests are under way.

        `most_tokens` ends replies early; `error` stands in each stream after its first token, or
        before any, as HTTP 400, with `most_tokens` 0.
        """
        self.most_tokens, self.has_usage, self.error, self.key = most_tokens, has_usage, error, key
        self.ttft, self.itl, self.dies_after = ttft, itl, dies_after
        self.metrics, self.under_way = metrics, 0
        self.seen: list[Seen] = []
        self.lock = threading.Lock()
        self.dead = False
        self.server = _Server(("127.0.0.1", 0), _Handler)
        self.server.daemon_threads = True
        self.server.mock = self

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    def timed(self) -> list[Seen]:
        """The requests of the timed runs: a warm-up asks for at most 4 tokens."""
        return [seen for seen in self.seen if seen.max_tokens > 4]


class _Server(ThreadingHTTPServer):
    mock: MockServer
    request_queue_size = 128

    def handle_error(self, *_: Any) -> None:
        """A client that leaves early is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        if self.server.mock.dead:
            self._drop()
            return
        if not self._is_let_in():
            return
        if self.path == "/metrics":
            self._metrics()
            return
        models = {"data": [{"id": "mock", "root": None, "max_model_len": 4096}]}
        self._json(models if self.path == "/v1/models" else {"status": "ok"})

    def _is_let_in(self) -> bool:
        key = self.server.mock.key
        if key is None or self.headers["Authorization"] == f"Bearer {key}":
            return True
        self._answer(401, "application/json", b'{"error": "Unauthorized"}')
        return False

    def do_POST(self) -> None:
        mock = self.server.mock
        received = time.time()
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self._is_let_in():
            return
        if mock.error is not None and mock.most_tokens == 0:
            refusal = {"error": {"message": mock.error, "type": "invalid_request_error"}}
            self._answer(400, "application/json", json.dumps(refusal).encode())
            return
        with mock.lock:
            seen = Seen(received, body["prompt"], body["max_tokens"])
            mock.seen.append(seen)
            if mock.dies_after is not None and len(mock.seen) > mock.dies_after:
                mock.dead = True
        if mock.dead:
            self._drop()
            return
        with mock.lock:
            mock.under_way += 1
        try:
            self._stream(body, seen)
        finally:
            with mock.lock:
                mock.under_way -= 1

    def _stream(self, body: Any, seen: Seen) -> None:
        mock = self.server.mock
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        count = len(body["prompt"].split())
        made = min(body["max_tokens"], mock.most_tokens or body["max_tokens"])
        for number in range(made):
            time.sleep(mock.itl if number else mock.ttft)
            seen.tokens.append(time.time())
            # Every third token has no text of its own, as parts of a character have none.
            text = "" if number % 3 == 2 and mock.has_usage else f"w{number} "
            usage = {"prompt_tokens": count, "completion_tokens": number + 1}
            piece = {"id": "c", "choices": [{"text": text, "index": 0}]}
            self._event({**piece, "usage": usage} if mock.has_usage else piece)
            if mock.error is not None:
                self._event({"error": {"message": mock.error, "code": 500}})
                break
        usage = {"prompt_tokens": count, "completion_tokens": made}
        if mock.has_usage:
            self._event({"id": "c", "choices": [], "usage": usage})
        self._chunk(b"data: [DONE]\n\n")
        self._chunk(b"")

    def _event(self, value: Any) -> None:
        self._chunk(b"data: " + json.dumps(value).encode() + b"\n\n")

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def _metrics(self) -> None:
        mock = self.server.mock
        if mock.metrics is None:
            self._answer(404, "text/plain", b"no such page")
        else:
            self._answer(200, "text/plain", mock.metrics(mock.under_way))

    def _json(self, value: Any) -> None:
        self._answer(200, "application/json", json.dumps(value).encode())

    def _answer(self, status: int, kind: str, data: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _drop(self) -> None:
        self.close_connection = True
        self.connection.close()


@contextmanager
def serving(**settings: Any) -> Iterator[MockServer]:
    """A mock server that answers until the `with` ends."""
    mock = MockServer(**settings)
    thread = threading.Thread(target=mock.server.serve_forever, daemon=True)
    thread.start()
    try:
        yield mock
    finally:
        mock.server.shutdown()
        mock.server.server_close()
        thread.join(5)
