"""POST /leanmoe/plan in vLLM's server: puts another of the plans that were given at start to work.

`PlanSwitch` is given to vLLM as --middleware. vLLM's own key guards its own paths alone, and a
middleware runs before it looks: so this path has a key of its own, and without one it is not there.
"""

from __future__ import annotations

import hmac
import json
import os
from typing import Any

from leanmoe.core.environment import PLAN_KEY
from leanmoe.core.errors import shown
from leanmoe.serve.vllm.engine_control import CHANGE, STATE
from leanmoe.serve.vllm.plan_metrics import ask_engine

PATH = "/leanmoe/plan"
MOST_BYTES = 4096
"""Of a request's body: it holds a name."""


class PlanSwitch:
    """An ASGI middleware: GET says which plan is at work, POST {"plan": NAME} changes it."""

    def __init__(self, app: Any) -> None:
        self._app, self._key = app, os.environ.get(PLAN_KEY, "")

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request: all but those for the path pass through untouched."""
        if not self._key or scope["type"] != "http" or scope["path"].rstrip("/") != PATH:
            await self._app(scope, receive, send)
            return
        status, answer = await self._answer(scope, receive)
        body = json.dumps(answer).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
        ]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _answer(self, scope: Any, receive: Any) -> tuple[int, dict[str, Any]]:
        given = dict(scope["headers"]).get(b"authorization", b"")
        if not hmac.compare_digest(given, f"Bearer {self._key}".encode()):
            return 401, {"error": f"the Authorization header must hold Bearer and {PLAN_KEY}"}
        if scope["method"] == "GET":
            return 200, await ask_engine(scope, STATE)
        if scope["method"] != "POST":
            return 405, {"error": f"{scope['method']} is not allowed: GET and POST are"}
        name = _plan_named(await _body(receive))
        if name is None:
            return 400, {"error": 'the body must be like {"plan": "NAME"}'}
        state = await ask_engine(scope, STATE)
        if name not in state["plans"]:
            known = ", ".join(state["plans"])
            return 400, {"error": f"the plan {shown(name)} was not given at start: {known} were"}
        return 200, await ask_engine(scope, CHANGE, name)


async def _body(receive: Any) -> bytes:
    """A request's body, cut where it is longer than any that could be meant."""
    body = b""
    while len(body) <= MOST_BYTES:
        message = await receive()
        body += message.get("body", b"")
        if not message.get("more_body", False):
            break
    return body[:MOST_BYTES]


def _plan_named(body: bytes) -> str | None:
    """The name in a body, None where it is not of its form."""
    try:
        value = json.loads(body)
    except ValueError:
        return None
    name = value.get("plan") if isinstance(value, dict) else None
    return name if isinstance(name, str) else None
