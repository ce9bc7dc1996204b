"""The entry point that vLLM calls."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.plan import Fingerprint, Plan
from leanmoe.serve.plugin_options import PluginOptions
from leanmoe.serve.vllm import plugin
from leanmoe.serve.vllm.control_hooks import ControlHooks
from leanmoe.serve.vllm.patch import VllmPlugin


@pytest.fixture(autouse=True)
def _installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("leanmoe.core.installed_vllm.check_plugin", lambda: None)


PLAN = Plan(Fingerprint("Model", 1, 1, 8, 2))


def test_without_a_plan_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LEANMOE_PLAN", raising=False)
    monkeypatch.setenv("LEANMOE_BATCH_SCOPE", "world")
    plugin.activate()


def test_a_value_that_is_not_allowed_is_refused_as_the_plugin_starts(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LEANMOE_PLAN", "plan.json")
    for name, value in (("LEANMOE_BATCH_SCOPE", "world"), ("LEANMOE_EXPERTS", "fast")):
        with monkeypatch.context() as variables:
            variables.setenv(name, value)
            with pytest.raises(LeanMoeError, match=f"{name} is '{value}': it must be"):
                plugin.activate()


def test_the_plan_and_the_options_reach_the_plugin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    monkeypatch.setattr(VllmPlugin, "start", lambda _self, *given: started.append(given))
    PLAN.save(tmp_path / "plan.json")
    monkeypatch.setenv("LEANMOE_PLAN", str(tmp_path / "plan.json"))
    monkeypatch.setenv("LEANMOE_STATISTICS", "1")
    plugin.activate()
    options = PluginOptions(str(tmp_path / "plan.json"), collect_stats=True)
    assert started == [(PLAN, options)]


def test_both_start_with_the_options_and_the_plan_of_tiers_is_the_controls(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[Any] = []
    monkeypatch.setattr(ControlHooks, "start", lambda _self, *given: started.append(given))
    monkeypatch.delenv("LEANMOE_PLAN", raising=False)
    plugin.control()
    assert not started
    monkeypatch.setenv("LEANMOE_PLAN", str(tmp_path / "plan.json"))
    plugin.control()
    assert started == [(PluginOptions(str(tmp_path / "plan.json")),)]
    monkeypatch.setenv("LEANMOE_TIERS", "1")
    plugin.activate()  # leaves a plan that is not there unread
    plugin.control()
    assert started[-1][0].has_tiers
