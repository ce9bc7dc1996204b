"""What a plan gains: a model, a plan, a machine and a load in; throughput, latency, memory out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from leanmoe.models.shape import MoEShape
from leanmoe.plan import Plan
from leanmoe.predict.constants import Constants, shipped
from leanmoe.predict.experts.active_experts import Activation
from leanmoe.predict.experts.assumed import Assumed
from leanmoe.predict.experts.curve_sources import CurvesOf, assumed_curves
from leanmoe.predict.hardware.gpus import Gpu
from leanmoe.predict.kernels.features import TESTED_EXPERTS, TESTED_MULTIPLE
from leanmoe.predict.kernels.kernel_constants import KernelConstants
from leanmoe.predict.kernels.tables import kernel_format
from leanmoe.predict.step.deployment import Deployment, Memory
from leanmoe.predict.step.step_time import StepBatch, StepTime
from leanmoe.predict.traffic.closed_loop import Served, closed_loop
from leanmoe.predict.traffic.service_load import ServiceLoadModel
from leanmoe.predict.traffic.simulate import Simulated, simulate

DEFAULT_KERNELS: Mapping[str, str] = {
    "bfloat16": "vllm-triton",
    "fp8_block": "sglang-triton",
    "w4a16_mxfp4": "vllm-triton",
}
"""By format: a kernel an engine would run, and whose predictions are the closest."""
FASTER = 1.25
"""By how much a resource is made faster to see what it bounds."""


@dataclass(frozen=True)
class PredictedVariant:
    """One side of a comparison: the full model or a plan."""

    served: Served
    simulated: Simulated | None
    distinct: float
    """Mean distinct experts of a MoE layer in a decode step."""
    slots: float
    memory: Memory
    bounds: Mapping[str, str]
    """What bounds each part of a decode step."""

    @property
    def throughput(self) -> float:
        """Output tokens a second."""
        if self.simulated is not None:
            return self.simulated.output_throughput
        return self.served.output_throughput

    @property
    def ttft(self) -> float:
        """Mean time to the first token, seconds."""
        return self.simulated.ttft["mean"] if self.simulated is not None else self.served.ttft

    @property
    def tpot(self) -> float:
        """Mean time of a further token, seconds."""
        return self.simulated.tpot["mean"] if self.simulated is not None else self.served.tpot


@dataclass(frozen=True)
class Prediction:
    """What is predicted, and what it stands on."""

    model: MoEShape
    deployment: Deployment
    load: ServiceLoadModel
    full: PredictedVariant
    plan: PredictedVariant | None
    stands_on: Mapping[str, str]

    @property
    def gain(self) -> float | None:
        """Output throughput of the plan over the full model's."""
        return None if self.plan is None else self.plan.throughput / self.full.throughput

    @property
    def tpot_gain(self) -> float | None:
        """TPOT of the full model over the plan's: what counts where arrivals bound throughput."""
        return None if self.plan is None else self.full.tpot / self.plan.tpot

    def to_json(self) -> dict[str, Any]:
        """Everything, for a results file."""
        return {
            "label": "modelled",
            "model": self.model.name,
            "deployment": str(self.deployment),
            "load": str(self.load),
            "full": _to_json(self.full),
            "plan": None if self.plan is None else _to_json(self.plan),
            "gain": self.gain,
            "tpot_gain": self.tpot_gain,
            "stands_on": dict(self.stands_on),
        }


def _to_json(found: PredictedVariant) -> dict[str, Any]:
    return {
        "output_throughput": found.throughput,
        "ttft_ms": 1e3 * found.ttft,
        "tpot_ms": 1e3 * found.tpot,
        "running": found.served.running,
        "distinct": found.distinct,
        "slots": found.slots,
        "memory": asdict(found.memory),
        "step_ms": found.served.step.to_json(),
        "bounds": dict(found.bounds),
        "simulated": None if found.simulated is None else asdict(found.simulated),
    }


def default_kernel(model: MoEShape) -> str:
    """The kernel assumed where none is named."""
    return DEFAULT_KERNELS[kernel_format(model)]


