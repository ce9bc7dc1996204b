"""The plan among SGLang's metrics."""

from __future__ import annotations

import sys
from types import ModuleType, SimpleNamespace

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.serve.sglang.metrics import show_plan


def test_the_plan_is_a_gauge_where_sglang_keeps_metrics(monkeypatch: pytest.MonkeyPatch) -> None:
    set_to: list[object] = []

    class Gauge:
        def __init__(self, name: str, *_: object, multiprocess_mode: str) -> None:
            set_to.extend((name, multiprocess_mode))

        def labels(self, **labels: str) -> Gauge:
            set_to.append(labels)
            return self

        def set(self, value: float) -> None:
            set_to.append(value)

    client = ModuleType("prometheus_client")
    client.Gauge = Gauge  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "prometheus_client", client)
    show_plan("plan.json", SimpleNamespace(enable_metrics=False))
    assert set_to == []
    show_plan("plan.json", SimpleNamespace(enable_metrics=True))
    assert set_to == ["leanmoe_plan", "max", {"plan": "plan.json", "engine": "sglang"}, 1]
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    with pytest.raises(LeanMoeError, match="--enable-metrics needs prometheus_client"):
        show_plan("plan.json", SimpleNamespace(enable_metrics=True))
