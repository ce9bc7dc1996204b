"""The middleware that adds the plan to vLLM's /metrics, and what a worker answers it."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from leanmoe.plan import Band, Fingerprint, Plan, Rule
from leanmoe.serve.routing_statistics import RoutingStatistics
from leanmoe.serve.vllm.patch import process_plugin
from leanmoe.serve.vllm.plan_metrics import PlanMetrics, PlanWorker
from tests.serve.test_metrics import STEP

STATE = {
    "plan": "a", "plans": ["a", "b"], "epoch": 1, "level": "fast", "changes": 3,
    "reply_tokens": {"fast": 7, "strict": 2}, "degraded_tokens": {"fast": 5},
}  # fmt: skip


class Core:
    """The client of an engine core that serves two plans."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, ...]] = []

    async def call_utility_async(self, *asked: str) -> Any:
        self.asked.append(asked)
        return STATE


class Client:
    engine_core = Core()

    async def collective_rpc(self, method: str) -> list[Any]:
        assert method == "leanmoe_statistics"
        stage = {**STEP, "layers": [None, {"distinct": 9, "activated": 3.0}, None]}
        return [None, STEP, stage]


async def application(_scope: Any, _receive: Any, send: Any) -> None:
    body = b"vllm:generation_tokens_total 9\n"
    headers = [(b"content-length", str(len(body)).encode()), (b"x", b"y")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    await send({"type": "http.response.body", "body": body[:4], "more_body": True})
    await send({"type": "http.response.body", "body": body[4:]})


@pytest.mark.parametrize("path", ["/metrics", "/metrics/", "/v1/models"])
def test_the_middleware_adds_to_metrics_and_to_nothing_else(path: str) -> None:
    sent: list[dict[str, Any]] = []

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    app = SimpleNamespace(state=SimpleNamespace(engine_client=Client()))
    asyncio.run(PlanMetrics(application)({"type": "http", "path": path, "app": app}, None, send))
    body = b"".join(message.get("body", b"") for message in sent)
    length = dict(sent[0]["headers"])[b"content-length"]
    assert int(length) == len(body)
    assert (b"leanmoe_distinct_experts" in body) == path.startswith("/metrics")
    for layer, experts in enumerate((30, 9, 8)):  # one of them another pipeline stage's
        line = b'leanmoe_distinct_experts{layer="%d"} %d\n' % (layer, experts)
        assert (line in body) == path.startswith("/metrics")
    line = b'leanmoe_degraded_tokens_total{tier="fast"} 5\n'
    assert (line in body) == path.startswith("/metrics")
    assert body.startswith(b"vllm:generation_tokens_total 9\n")


def test_a_worker_names_the_band_of_the_last_step(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_plugin(), "model", None)
    assert PlanWorker().leanmoe_statistics() is None
    plan = Plan.banded(
        Fingerprint("Model", 1, 1, 8, 2), (Band(4, (Rule(),)), Band(16, (Rule(top_k=1),)))
    )
    statistics = RoutingStatistics(1, 8)
    statistics.note(0, torch.tensor([[3, 1]] * 5), torch.tensor([[0.7, 0.3]] * 5), None)
    model: Any = SimpleNamespace(plan=plan, statistics=statistics)
    monkeypatch.setattr(process_plugin(), "model", model)
    answer = PlanWorker().leanmoe_statistics()
    assert answer is not None
    assert (answer["rows"], answer["band"], answer["up_to"]) == (5, 1, 16)
    assert answer["layers"] == [{"tokens": 5, "distinct": 2, "activated": 2.0}]
