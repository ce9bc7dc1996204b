"""Results of a sweep are read as they were written, and say deployments in few letters."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from leanmoe.results.predict import CheapestPoint, SweepLimits, SweepResults, SweptPoint

POINT = SweptPoint("full model", 8, 4, 8, 2, 1, 32, 900.0, 200.0, 20.0, 50.0, 112.5)
SWEEP = SweepResults(
    label="modelled",
    how="steady state of a closed loop",
    model="a <model>",
    gpu="h200",
    lengths="1,024 tokens in and out",
    kernel="vllm-triton",
    configurations=1000,
    seconds=2.0,
    deployments=("8 x h200",),
    refused={"1 x h200": "the weights do not fit"},
    points=(POINT,),
    fronts={"full model": (POINT,), "plan": (replace(POINT, plan="plan", per_gpu=130.0),)},
    cheapest=(
        CheapestPoint("full model", POINT, gpus=64, gpus_saved=0),
        CheapestPoint("plan", None),
    ),
    limits=SweepLimits(tpot_ms=30.0, ttft_ms=None, price=None),
)


def test_a_sweep_is_read_as_it_was_written() -> None:
    assert SweepResults.from_json(SWEEP.to_json()) == SWEEP


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({}, "8 GPUs, TP4 EP8 DP2"),
        ({"gpus": 1, "tensor": 1, "expert": 1, "data": 1}, "1 GPUs, TP1"),
        ({"pipeline": 2}, "8 GPUs, TP4 EP8 DP2 PP2"),
    ],
)
def test_a_deployment_in_few_letters(change: dict[str, Any], place: str) -> None:
    assert replace(POINT, **change).place == place


def test_limits_in_words() -> None:
    assert str(SWEEP.limits) == "TPOT at most 30 ms"
    assert str(SweepLimits(30.0, 500.0, 2.0)) == "TPOT at most 30 ms, TTFT at most 500 ms"
    assert str(SweepLimits(None, None, None)) == "No limit was set"
