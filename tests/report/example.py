"""Made-up results of the right form, for tests of the page; no figure here is a measurement."""

from __future__ import annotations

import random
from typing import Any

from leanmoe.results.tune import TuneResults

RATIO = {"median": 1.15, "low": 1.1, "high": 1.2, "repeats": 5}
LAYERS, EXPERTS, TOP_K = 6, 64, 8
FINGERPRINT = {
    "architecture": "DeepseekV3ForCausalLM",
    "layers": 7,
    "moe_layers": LAYERS,
    "experts": EXPERTS,
    "top_k": TOP_K,
}


def results(seed: int = 0, accepted: bool = True) -> dict[str, Any]:
    """A results.json as a tune run writes it."""
    draw = random.Random(seed)
    loads = [(1, 128, 32), (8, 128, 32), (32, 256, 32)]
    rules: list[dict[str, Any]] = [
        {"top_k": 6},
        {},
        {"threshold": 0.3},
        {"guaranteed": 3},
        {"budget": 40},
        {"top_p": 0.9},
    ]
    return {
        "leanmoe_results": 1,
        "provenance": {
            "date": "2026-01-01T00:00:00+00:00",
            "hardware": "a processor",
            "cores": 2,
            "versions": {"torch": "2.13.0"},
            "commit": "abc",
            "seed": 0,
            "command": "leanmoe tune reference",
        },
        "model": {
            "name": "reference <model>",
            "fingerprint": FINGERPRINT,
            "parameters": 17_000_000,
            "active_parameters": 6_000_000,
            "dtype": "float32",
            "experts_implementation": "leanmoe experts_cpu",
        },
        "settings": {"margin": 0.005, "confidence": 0.95},
        "text": {
            "source": "prose",
            "calibration": {"documents": 200, "tokens": 200_000},
            "heldout": {"documents": 100, "tokens": 50_000},
        },
        "profile": {
            "label": "measured",
            "tokens": 200_000,
            "documents": 200,
            "layers": [_layer(n, draw) for n in range(LAYERS)],
        },
        "sensitivity": {"label": "measured", "tokens": 20_000, "candidates": []},
        "fronts": [
            {
                "concurrency": c,
                "points": [_point(n, n == 2 and accepted, rules, draw) for n in range(5)],
            }
            for c, _, _ in loads
        ],
        "strategies": [_strategies(8, draw)],
        "gain": [_gain(*load, draw) for load in loads],
        "verdicts": [
            {
                "concurrency": c,
                "up_to": c,
                "accepted": accepted and c > 1,
                "loss": _loss(0.003, draw) if accepted else None,
                "gain": {"median": 1.15, "low": 1.1, "high": 1.2, "repeats": 5}
                if accepted
                else None,
                "reason": "the fastest plan within the margin",
            }
            for c, _, _ in loads
        ],
        "notes": ["the plan loses at one request at once"],
        "seconds": {"profile": 60.0},
        "peak_memory_bytes": 2_000_000_000,
    }


def tune_results(
    accepted: bool = True, confidence: float = 0.95, with_budget: bool = False
) -> TuneResults:
    """The results as reading them gives them; `with_budget` adds those of a memory budget."""
    value = results(accepted=accepted)
    value["settings"]["confidence"] = confidence
    if with_budget:
        value["total_or_activated"] = totals()
    return TuneResults.from_json(value)


def totals(seed: int = 0) -> list[dict[str, Any]]:
    """Rows of "total_or_activated", as a run with a memory budget writes them."""
    draw = random.Random(seed)
    row = {"concurrency": 8, "budget": "75%", "memory": 0.76, "time": 0.9}
    return [
        {**row, "way": way, "loss": _loss(0.01, draw)}
        for way in ("pruning", "skipping", "pruning and skipping")
    ]


def plan() -> dict[str, Any]:
    """A plan.json that goes with it."""
    return {
        "leanmoe_plan": 1,
        "model": FINGERPRINT,
        "bands": [
            {"up_to": 2, "rules": [{}] * LAYERS},
            {"up_to": 16, "rules": [{"top_k": 6}] * LAYERS},
            {"up_to": None, "rules": [{"threshold": 0.2, "top_k": 7}] * LAYERS},
        ],
    }


def _layer(number: int, draw: random.Random) -> dict[str, Any]:
    use = [draw.random() for _ in range(EXPERTS)]
    return {
        "layer": number,
        "decoder_layer": number + 1,
        "use": [u / sum(use) for u in use],
        "mass": [((j + 1) / TOP_K) ** 0.7 for j in range(TOP_K)],
        "distinct": [
            {
                "tokens": 2**j,
                "documents": 1,
                "error": 0.0,
                "measured": 0.8 * EXPERTS * (1 - (1 - 1 / 8) ** 2**j),
                "uniform": EXPERTS * (1 - (1 - 1 / 8) ** 2**j),
            }
            for j in range(8)
        ],
    }


def _loss(ratio: float, draw: random.Random) -> dict[str, Any]:
    width = 0.001 + 0.001 * draw.random()
    return {
        "ratio": ratio,
        "low": ratio - width,
        "high": ratio + width,
        "upper_bound": ratio + 0.8 * width,
        "documents": 100,
    }


def _point(
    number: int, chosen: bool, rules: list[dict[str, Any]], draw: random.Random
) -> dict[str, Any]:
    return {
        "name": f"point {number}",
        "strategy": "leanmoe",
        "predicted_loss": 0.01,
        "modelled_time": 1 - 0.1 * number,
        "slots": 8 - number,
        "slots_per_layer": [8 - number] * LAYERS,
        "distinct": 40.0 - 5 * number,
        "loss": _loss(0.001 * number**2, draw),
        "accepted": chosen,
        "reason": "within the margin",
        "chosen": chosen,
        "rules": rules,
        "prompt": [],
    }


def _strategies(concurrency: int, draw: random.Random) -> dict[str, Any]:
    names = ["uniform", "bhep", "threshold", "top_p", "lexi", "guaranteed", "budget", "leanmoe"]
    return {
        "concurrency": concurrency,
        "budget": {"kind": "distinct", "value": 30.0},
        "rows": [
            {
                "strategy": name,
                "title": name,
                "source": "arXiv 2505.03531",
                "slots": 6.0,
                "distinct": 30.0 + draw.random(),
                "loss": _loss(0.01 + 0.01 * draw.random(), draw),
                "rules": [],
                "against": {"difference": 0.001, "low": 0.0005, "high": 0.002},
            }
            for name in names
        ],
    }


def _gain(concurrency: int, inputs: int, outputs: int, draw: random.Random) -> dict[str, Any]:
    def spread(median: float) -> dict[str, float]:
        return {"mean": median, "median": median, "p90": median * 1.1, "p99": median * 1.2}

    base = 100 * concurrency**0.6
    return {
        "concurrency": concurrency,
        "input_tokens": inputs,
        "output_tokens": outputs,
        "requests": 24,
        "label": "measured",
        "variants": {
            name: {
                "duration": 10.0,
                "request_throughput": base,
                "output_throughput": base * factor,
                "total_token_throughput": 9 * base,
                "itl_ms": spread(12 / factor),
                "runs": [base * factor] * 5,
                "ttft_ms": spread(50),
                "tpot_ms": spread(12 / factor),
                "e2el_ms": spread(400 / factor),
            }
            for name, factor in (("full", 1.0), ("plan", 1.1 + 0.1 * draw.random()))
        },
        "ratio": {"median": 1.12, "low": 1.08, "high": 1.17, "repeats": 5},
    }
