"""`leanmoe predict --sweep`: deployments, loads and plans compared, and what follows from them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.progress import bar
from leanmoe.models.shape import MoEShape
from leanmoe.plan import Plan
from leanmoe.predict.constants import Constants
from leanmoe.predict.experts.curve_sources import CurvesOf
from leanmoe.predict.hardware.gpus import Gpu
from leanmoe.predict.traffic.service_load import ServiceLoadModel
from leanmoe.predict.traffic.sweep import (
    Limits,
    SweepPoint,
    at_concurrency,
    cheapest,
    deployments,
    front,
    gpus_for,
    sweep,
    within,
)
from leanmoe.results.predict import SweepResults

FULL = "full model"


def sweep_results(
    model: MoEShape,
    plans: dict[str, Plan],
    gpu: Gpu,
    gpus: Sequence[int],
    load: ServiceLoadModel,
    concurrencies: Sequence[int],
    constants: Constants,
    kernel: str,
    curves_of: CurvesOf,
    limits: Limits,
    cross_rank: bool = False,
) -> dict[str, Any]:
    """Everything a sweep found, as JSON values; raises LeanMoeError where nothing fits."""
    limits.check()
    refused: dict[str, str] = {}
    places = deployments(gpu, model, gpus, refused)
    if not places:
        why = next(iter(refused.values()), "no split was tried")
        raise LeanMoeError(f"{model.name} fits none of these GPUs: {why}")
    every: dict[str, Plan | None] = {FULL: None, **plans}
    loads = at_concurrency(load, concurrencies)
    total = len(places) * len(loads) * len(every)
    started = time.monotonic()
    with bar("Comparing", total, "configurations") as advance:
        points = sweep(
            model, every, places, loads, constants, kernel, curves_of, advance, cross_rank
        )
    if not points:
        raise LeanMoeError("at no concurrency do the requests fit beside the weights")
    by_plan = {name: [p for p in points if p.plan == name] for name in every}
    return {
        SweepResults.KIND: SweepResults.VERSION,
        "label": "modelled",
        "how": "steady state of a closed loop, without the event simulator",
        "model": model.name,
        "gpu": gpu.name,
        "load": str(loads[0]).split(", ", 1)[1],
        "kernel": kernel,
        "configurations": total,
        "seconds": time.monotonic() - started,
        "deployments": [str(here) for here in places],
        "refused": refused,
        "points": [point.to_json() for point in points],
        "fronts": {name: [p.to_json() for p in front(mine)] for name, mine in by_plan.items()},
        "cheapest": _cheapest(by_plan, limits),
        "limits": vars(limits),
    }


def _cheapest(by_plan: dict[str, list[SweepPoint]], limits: Limits) -> list[dict[str, Any]]:
    """For each plan the deployment that is fast enough with the fewest GPUs a token."""
    tpot = None if limits.tpot_ms is None else limits.tpot_ms / 1e3
    ttft = None if limits.ttft_ms is None else limits.ttft_ms / 1e3
    best = {name: cheapest(within(mine, tpot, ttft)) for name, mine in by_plan.items()}
    full = best.get(FULL)
    target = full.output_throughput * max(1, 64 // full.gpus) if full else None
    rows = []
    for name, point in best.items():
        if point is None:
            rows.append({"plan": name, "point": None})
            continue
        row: dict[str, Any] = {"plan": name, "point": point.to_json()}
        if limits.price is not None:
            row["cost_a_million"] = point.cost(limits.price)
        if full is not None and target is not None:
            row["target_throughput"] = target
            row["gpus"] = gpus_for(point, target)
            row["gpus_saved"] = gpus_for(full, target) - row["gpus"]
            row["gpus_saved_share"] = 1 - full.per_gpu / point.per_gpu
        rows.append(row)
    return rows
