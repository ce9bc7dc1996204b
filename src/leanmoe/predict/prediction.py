"""What a plan gains: a model, a plan, a machine and a load in; throughput, latency, memory out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from leanmoe.models.shape import MoEShape
from leanmoe.plan import Plan
from leanmoe.predict.constants import Constants, shipped
from leanmoe.predict.experts.active_experts import Activation
from leanmoe.predict.experts.curve_sources import CurvesOf
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
class Basis:
    """What predictions of one model stand on."""

    kernel: str
    curves_of: CurvesOf
    constants: Constants = field(default_factory=shipped)
    cross_rank: bool = False
    """Whether tokens share experts with those of all data-parallel ranks, not only their own."""


@dataclass(frozen=True)
class PredictedVariant:
    """One side of a comparison: the full model or a plan."""

    served: Served
    simulated: Simulated
    distinct: float
    """Mean distinct experts of a MoE layer in a decode step."""
    slots: float
    memory: Memory
    bounds: Mapping[str, str]
    """What bounds each part of a decode step."""

    @property
    def throughput(self) -> float:
        """Output tokens a second."""
        return self.simulated.output_throughput

    @property
    def ttft(self) -> float:
        """Mean time to the first token, seconds."""
        return self.simulated.ttft["mean"]

    @property
    def tpot(self) -> float:
        """Mean time of a further token, seconds."""
        return self.simulated.tpot["mean"]


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


def _to_json(variant: PredictedVariant) -> dict[str, Any]:
    return {
        "output_throughput": variant.throughput,
        "ttft_ms": 1e3 * variant.ttft,
        "tpot_ms": 1e3 * variant.tpot,
        "running": variant.served.running,
        "distinct": variant.distinct,
        "slots": variant.slots,
        "memory": asdict(variant.memory),
        "step_ms": variant.served.step.to_json(),
        "bounds": dict(variant.bounds),
        "simulated": asdict(variant.simulated),
    }


def default_kernel(model: MoEShape) -> str:
    """The kernel assumed where none is named."""
    return DEFAULT_KERNELS[kernel_format(model)]


def predict(
    model: MoEShape,
    plan: Plan | None,
    deployment: Deployment,
    load: ServiceLoadModel,
    basis: Basis,
    seed: int = 0,
) -> Prediction:
    """Predicts the full model and the plan on the same machine under the same load.

    Raises LeanMoeError for a plan of another model, and for what does not fit.
    """
    load.check()
    step = StepTime(model, deployment, basis.constants, basis.kernel)
    curve_of = basis.curves_of(deployment.scope(basis.cross_rank))
    variants: dict[str, PredictedVariant] = {}
    origins: set[str] = set()
    for name, side in {"full": None, **({} if plan is None else {"plan": plan})}.items():
        activation = Activation(model, side, curve_of)
        origins |= set(activation.origins)
        experts = remaining(side)
        run = simulate(step, activation, load, experts, seed=seed)
        variants[name] = _variant(step, activation, load, experts, run)
    return Prediction(
        model, deployment, load, variants["full"], variants.get("plan"), _stands_on(step, origins)
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
    run: Simulated,
) -> PredictedVariant:
    memory = step.deployment.memory(step.model, experts)
    concurrency = load.concurrency or max(1, round(run.running))
    closed = replace(load, concurrency=concurrency, rate=None)
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
    bounding = {}
    for part, seconds in asdict(before).items():
        if seconds <= 0:
            continue
        follows = {
            name: (1 - getattr(parts, part) / seconds) / (1 - 1 / FASTER)
            for name, parts in after.items()
        }
        best = max(follows, key=lambda name: follows[name])
        bounding[part] = best if follows[best] >= 0.5 else "latency"
    return bounding


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
