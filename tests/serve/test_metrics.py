"""Prometheus' text, and the middleware that adds it to vLLM's."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from leanmoe.serve.metrics import TokenRate, counted_tokens, exposition
from leanmoe.serve.vllm.metrics import PlanMetrics

STEP = {
    "rows": 12,
    "band": 0,
    "up_to": 16,
    "layers": [{"distinct": 30, "activated": 4.5}, None, {"distinct": 8, "activated": 8.0}],
}


def test_every_gauge_is_named_and_labelled() -> None:
    text = exposition('a"plan', "vllm", STEP, 120.0)
    assert 'leanmoe_plan{plan="a\\"plan",engine="vllm"} 1' in text
    assert 'leanmoe_band{band="0",up_to="16"} 1' in text
    assert 'leanmoe_distinct_experts{layer="0"} 30' in text
    assert 'leanmoe_activated_experts{layer="2"} 8' in text
    assert 'layer="1"' not in text  # another pipeline stage's
    assert "leanmoe_generation_tokens_per_second 120" in text
    assert text.count("# TYPE") == 6


def test_nothing_ran_says_only_which_plan() -> None:
    assert exposition("p", "vllm", None, None).count("# TYPE") == 1
    assert 'band="full model"' in exposition("p", "vllm", {**STEP, "band": None}, None)


def test_the_rate_is_that_since_the_last_scrape() -> None:
    rate = TokenRate()
    assert rate.per_second(100, now=1.0) is None
    assert rate.per_second(150, now=3.0) == 25
    assert rate.per_second(0, now=4.0) == 0  # the engine was started anew


def test_counters_are_summed_over_labels() -> None:
    name = "vllm:generation_tokens_total"
    text = f'# HELP x\n{name}{{engine="0"}} 5.0\n{name}{{engine="1"}} 7\n'
    assert counted_tokens(text) == 12


class Client:
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
    assert body.startswith(b"vllm:generation_tokens_total 9\n")
