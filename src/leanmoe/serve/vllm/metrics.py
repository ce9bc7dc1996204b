"""The plan in vLLM's /metrics: an ASGI middleware, given to it as --middleware."""

from __future__ import annotations

import os
from typing import Any

from leanmoe.serve.metrics import TokenRate, counted_tokens, exposition
from leanmoe.serve.vllm.plugin import PLAN

PATH = "/metrics"


class PlanMetrics:
    """Asks the workers what the last step ran and adds it to what vLLM answers."""

    def __init__(self, app: Any) -> None:
        self._app = app
        self._rate = TokenRate()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """One request: all but those for metrics pass through untouched."""
        if scope["type"] != "http" or scope["path"].rstrip("/") != PATH:
            await self._app(scope, receive, send)
            return
        start: dict[str, Any] = {}
        body = bytearray()

        async def keep(message: dict[str, Any]) -> None:
            if message["type"] == "http.response.start":
                start.update(message)
                return
            body.extend(message.get("body", b""))
            if not message.get("more_body", False):
                await self._answer(scope, start, bytes(body), send)

        await self._app(scope, receive, keep)

    async def _answer(self, scope: Any, start: dict[str, Any], body: bytes, send: Any) -> None:
        if start.get("status") == 200:
            rate = self._rate.per_second(counted_tokens(body.decode()))
            step = await self._step(scope)
            body += exposition(os.environ.get(PLAN, ""), "vllm", step, rate).encode()
        headers = [(k, v) for k, v in start.get("headers", []) if k.lower() != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))
        await send({**start, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _step(self, scope: Any) -> Any:
        """What the workers say of the last step, each layer by the first that has it.

        Tensor-parallel ranks run the same, pipeline stages have layers of their own.
        """
        client = scope["app"].state.engine_client
        found = await client.collective_rpc("leanmoe_statistics")
        steps = [step for step in found if step is not None]
        if not steps:
            return None
        layers = zip(*(step["layers"] for step in steps), strict=True)
        return {
            **steps[0],
            "layers": [next((one for one in every if one is not None), None) for every in layers],
        }
