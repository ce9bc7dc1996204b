"""Prompts beside what the rows left would take."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from benchmarks.vllm.prefill import MoeLayers, entries, show, variants
from benchmarks.vllm.settings import PREFILL_PLANS
from benchmarks.vllm.variants import STOCK
from leanmoe.models.shape import read_shape
from tests.serve.stand_ins import MODEL_CONFIG


def test_each_k_below_the_models_own_is_the_baseline() -> None:
    shape = read_shape(MODEL_CONFIG)
    run = SimpleNamespace(shape=shape, options=SimpleNamespace(prefill_plans=PREFILL_PLANS))
    names = [variant.name for variant in variants(run)]
    assert names == [STOCK, "top_k=1", "top_k=2", "top_k=3", "top_p=0.7", "threshold=0.3"]


def test_a_time_stands_beside_that_of_the_rows_left(capsys: pytest.CaptureFixture[str]) -> None:
    layers = {"top_k=1": [3.0], STOCK: [5.0, 5.0], "top_p=0.7": [4.2]}
    prompt = {name: [10 * value for value in values] for name, values in layers.items()}
    seen = {STOCK: (2.0, 16.0), "top_k=1": (1.0, 12.0), "top_p=0.7": (1.5, 14.0)}
    found = entries(512, {"layers_ms": layers, "prompt_ms": prompt}, seen, 2)
    ragged = found[-1]
    assert ragged["over_rows_left_layers_ms"] == pytest.approx(4.2 / 4)
    assert ragged["gain_prompt_ms"] == pytest.approx(50 / 42, rel=1e-3)
    assert [entry["over_rows_left_layers_ms"] for entry in found[:2]] == [1, 1]
    show(found)
    assert "top_p=0.7" in capsys.readouterr().out


def test_rows_live_as_long_as_what_was_captured_of_them() -> None:
    weight = SimpleNamespace(device="cpu")
    layer = SimpleNamespace(routed_experts=SimpleNamespace(w13_weight=weight))
    layers = MoeLayers(SimpleNamespace(moe_layers=[layer]), 4)
    assert layers._hidden(3) is layers._hidden(3)
    assert layers._hidden(3).shape == (3, 4)
    layers.forget()
    assert not layers._rows
