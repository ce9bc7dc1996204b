"""The entry point that SGLang calls."""

from __future__ import annotations

import pytest

from leanmoe.serve.sglang import plugin


def test_a_plan_that_cannot_run_ends_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """SGLang catches what a plugin raises and goes on: it does not catch this."""
    monkeypatch.setenv("LEANMOE_PLAN", "no/such/plan.json")
    with pytest.raises(SystemExit, match="leanmoe: "):
        plugin.activate()
    monkeypatch.setenv("LEANMOE_BATCH_SCOPE", "all")
    with pytest.raises(SystemExit, match="LEANMOE_BATCH_SCOPE is 'all': SGLang cannot"):
        plugin.activate()
    monkeypatch.delenv("LEANMOE_PLAN")
    plugin.activate()
