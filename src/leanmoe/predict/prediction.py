"""What a plan gains: a model, a plan, a machine and a load in; throughput, latency, memory out."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace

from leanmoe.models.shape import MoEShape
from leanmoe.plan import Plan
from leanmoe.predict.constants import Constants, KernelConstants, shipped
from leanmoe.predict.experts.curve_sources import CurvesOf
from leanmoe.predict.experts.curves import Activation
from leanmoe.predict.hardware.gpus import Gpu
from leanmoe.predict.kernels.features import TESTED_EXPERTS, TESTED_MULTIPLE
from leanmoe.predict.kernels.tables import kernel_format
from leanmoe.predict.step.deployment import Deployment, Memory
from leanmoe.predict.step.step_time import StepBatch, StepTime
from leanmoe.predict.traffic.closed_loop import closed_loop
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
    """One side of a comparison: the full model or a plan. Tokens a second, and milliseconds."""

    output_throughput: float
    ttft_ms: float
    """Mean time to the first token."""
    tpot_ms: float
    """Mean time of a further token."""
    running: float
    """Requests that run; the others wait for room in the KV cache."""
    distinct: float
    """Mean distinct experts of a MoE layer in a decode step."""
    slots: float
    memory: Memory
    step_ms: dict[str, float]
    """A decode step, by what takes the time."""
    bounds: dict[str, str]
    """What bounds each part of a decode step."""
    simulated: Simulated


@dataclass(frozen=True)
class Prediction:
    """What is predicted, and what it stands on."""

    label: str
    model: str
    deployment: str
    load: str
    concurrency: int | None
    rate: float | None
    full: PredictedVariant
    plan: PredictedVariant | None
    gain: float | None
    """Output throughput of the plan over the full model's."""
    tpot_gain: float | None
    """TPOT of the full model over the plan's: what counts where arrivals bound throughput."""
    stands_on: dict[str, str]


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
    variants: list[PredictedVariant] = []
    origins: set[str] = set()
    for side in (None,) if plan is None else (None, plan):
        activation = Activation(model, side, curve_of)
        origins |= set(activation.origins)
        experts = remaining(side)
        run = simulate(step, activation, load, experts, seed=seed)
        variants.append(_variant(step, activation, load, experts, run))
    full, other = variants[0], None if plan is None else variants[1]
    return Prediction(
        label="modelled",
        model=model.name,
        deployment=str(deployment),
        load=str(load),
        concurrency=load.concurrency,
        rate=load.rate,
        full=full,
        plan=other,
        gain=None if other is None else other.output_throughput / full.output_throughput,
        tpot_gain=None if other is None else full.tpot_ms / other.tpot_ms,
        stands_on=_stands_on(step, origins),
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
    concurrency = load.concurrency or max(1, round(run.running))
    closed = replace(load, concurrency=concurrency, rate=None)
    served = closed_loop(step, activation, closed, experts)
    context = load.inputs.mean + load.outputs.remaining
    batch = StepBatch(served.running, context)
    active = activation.layers(served.running, 0)
    layers = sum(each.layers for each in active)
    return PredictedVariant(
        output_throughput=run.output_throughput,
        ttft_ms=1e3 * run.ttft["mean"],
        tpot_ms=1e3 * run.tpot["mean"],
        running=served.running,
        distinct=sum(each.layers * each.distinct for each in active) / layers,
        slots=sum(each.layers * each.rows for each in active) / layers / served.running,
        memory=step.deployment.memory(step.model, experts),
        step_ms=served.step.to_json(),
        bounds=bounds(step, batch, activation),
        simulated=run,
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
    said = [a for a in kernel.accuracy if a.is_interpolated == step.experts.is_held]
    off = "; ".join(str(each) for each in said) or "not known"
    if not step.experts.shape.is_as_tested and not step.experts.is_held:
        off += (
            f"; this layer is unlike those (widths in multiples of {TESTED_MULTIPLE}, "
            f"{TESTED_EXPERTS} experts or more on a GPU): expect more"
        )
    return {
        "experts": f"{step.experts.origin}; {step.kernel_origin} ({kernel.fitted_to})",
        "experts have been off by": off,
        "other parts": f"modelled: {step.rates_origin}",
        "distinct experts": "; ".join(sorted(origins)),
    }
