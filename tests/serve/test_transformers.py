"""The plan in a model that Transformers' server loads, up to the point where it listens."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from leanmoe.core.errors import LeanMoeError
from leanmoe.plan import Band, Plan, Rule
from leanmoe.runtime.model import shape_of
from leanmoe.serve import transformers as server
from leanmoe.serve.transformers import NO_END, PlannedServer, cache_share, widen_cached_heads
from tests.tiny import build


def served(plan_of: Any) -> tuple[PlannedServer, Any]:
    """A tiny model as the server has it after loading, under the plan that is made for it."""
    model = build("qwen3_moe")
    shape = shape_of(model).fingerprint()
    planned = PlannedServer(plan_of(shape), "plan.json")
    return planned, planned.apply(model)


def test_metrics_say_what_the_last_step_ran() -> None:
    planned, model = served(
        lambda shape: Plan.banded(shape, (Band(8, (Rule(top_k=2),) * shape.moe_layers),))
    )
    before = planned.metrics()
    assert 'leanmoe_plan{plan="plan.json",engine="transformers"} 1' in before
    assert "leanmoe_step_rows" not in before
    with torch.no_grad():
        model(torch.tensor([[3, 4, 5]]))
    after = planned.metrics()
    assert "leanmoe_step_rows 3" in after
    assert 'leanmoe_band{band="0",up_to="8"} 1' in after
    assert 'leanmoe_activated_experts{layer="0"} 2' in after
    assert "leanmoe_generation_tokens_total" in after


def test_rows_that_nobody_reads_do_not_decide_the_band_under_prompt_rules() -> None:
    def plan(shape: Any) -> Plan:
        rules = (Rule(top_k=2),) * shape.moe_layers
        return Plan.banded(
            shape, (Band(2, rules), Band(64, rules)), (Rule(top_k=1),) * shape.moe_layers
        )

    planned, model = served(plan)
    with torch.no_grad():
        model(torch.tensor([[3, 4, 5, 6]]), logits_to_keep=torch.tensor([3]))
    assert 'leanmoe_band{band="0",up_to="2"} 1' in planned.metrics()


def test_a_cached_head_is_as_wide_as_its_keys() -> None:
    config = SimpleNamespace(qk_head_dim=24, v_head_dim=24, head_dim=8)
    widen_cached_heads(config)
    assert config.head_dim == 24
    plain = SimpleNamespace(head_dim=8)
    widen_cached_heads(plain)
    assert plain.head_dim == 8


def test_a_model_whose_caches_cannot_be_held_is_refused() -> None:
    model = build("qwen3_next")
    reason = "no cache for layers of linear_attention: serve it with vLLM"
    with pytest.raises(LeanMoeError, match=reason):
        PlannedServer(Plan(shape_of(model).fingerprint()), "").apply(model)


def test_a_cpus_cache_takes_a_gigabyte_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    share = cache_share()
    assert share is not None
    assert 0 < share <= 0.5
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert cache_share() is None


def test_requests_may_use_the_served_name_and_ask_for_a_full_length() -> None:
    class Handler:
        def _resolve_model(self, body: dict[str, Any]) -> Any:
            return body["model"], None, None

        def _validate_request(self, body: dict[str, Any]) -> None:
            assert "ignore_eos" not in body

        def _build_generation_config(self, body: dict[str, Any]) -> Any:
            del body
            return SimpleNamespace(eos_token_id=2)

    with server._replaced(*server._request_changes(Handler, "a/folder", "name")):
        handler = Handler()
        assert handler._resolve_model({"model": "name"})[0] == "a/folder"
        assert handler._resolve_model({"model": "other"})[0] == "other"
        handler._validate_request({"ignore_eos": True})
        assert handler._build_generation_config({"ignore_eos": True}).eos_token_id == NO_END
        assert handler._build_generation_config({}).eos_token_id == 2
    with pytest.raises(AssertionError):
        Handler()._validate_request({"ignore_eos": True})


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ({"prompt": "hello", "max_tokens": 4}, None),
        ({"prompt": "hello", "max_tokens": 0}, "max_tokens is 0"),
        ({"prompt": "hello", "max_tokens": "many"}, "max_tokens is 'many'"),
        ({"messages": [{"role": "user", "content": "hi"}]}, "no chat template"),
        ({"input": "hi"}, "no chat template"),
    ],
)
def test_what_would_end_the_server_is_that_requests_error(
    body: dict[str, Any], reason: str | None
) -> None:
    found = server.bad_request(body, SimpleNamespace(chat_template=None))
    assert found is None if reason is None else found is not None and reason in found


def test_a_missing_package_is_named_and_not_transformers_version() -> None:
    assert "needs opentelemetry" in str(server._missing("opentelemetry.trace"))
    assert "has no server" in str(server._missing("transformers.cli.serve"))


def test_a_request_that_the_cache_cannot_hold_is_that_requests_error() -> None:
    exceptions = pytest.importorskip("fastapi").HTTPException

    class Manager:
        def __init__(self) -> None:
            cache = SimpleNamespace(max_tokens_read=64)
            self._cb = SimpleNamespace(batch_processor=SimpleNamespace(cache=cache))

        def generate_streaming(self, *_: Any, request_id: str) -> str:
            return request_id

        generate_non_streaming = generate_streaming

    def ask(prompt: int, reply: int | None, limit: int | None = None) -> Any:
        text = SimpleNamespace(max_position_embeddings=limit)
        model = SimpleNamespace(config=SimpleNamespace(get_text_config=lambda: text))
        asked = (model, None, {"input_ids": [1] * prompt}, SimpleNamespace(max_new_tokens=reply))
        return Manager().generate_streaming(*asked, request_id="its own")

    with server._replaced(*server._length_changes(Manager)):
        assert ask(60, 4) == ask(64, None) == "its own"
        with pytest.raises(exceptions, match="this server takes 64 together"):
            ask(60, 5)
        with pytest.raises(exceptions, match="the prompt has no tokens"):
            ask(0, 4)
        with pytest.raises(exceptions, match="this server takes 32 together"):
            ask(30, 4, 32)


def test_a_cache_that_could_not_be_made_is_an_error() -> None:
    status = SimpleNamespace(fatal_error=RuntimeError("out of memory"))
    batching = SimpleNamespace(batch_processor=None, background_thread_status=status)
    with pytest.raises(LeanMoeError, match="did not start: out of memory"):
        server.longest_request(None, batching)
