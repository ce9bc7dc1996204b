"""Deployments, loads and plans compared: the Pareto front, the cheapest that is fast enough.

Uses the steady state (`serve`), not the simulator: a thousand configurations in seconds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

from leanmoe.core.errors import LeanMoeError
from leanmoe.models.shape import MoEShape
from leanmoe.plan import Plan
from leanmoe.predict.constants import Constants
from leanmoe.predict.experts.active_experts import Activation
from leanmoe.predict.experts.curve_sources import CurvesOf
from leanmoe.predict.hardware.gpus import Gpu
from leanmoe.predict.prediction import remaining
from leanmoe.predict.step.deployment import Deployment
from leanmoe.predict.step.step_time import StepTime
from leanmoe.predict.traffic.closed_loop import closed_loop
from leanmoe.predict.traffic.service_load import ServiceLoadModel

if TYPE_CHECKING:
    pass


SECONDS_AN_HOUR = 3600.0
LEAST_WIDTH = 64
"""Of an expert on one GPU: narrower ones are measured nowhere and wasteful."""


@dataclass(frozen=True)
class SweepPoint:
    """One configuration. Seconds, and tokens a second."""

    plan: str
    gpus: int
    tensor: int
    expert: int
    data: int
    pipeline: int
    concurrency: int
    output_throughput: float
    ttft: float
    tpot: float

    @property
    def per_user(self) -> float:
        """Output tokens a second that a user sees."""
        return 1 / self.tpot

    @property
    def per_gpu(self) -> float:
        """Output tokens a second of a GPU."""
        return self.output_throughput / self.gpus

    def cost(self, price: float) -> float:
        """Of a million output tokens, at a price for a GPU and hour."""
        return price * self.gpus / (self.output_throughput * SECONDS_AN_HOUR) * 1e6

    def to_json(self) -> dict[str, Any]:
        """The fields and what follows from them, times in milliseconds."""
        plain = {k: v for k, v in asdict(self).items() if k not in ("ttft", "tpot")}
        return {
            **plain,
            "ttft_ms": 1e3 * self.ttft,
            "tpot_ms": 1e3 * self.tpot,
            "per_user": self.per_user,
            "per_gpu": self.per_gpu,
        }


def deployments(
    gpu: Gpu, model: MoEShape, gpus: Sequence[int], refused: dict[str, str] | None = None
) -> list[Deployment]:
    """Every split of these numbers of GPUs that the model allows and its weights fit.

    Tensor parallelism stays within a node; experts are split whole (expert parallelism) or in
    width; pipelines are of whole nodes. What is refused is noted with why.
    """
    found = []
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
                    found.append(here)
    return found


def _require_width(here: Deployment, model: MoEShape) -> None:
    width = model.expert_width / here.expert_tensor
    if width < LEAST_WIDTH:
        raise LeanMoeError(
            f"an expert's width of {width:.0f} on each GPU is less than a tile's {LEAST_WIDTH}"
        )


def _divisors(number: int) -> list[int]:
    return [n for n in range(1, number + 1) if number % n == 0]


def sweep(
    model: MoEShape,
    plans: Mapping[str, Plan | None],
    places: Sequence[Deployment],
    loads: Sequence[ServiceLoadModel],
    constants: Constants,
    kernel: str,
    curves_of: CurvesOf,
    advance: Callable[[int], None] = lambda _done: None,
    cross_rank: bool = False,
) -> list[SweepPoint]:
    """Every plan on every deployment at every concurrency; what does not fit is left out."""
    layouts = {here.scope(cross_rank) for here in places}
    curves = {scope: curves_of(scope) for scope in layouts}
    activations_of = {
        scope: {name: Activation(model, plan, curves[scope]) for name, plan in plans.items()}
        for scope in layouts
    }
    kept = {name: remaining(plan) for name, plan in plans.items()}
    found = []
    for here in places:
        step = StepTime(model, here, constants, kernel)
        activations = activations_of[here.scope(cross_rank)]
        for load in loads:
            for name, activation in activations.items():
                try:
                    served = closed_loop(step, activation, load, kept[name])
                except LeanMoeError:  # one request does not fit beside the weights
                    continue
                finally:
                    advance(1)
                if served.running < (load.concurrency or 0):
                    continue  # the same as a lower concurrency, with a queue before it
                found.append(
                    SweepPoint(
                        name,
                        here.gpus,
                        here.tensor,
                        here.expert,
                        here.data,
                        here.pipeline,
                        load.concurrency or 0,
                        served.output_throughput,
                        served.ttft,
                        served.tpot,
                    )
                )
    return found


def front(points: Iterable[SweepPoint]) -> list[SweepPoint]:
    """The points that no other beats in both tokens a user and a GPU, by rising tokens a user."""
    best = -math.inf
    kept = []
    for point in sorted(points, key=lambda p: (-p.per_user, -p.per_gpu)):
        if point.per_gpu > best:
            best = point.per_gpu
            kept.append(point)
    return kept[::-1]


def within(
    points: Iterable[SweepPoint], tpot: float | None = None, ttft: float | None = None
) -> list[SweepPoint]:
    """The points that meet both limits, in seconds."""
    return [
        p for p in points if (tpot is None or p.tpot <= tpot) and (ttft is None or p.ttft <= ttft)
    ]


def cheapest(points: Iterable[SweepPoint]) -> SweepPoint | None:
    """The point with the most tokens a GPU."""
    return max(points, key=lambda p: p.per_gpu, default=None)


def gpus_for(point: SweepPoint, throughput: float) -> int:
    """GPUs that serve `throughput` tokens a second in as many copies of the point as that takes."""
    return math.ceil(throughput / point.output_throughput) * point.gpus


def at_concurrency(load: ServiceLoadModel, sizes: Sequence[int]) -> list[ServiceLoadModel]:
    """The load at each of these concurrencies."""
    return [replace(load, concurrency=size, rate=None) for size in sizes]


@dataclass(frozen=True)
class Limits:
    """What a deployment must keep to, and what a GPU costs."""

    tpot_ms: float | None = None
    ttft_ms: float | None = None
    price: float | None = None
    """Of a GPU and hour."""

    def check(self) -> None:
        """Raises LeanMoeError for a value that is not above 0."""
        flags = {"--tpot": self.tpot_ms, "--ttft": self.ttft_ms, "--price": self.price}
        for flag, value in flags.items():
            if value is not None and not value > 0:
                raise LeanMoeError(f"{flag} is {value:g}: it must be above 0")
