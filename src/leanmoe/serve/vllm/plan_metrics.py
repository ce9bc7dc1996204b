"""The plan in vLLM's /metrics: what its workers answer, and what adds their answers to vLLM's own.

`PlanWorker` is given to vLLM as --worker-extension-cls, `PlanMetrics` as --middleware.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from typing import Any

from leanmoe.core.environment import PLAN
from leanmoe.serve.metrics import exposition
from leanmoe.serve.vllm.engine_control import STATE

PATH = "/metrics"
METHOD = "leanmoe_statistics"


class PlanWorker:
    """Methods that vLLM adds to its workers and calls by `collective_rpc`."""

    def leanmoe_statistics(self) -> dict[str, Any] | None:
        """What the last step ran, per MoE layer; None without a plan or LEANMOE_STATISTICS=1."""
        from leanmoe.serve.vllm.patch import process_plugin
        from leanmoe.serve.vllm.rule_rows import band_ends

        model = process_plugin().model
        if model is None or model.statistics is None:
            return None
        step = model.statistics.read()
        if len(model.plan.levels) > 1:  # whose bands end where any level's does
            ends = band_ends(model.plan)
            place = bisect_left(ends, max(1, step.rows))
            up_to = ends[place] if place < len(ends) else None
            return {**step.to_json(), "band": place, "up_to": up_to}
        band = model.plan.band_for(max(1, step.rows))
        number = None if band is None else model.plan.bands.index(band)
        return {**step.to_json(), "band": number, "up_to": None if band is None else band.up_to}


class PlanMetrics:
    """An ASGI middleware: asks the workers what the last step ran and adds it to vLLM's answer."""

    def __init__(self, app: Any) -> None:
        self._app = app

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
            step, control = await self._step(scope), await ask_engine(scope, STATE)
            plan = os.environ.get(PLAN, "")
            body += exposition(plan, "vllm", step, control=control).encode()
        headers = [(k, v) for k, v in start.get("headers", []) if k.lower() != b"content-length"]
        headers.append((b"content-length", str(len(body)).encode()))
        await send({**start, "headers": headers})
        await send({"type": "http.response.body", "body": body})

    async def _step(self, scope: Any) -> Any:
        """What the workers say of the last step, each layer by the first that has it.

        Tensor-parallel ranks run the same, pipeline stages have layers of their own.
        """
        client = scope["app"].state.engine_client
        answers = await client.collective_rpc(METHOD)
        steps = [step for step in answers if step is not None]
        if not steps:
            return None
        layers = zip(*(step["layers"] for step in steps), strict=True)
        return {
            **steps[0],
            "layers": [next((one for one in every if one is not None), None) for every in layers],
        }


async def ask_engine(scope: Any, method: str, *arguments: str) -> Any:
    """What the engine core answers to a method of `EngineControl`'s; the first of several cores.

    All data-parallel ranks' cores are asked, each has its own counts and its own level.
    """
    client = scope["app"].state.engine_client
    return await client.engine_core.call_utility_async(method, *arguments)
