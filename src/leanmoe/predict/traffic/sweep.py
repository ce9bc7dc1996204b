"""`leanmoe predict --sweep`: deployments, loads and plans compared.

The Pareto front, and the cheapest deployment that is fast enough. It uses the steady state
(`closed_loop`), not the simulator: a thousand configurations in seconds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.progress import bar
from leanmoe.models.shape import MoEShape
from leanmoe.plan import Plan
from leanmoe.predict.experts.curves import Activation
from leanmoe.predict.hardware.gpus import Gpu
from leanmoe.predict.prediction import Basis, remaining
from leanmoe.predict.step.deployment import Deployment
from leanmoe.predict.step.step_time import StepTime
from leanmoe.predict.traffic.closed_loop import closed_loop
from leanmoe.predict.traffic.service_load import ServiceLoadModel
from leanmoe.results.predict import CheapestPoint, SweepLimits, SweepResults, SweptPoint

FULL = "full model"
SECONDS_AN_HOUR = 3600.0
LEAST_WIDTH = 64
"""The least width of an expert on one GPU: narrower ones are measured nowhere and wasteful."""
FEWEST_GPUS = 64
"""GPUs of the full model that what a plan saves is counted against, at least."""


def sweep(
    model: MoEShape,
    plans: Mapping[str, Plan],
    gpu: Gpu,
    gpus: Sequence[int],
    loads: Sequence[ServiceLoadModel],
    basis: Basis,
    limits: SweepLimits,
) -> SweepResults:
    """Compares the full model and the plans on every split of these numbers of GPUs.

    Raises LeanMoeError where nothing fits.
    """
    refused: dict[str, str] = {}
    places = deployments(gpu, model, gpus, refused)
    if not places:
        why = next(iter(refused.values()), "no split was tried")
        raise LeanMoeError(f"{model.name} fits none of these GPUs: {why}")
    every: dict[str, Plan | None] = {FULL: None, **plans}
    total = len(places) * len(loads) * len(every)
    started = time.monotonic()
    with bar("Comparing", total, "configurations") as advance:
        points = points_of(model, every, places, loads, basis, advance)
    if not points:
        raise LeanMoeError("at no concurrency do the requests fit beside the weights")
    by_plan = {name: [point for point in points if point.plan == name] for name in every}
    return SweepResults(
        label="modelled",
        how="steady state of a closed loop, without the event simulator",
        model=model.name,
        gpu=gpu.name,
        lengths=str(loads[0]).split(", ", 1)[1],
        kernel=basis.kernel,
        configurations=total,
        seconds=time.monotonic() - started,
        deployments=tuple(str(here) for here in places),
        refused=refused,
        points=tuple(points),
        fronts={name: tuple(front(mine)) for name, mine in by_plan.items()},
        cheapest=tuple(_savings(by_plan, limits)),
        limits=limits,
    )


def deployments(
    gpu: Gpu, model: MoEShape, gpus: Sequence[int], refused: dict[str, str] | None = None
) -> list[Deployment]:
    """Every split of these numbers of GPUs that the model allows and its weights fit.

    Tensor parallelism stays within a node; experts are split whole (expert parallelism) or in
    width; pipelines are of whole nodes. What is refused is noted with why.
    """
    allowed = []
    notes = {} if refused is None else refused
    for count in gpus:
        for tensor in _divisors(count):
            if tensor > gpu.per_node:
                continue
            for data in _divisors(count // tensor):
                pipeline = count // tensor // data
                if pipeline > 1 and (data > 1 or tensor < min(gpu.per_node, count)):
                    continue
                stage = tensor * data
                for expert in {1, stage}:
                    here = Deployment(gpu, tensor, expert, data, pipeline)
                    try:
                        here.check(model)
                        here.memory(model)
                        _require_width(here, model)
                    except LeanMoeError as error:
                        notes[str(here)] = str(error)
                        continue
                    allowed.append(here)
    return allowed


def _require_width(here: Deployment, model: MoEShape) -> None:
    width = model.expert_width / here.expert_tensor
    if width < LEAST_WIDTH:
        raise LeanMoeError(
            f"an expert's width of {width:.0f} on each GPU is less than a tile's {LEAST_WIDTH}"
        )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def points_of(
    model: MoEShape,
    plans: Mapping[str, Plan | None],
    places: Sequence[Deployment],
    loads: Sequence[ServiceLoadModel],
    basis: Basis,
    advance: Callable[[int], None] = lambda _done: None,
) -> list[SweptPoint]:
    """Every plan on every deployment at every concurrency; what does not fit is left out."""
    layouts = {here.scope(basis.cross_rank) for here in places}
    # Those that differ in ranks alone one after another: they share what was sampled last.
    activations_of = {
        layout: {name: Activation(model, plan, curve_of) for name, plan in plans.items()}
        for layout in sorted(layouts, key=lambda each: (each.scopes, each.ranks))
        for curve_of in [basis.curves_of(layout)]
    }
    kept = {name: remaining(plan) for name, plan in plans.items()}
    points = []
    for here in places:
        step = StepTime(model, here, basis.constants, basis.kernel)
        activations = activations_of[here.scope(basis.cross_rank)]
        for load in loads:
            for name, activation in activations.items():
                point = _point(name, step, activation, load, kept[name])
                advance(1)
                points += [] if point is None else [point]
    return points


def _point(
    plan: str, step: StepTime, activation: Activation, load: ServiceLoadModel, experts: float | None
) -> SweptPoint | None:
    """One configuration; None where not all of its requests fit beside the weights."""
    here, concurrency = step.deployment, load.concurrency or 0
    try:
        served = closed_loop(step, activation, load, experts)
    except LeanMoeError:  # not even one request fits
        return None
    if served.running < concurrency:  # the same as a lower concurrency, with a queue before it
        return None
    return SweptPoint(
        plan,
        here.gpus,
        here.tensor,
        here.expert,
        here.data,
        here.pipeline,
        concurrency,
        served.output_throughput,
        ttft_ms=1e3 * served.ttft,
        tpot_ms=1e3 * served.tpot,
        per_user=1 / served.tpot,
        per_gpu=served.output_throughput / here.gpus,
    )


def front(points: Iterable[SweptPoint]) -> list[SweptPoint]:
    """The points that no other beats in both tokens a user and a GPU, by rising tokens a user."""
    best = -math.inf
    kept = []
    for point in sorted(points, key=lambda p: (-p.per_user, -p.per_gpu)):
        if point.per_gpu > best:
            best = point.per_gpu
            kept.append(point)
    return kept[::-1]


def within(points: Iterable[SweptPoint], limits: SweepLimits) -> list[SweptPoint]:
    """The points that meet both limits."""
    most_tpot = math.inf if limits.tpot_ms is None else limits.tpot_ms
    most_ttft = math.inf if limits.ttft_ms is None else limits.ttft_ms
    return [each for each in points if each.tpot_ms <= most_tpot and each.ttft_ms <= most_ttft]


def cheapest(points: Iterable[SweptPoint]) -> SweptPoint | None:
    """The point with the most tokens a GPU."""
    return max(points, key=lambda point: point.per_gpu, default=None)


def gpus_for(point: SweptPoint, throughput: float) -> int:
    """GPUs that serve `throughput` tokens a second in as many copies of the point as that takes."""
    return math.ceil(throughput / point.output_throughput) * point.gpus


def cost(point: SweptPoint, price: float) -> float:
    """The cost of a million output tokens, at a price for a GPU and hour."""
    return price * point.gpus / (point.output_throughput * SECONDS_AN_HOUR) * 1e6


def _savings(
    by_plan: Mapping[str, Sequence[SweptPoint]], limits: SweepLimits
) -> Iterable[CheapestPoint]:
    """For each plan the deployment that is fast enough with the fewest GPUs a token."""
    best = {name: cheapest(within(mine, limits)) for name, mine in by_plan.items()}
    full = best[FULL]
    for name, point in best.items():
        if point is None:
            yield CheapestPoint(name, None)
            continue
        costs = None if limits.price is None else cost(point, limits.price)
        if full is None:
            yield CheapestPoint(name, point, costs)
            continue
        target = full.output_throughput * max(1, FEWEST_GPUS // full.gpus)
        gpus = gpus_for(point, target)
        yield CheapestPoint(
            name,
            point,
            costs,
            target,
            gpus,
            gpus_for(full, target) - gpus,
            1 - full.per_gpu / point.per_gpu,
        )
