"""The page of a bench: self-contained, says losses, ties and what is missing."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from leanmoe.core.errors import LeanMoeError
from leanmoe.report.bench_page import bench_page, headline
from leanmoe.results.bench import BenchResults
from tests.report.example import FINGERPRINT


def run(speed: float, load: int) -> dict[str, float]:
    return {
        "output_throughput": 100 * load**0.5 * speed,
        "total_token_throughput": 900.0,
        "request_throughput": 3.0,
        "median_ttft_ms": 50 / speed,
        "median_tpot_ms": 10 * load**0.5 / speed,
        "p99_tpot_ms": 20.0,
    }


def bench(speed: float = 1.1, spread: float = 0.02, rate: bool = False) -> dict[str, Any]:
    """Made-up results of the right form; no figure here is a measurement."""
    ratio = {"median": speed, "low": speed - spread, "high": speed + spread, "repeats": 5}
    times = {"median": 1 / speed, "low": 1 / speed - 0.02, "high": 1 / speed + 0.02, "repeats": 5}
    return {
        "leanmoe_bench": 1,
        "complete": True,
        "stopped": None,
        "engine": "made up",
        "devices": {"kind": "GPU", "count": 2},
        "model": {"name": "a <model>"},
        "provenance": {
            "date": "2026-01-01",
            "hardware": "a processor",
            "cores": 2,
            "versions": {"torch": "2.13.0"},
            "commit": "abc",
            "seed": 0,
            "command": "leanmoe bench",
        },
        "settings": {
            "input_len": "8",
            "output_len": "8",
            "goodput": {"ttft": 500.0},
            "confidence": 0.95,
        },
        "text": "prose",
        "variants": [
            {"name": "full", "plan": None},
            {
                "name": "plan",
                "plan": {
                    "leanmoe_plan": 1,
                    "model": {**FINGERPRINT, "moe_layers": 2},
                    "bands": [{"up_to": None, "rules": [{"guaranteed": 3}] * 2}],
                },
            },
        ],
        "loads": [
            {
                "max_concurrency": None if rate else load,
                "request_rate": float(load) if rate else None,
                "num_prompts": 10,
                "label": "measured",
                "runs": {"full": [run(1, load)] * 5, "plan": [run(speed, load)] * 5},
                "median": {"full": run(1, load), "plan": run(speed, load)},
                "gain": {"plan": {"output_throughput": ratio, "median_tpot_ms": times}},
                "routing": {"plan": {"distinct_experts_a_step": 20.5}},
            }
            for load in (1, 8)
        ],
        "notes": [],
    }


def read(value: dict[str, Any]) -> BenchResults:
    """Results as reading them gives them."""
    return BenchResults.from_json(value)


def test_one_file_that_asks_no_network() -> None:
    html = bench_page(read(bench()))
    assert re.findall(r"<script[^>]*\bsrc=|<link\b|<img\b|@import", html) == []
    assert html.count("plotly.js v") == 1
    outside = re.sub(r"<script.*?</script>", "", html, flags=re.S)
    assert not re.findall(r"https?://", outside)
    for title in ("Gain against load", "Throughput against load", "What one user gets", "What ran"):
        assert f"<h2>{title}" in html
    assert "a &lt;model&gt;" in outside
    assert "guaranteed 3" in outside
    assert "20.5" in outside


def test_the_headline_says_gain_loss_and_tie() -> None:
    assert "plan +10.0% at concurrency 1 (95% interval +8.0% to +12.0%)" in headline(read(bench()))
    assert "plan -10.0%" in headline(read(bench(0.9)))
    assert "no difference shown" in headline(read(bench(1.01)))
    assert "TPOT plan -9.1%" in headline(read(bench(rate=True)))


def test_the_confidence_shown_is_the_one_asked_for() -> None:
    asked = bench()
    asked["settings"]["confidence"] = 0.8
    html = re.sub(r"<script.*?</script>", "", bench_page(read(asked)), flags=re.S)
    assert "95%" not in html
    assert "(80% interval +8.0% to +12.0%)" in html
    assert "bars are 80% intervals" in html


def test_an_incomplete_bench_says_so() -> None:
    stopped = {**bench(), "complete": False, "stopped": "the server <died>"}
    assert "Incomplete: the server &lt;died&gt;" in bench_page(read(stopped))
    busy = {**bench(), "notes": ["The machine was busy."]}
    assert bench_page(read(busy)).index("The machine was busy.") < bench_page(read(busy)).index(
        "Gain against"
    )
    nothing = {**stopped, "loads": []}
    assert "no gain is claimed" in bench_page(read(nothing))


def test_a_variant_without_runs_yet_is_left_blank() -> None:
    half = bench()
    half["loads"][1]["runs"]["plan"] = []
    half["loads"][1]["median"]["plan"] = {}
    half["loads"][1]["gain"] = {}
    assert "<h2>Every load" in bench_page(read(half))


@pytest.mark.parametrize(
    ("change", "message"),
    [({"leanmoe_bench": 9}, "schema version 9"), ({"loads": None}, "loads is missing")],
)
def test_results_of_another_form_are_refused(
    tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    path = tmp_path / "results.json"
    whole = {**bench(), **change}
    path.write_text(
        json.dumps({k: v for k, v in whole.items() if v is not None or k not in change})
    )
    with pytest.raises(LeanMoeError, match=message):
        BenchResults.load(path)
