"""The path by which a server's plan is changed: its key, its answers, and what it refuses."""

from __future__ import annotations

import asyncio
import json
from types import SimpleNamespace
from typing import Any

import pytest

from leanmoe.serve.vllm.plan_switch import MOST_BYTES, PlanSwitch
from tests.serve.vllm.test_plan_metrics import STATE, Core

KEY = "of the test"


def ask(
    monkeypatch: pytest.MonkeyPatch,
    body: bytes = b"",
    method: str = "POST",
    key: str | None = KEY,
    server_key: str = KEY,
) -> tuple[int, Any, list[Any]]:
    """Status and answer, and what the engine core was asked; 404 is the application's own."""
    monkeypatch.setenv("LEANMOE_PLAN_KEY", server_key)
    sent: list[dict[str, Any]] = []
    parts = [body[: len(body) // 2], body[len(body) // 2 :]]

    async def application(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 404, "headers": []})
        await send({"type": "http.response.body", "body": b"{}"})

    async def receive() -> dict[str, Any]:
        return {"body": parts.pop(0), "more_body": bool(parts)}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    core = Core()
    app = SimpleNamespace(state=SimpleNamespace(engine_client=SimpleNamespace(engine_core=core)))
    headers = [] if key is None else [(b"authorization", f"Bearer {key}".encode())]
    scope = {
        "type": "http", "path": "/leanmoe/plan", "method": method, "headers": headers, "app": app
    }  # fmt: skip
    asyncio.run(PlanSwitch(application)(scope, receive, send))
    return sent[0]["status"], json.loads(sent[1]["body"]), core.asked


def test_a_plan_is_changed_by_its_name(monkeypatch: pytest.MonkeyPatch) -> None:
    status, answer, asked = ask(monkeypatch, b'{"plan": "b"}')
    assert (status, answer) == (200, STATE)
    assert asked[-1] == ("leanmoe_change_plan", "b")
    status, answer, asked = ask(monkeypatch, method="GET")
    assert (status, answer, asked) == (200, STATE, [("leanmoe_control",)])


def test_without_its_own_key_the_path_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask(monkeypatch, b'{"plan": "b"}', server_key="")[0] == 404


@pytest.mark.parametrize("key", [None, "", "of the tesT", KEY + " "])
def test_whoever_has_not_the_key_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, key: str | None
) -> None:
    for method in ("POST", "GET", "PUT"):
        status, _, asked = ask(monkeypatch, b'{"plan": "b"}', method, key)
        assert (status, asked) == (401, [])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "the body must be like"),
        (b"\xff\xfe", "the body must be like"),
        (b"[1]", "the body must be like"),
        (b'{"plan": 1}', "the body must be like"),
        (b'{"plan": "' + b"x" * MOST_BYTES + b'"}', "the body must be like"),
        (b'{"plan": "c"}', "the plan 'c' was not given at start: a, b were"),
    ],
)
def test_what_is_no_plan_of_the_server_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, body: bytes, message: str
) -> None:
    status, answer, asked = ask(monkeypatch, body)
    assert status == 400
    assert message in answer["error"]
    assert "\n" not in answer["error"]
    assert all(method == "leanmoe_control" for method, *_ in asked)


def test_other_methods_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    assert ask(monkeypatch, b"", "DELETE")[0] == 405
