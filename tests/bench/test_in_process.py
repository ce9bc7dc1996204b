"""A load on a real model in this process."""

from __future__ import annotations

import pytest
import torch

from leanmoe.bench.continuous import Room
from leanmoe.bench.in_process import Comparison, InProcess, cache_bytes, require_memory
from leanmoe.bench.measurement import Measurement, Timeline
from leanmoe.bench.prompts import Supply
from leanmoe.bench.settings import BenchSettings, Lengths
from leanmoe.core.errors import LeanMoeError
from leanmoe.plan import Plan, Rule
from leanmoe.runtime import shape_of
from tests import tiny

SETTINGS = BenchSettings(
    concurrency=(1, 3),
    input_len=Lengths(4, 12),
    output_len=Lengths(2, 6),
    repeats=2,
    num_prompts=5,
)


def test_any_family_is_served() -> None:
    model = tiny.build("qwen3_moe")
    supply = Supply([n % 60 for n in range(500)], Lengths(4, 8), Lengths(2, 4))
    plans = {"two": Plan.uniform(shape_of(model).fingerprint(), Rule(top_k=2))}
    runner = InProcess(model, "tiny", plans, SETTINGS, supply)
    load = SETTINGS.loads()[1]
    with torch.inference_mode(), runner.at(load) as run_one:
        outcome = run_one("two", load, supply.draw(load, 0), "seed")
        routing = runner.routing(load, run_one)
    assert len(outcome.timelines) == 5
    assert routing["two"]["experts_a_token"] == 2
    assert routing["full"]["experts_a_token"] == 4


def run_of(throughput: float) -> Measurement:
    tokens = tuple((n + 1) / throughput for n in range(8))
    return Measurement.of([Timeline(0.0, tokens, 4, 8)])


def test_the_ratio_is_of_the_variant_that_is_named() -> None:
    speeds = {"full": 100.0, "plan": 110.0, "stock": 50.0}
    runs = {name: {n: run_of(v + n) for n in range(3)} for name, v in speeds.items()}
    found = Comparison(SETTINGS.loads()[0], runs, SETTINGS.looks, ()).to_json("plan")
    assert found["ratio"]["median"] == pytest.approx(1.1, rel=0.01)
    for name, speed in speeds.items():
        assert found["variants"][name]["output_throughput"] == pytest.approx(speed + 1)
        assert found["variants"][name]["runs"] == pytest.approx([speed, speed + 1, speed + 2])


def test_a_cache_that_cannot_fit_is_refused() -> None:
    model = tiny.build("qwen3_moe")
    room = Room(4, 60, 64)
    assert cache_bytes(model, room) == 2 * (4 + 4) * 64 * 4 * 4 * 8 * 4
    with pytest.raises(LeanMoeError, match="GB for keys and values"):
        require_memory(model, Room(4096, 1_000_000, 2_000_000))