def predict(
    model: MoEShape,
    plan: Plan | None,
    deployment: Deployment,
    load: ServiceLoadModel,
    kernel: str | None = None,
    assumed: Assumed | None = None,
    curves_of: CurvesOf | None = None,
    constants: Constants | None = None,
    simulated: bool = True,
    seed: int = 0,
    requests: int | None = None,
    cross_rank: bool = False,
) -> Prediction:
    """Predicts the full model and the plan on the same machine under the same load.

    `curves_of` gives distinct experts from replayed traces; without it routing is `assumed`.
    `cross_rank`: tokens share experts with those of all data-parallel ranks, not only their own.
    Raises LeanMoeError for a plan of another model, and for what does not fit.
    """
    load.check()
    if plan is not None:
        plan.check(model.fingerprint(), more_experts=True)
    constants = constants or shipped()
    step = StepTime(model, deployment, constants, kernel or default_kernel(model))
    scope = deployment.scope(cross_rank)
    if curves_of is None:
        curves = assumed_curves(model, assumed or Assumed(), scope)
    else:
        curves = curves_of(scope)
    sides = {"full": None, **({} if plan is None else {"plan": plan})}
    found = {}
    origins: set[str] = set()
    for name, side in sides.items():
        activation = Activation(model, side, curves)
        origins |= set(activation.origins)
        experts = remaining(side)
        run = simulate(step, activation, load, experts, requests, seed) if simulated else None
        found[name] = _variant(step, activation, load, experts, run)
    return Prediction(
        model, deployment, load, found["full"], found.get("plan"), _stands_on(step, origins)
    )


def remaining(plan: Plan | None) -> float | None:
    """Mean experts of a layer that the plan leaves in memory; None for all of them.

    An expert that any band uses stays.
    """
    if plan is None or not plan.bands:
        return None
    every = (*plan.bands, *([] if plan.bands[-1].up_to is None else [None]))
    counts = []
    for layer in range(plan.model.moe_layers):
        used: set[int] = set()
        for band in every:
            kept = None if band is None else band.rules[layer].experts
            used |= set(range(plan.model.experts)) if kept is None else set(kept)
        counts.append(len(used))
    return sum(counts) / len(counts)


def _variant(
    step: StepTime,
    activation: Activation,
    load: ServiceLoadModel,
    experts: float | None,
    run: Simulated | None,
) -> PredictedVariant:
    memory = step.deployment.memory(step.model, experts)
    if load.concurrency is None:
        assert run is not None
        at_once = max(1, round(run.running))
        closed = replace(load, concurrency=at_once, rate=None)
    else:
        closed = load
    served = closed_loop(step, activation, closed, experts)
    context = load.inputs.mean + load.outputs.remaining
    batch = StepBatch(served.running, context)
    active = activation.layers(served.running, 0)
    layers = sum(each.layers for each in active)
    return PredictedVariant(
        served,
        run,
        sum(each.layers * each.distinct for each in active) / layers,
        sum(each.layers * each.rows for each in active) / layers / served.running,
        memory,
        bounds(step, batch, activation),
    )


def bounds(step: StepTime, batch: StepBatch, activation: Activation) -> dict[str, str]:
    """What bounds each part of a step: memory, compute, the link between GPUs, or latency.

    Each resource is made a quarter faster in turn; whatever shortens a part most bounds it, and
    where less than half of the part follows any of them, it is bound by the latency of its calls.
    """
    before = step.parts(batch, activation)
    gpu = step.deployment.gpu
    faster: dict[str, Gpu] = {
        "memory": replace(gpu, bandwidth=gpu.bandwidth * FASTER),
        "compute": replace(gpu, flops=gpu.flops * FASTER, flops_fp8=gpu.flops_fp8 * FASTER),
        "link": replace(gpu, link=gpu.link * FASTER, network=gpu.network * FASTER),
    }
    after = {name: step.on(other).parts(batch, activation) for name, other in faster.items()}
    found = {}
    for part, seconds in asdict(before).items():
        if seconds <= 0:
            continue
        follows = {
            name: (1 - getattr(parts, part) / seconds) / (1 - 1 / FASTER)
            for name, parts in after.items()
        }
        best = max(follows, key=lambda name: follows[name])
        found[part] = best if follows[best] >= 0.5 else "latency"
    return found


def _stands_on(step: StepTime, origins: set[str]) -> dict[str, str]:
    kernel: KernelConstants = step.kernel
    said = [a for a in kernel.accuracy if a.is_interpolated == step.is_interpolated]
    off = "; ".join(str(each) for each in said) or "not known"
    if not step.is_as_tested and not step.is_interpolated:
        off += (
            f"; this layer is unlike those (widths in multiples of {TESTED_MULTIPLE}, "
            f"{TESTED_EXPERTS} experts or more on a GPU): expect more"
        )
    return {
        "experts": f"{step.experts_origin}; {step.kernel_origin} ({kernel.fitted_to})",
        "experts have been off by": off,
        "other parts": f"modelled: {step.rates_origin}",
        "distinct experts": "; ".join(sorted(origins)),
    }
