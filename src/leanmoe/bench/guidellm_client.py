"""GuideLLM's HTTP backend, with the arrival of every token kept.

GuideLLM stores when a request's first and last token came, which gives TTFT, TPOT and E2EL but not
the gaps between tokens (ITL). Its registries take a backend and a request handler of one's own:
these are its own, and they also note each arrival. Importing this module registers them; GuideLLM's
worker processes do so when they receive the backend.
"""

from __future__ import annotations

import time
from typing import Any, Literal

import httpx
from guidellm.backends.backend import Backend
from guidellm.backends.openai.http import OpenAIHTTPBackend
from guidellm.backends.openai.request_handlers import (
    OpenAIRequestHandlerFactory,
    TextCompletionsRequestHandler,
)
from guidellm.schemas.backends import BackendArgs, OpenAIHTTPBackendArgs
from pydantic import Field

from leanmoe.bench.servers import reason_in
from leanmoe.bench.settings import MOST_TOKENS

KIND: Literal["leanmoe_http"] = "leanmoe_http"
FORMAT: Literal["leanmoe_completions"] = "leanmoe_completions"
ARRIVALS = "arrivals"
"""Where a response's `response_metrics` holds its tokens' arrivals, in seconds since the epoch."""
COUNTED, ASKED = "counted", "asked"
"""Where it holds the reply's tokens by the server's usage (None without one) and as asked for."""


FIELDS = ("data", "event", "id", "retry", "")
"""Of server-sent events; a comment has none."""
MOST_STRAY = 10_000
"""Characters kept of a body that is no stream."""


@BackendArgs.register(KIND)
class TimedArgs(OpenAIHTTPBackendArgs):  # type: ignore[misc]
    """Arguments of the backend: GuideLLM's, with our request handler."""

    kind: Literal["leanmoe_http"] = KIND
    request_format: Literal["leanmoe_completions"] = FORMAT
    api_routes: dict[str, str] = Field(
        default_factory=lambda: {FORMAT: "v1/completions"}, validate_default=True
    )


@Backend.register(KIND)
class TimedBackend(OpenAIHTTPBackend):  # type: ignore[misc]
    """GuideLLM's backend, with a server's own words about a request that it refuses.

    Being ours, it brings this module into the workers.
    """

    async def process_startup(self) -> None:
        """GuideLLM's client, which then reads the body of an answer that is an error."""
        await super().process_startup()
        self._async_client.event_hooks = {"response": [_raise_reason]}


@OpenAIRequestHandlerFactory.register(FORMAT)
class TimedCompletions(TextCompletionsRequestHandler):  # type: ignore[misc]
    """GuideLLM's handler of /v1/completions, noting when each token came.

    A token without text of its own (part of a character) counts where the server sends its usage
    with each piece, as vLLM does; GuideLLM's own handler counts pieces with text only.
    """

    def __init__(self) -> None:
        super().__init__()
        self._arrivals: list[float] = []
        self._counted = 0
        self._is_error = False
        self._stray = ""

    def add_streaming_line(self, line: str) -> int | None:
        """1 for a piece that brought a token, 0 for another, None at the end."""
        now = time.time()
        self._note_stray(line)
        found: int | None = super().add_streaming_line(line)
        if found is None:
            return None
        counted = _completion_tokens(self.streaming_usage)
        # Where usage comes once, at the end, that piece brings no token beyond those with text.
        new = counted > max(self._counted, len(self._arrivals))
        grew = new and bool(self.extract_line_data(line).get("choices"))
        self._counted = max(counted, self._counted)
        if found or grew:
            self._arrivals.append(now)
            return 1
        return 0

    def _note_stray(self, line: str) -> None:
        """Keeps what is no event of a stream: a body that is no stream at all.

        Raises ValueError for errors that have no `data:` or an event's name: llama.cpp's and TGI's.
        """
        field, _, rest = line.strip().partition(":")
        if field == "error" or (field == "data" and self._is_error):
            raise ValueError(reason_in(rest.strip()))
        self._is_error = field == "event" and rest.strip() == "error"
        if field not in FIELDS and len(self._stray) < MOST_STRAY:
            self._stray += line

    def post_validation(self, response: Any) -> None:
        """Raises ValueError, with what came instead, where no token came."""
        if not self._arrivals:
            said = reason_in(self._stray) or "nothing that /v1/completions answers with"
            raise ValueError(f"no token came, but {said}")
        super().post_validation(response)

    def compile_streaming(self, request: Any, arguments: Any) -> Any:
        """GuideLLM's response, with the arrivals."""
        self.response_metrics = {
            ARRIVALS: self._arrivals,
            COUNTED: _completion_tokens(self.streaming_usage) or None,
            ASKED: request.output_metrics.text_tokens,
        }
        return super().compile_streaming(request, arguments)


async def _raise_reason(response: httpx.Response) -> None:
    if response.is_error:
        await response.aread()
        reason = reason_in(response.text) or response.reason_phrase
        raise ValueError(f"HTTP {response.status_code}: {reason}")


def _completion_tokens(usage: Any) -> int:
    """What a server counted; 0 where it counted nothing, or what no reply has."""
    counted = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return counted if type(counted) is int and 0 < counted <= MOST_TOKENS else 0
