"""The paper's analysis and throughput study, rerun on the cost model.

Letters: B tokens in a step, k experts a token, D distinct experts, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from leanmoe.models.catalog import published_shape
from leanmoe.models.shape import distinct_uniform
from leanmoe.plan import Band, Plan, Rule
from leanmoe.predict.hardware.gpus import GPUS
from leanmoe.predict.step.deployment import Deployment
from leanmoe.predict.step.step_time import StepBatch
from leanmoe.results.study import (
    AnalysedStep,
    Analysis,
    Banded,
    CurvePoint,
    LayerCost,
    Regimes,
    UShape,
    V2Lite,
    V2LiteRow,
)
from leanmoe.study import paper
from leanmoe.study.table_9 import LENGTHS, Service

LOADS = tuple(2**n for n in range(15))
U_SHAPES: Mapping[str, Deployment] = {
    "deepseek-ai/DeepSeek-V3": Deployment(GPUS["h200"], 8),
    "moonshotai/Kimi-K2-Instruct": Deployment(GPUS["h200"], 16, 1, 1),
    "Qwen/Qwen3-235B-A22B": Deployment(GPUS["h200"], 8),
    "Qwen/Qwen3-30B-A3B": Deployment(GPUS["h200"], 1),
    "openai/gpt-oss-120b": Deployment(GPUS["h200"], 1),
}
"""Models and the machines that their experts' time is modelled on."""
COARSE = (8, 2, 4096, 14336)
"""Experts, k, hidden and expert width of Mixtral 8x7B."""
FLAT = 1 / 3
"""A load is in the flat middle where the gain is below this share of the largest before it."""
LOWER = 0.5
"""The lower k of the U shapes, as a share of the model's."""


def analysis() -> Analysis:
    """Intensity and bytes of one MoE layer over load: fine-grained experts and coarse ones.

    DeepSeek-V3's layer beside Mixtral 8x7B's, both with a byte a weight, routed experts alone.
    `as_the_paper` adds the shared expert with the width that the paper's Table 1 gives it.
    """
    model, gpu = published_shape(paper.V3), GPUS["h200"]
    ridge, wrong = gpu.flops_fp8 / gpu.bandwidth, paper.SHARED_WIDTH_OF_TABLE_1
    routed, shared = (
        model.top_k * model.expert_width,
        3 * model.hidden * wrong * model.storage.expert_bytes,
    )

    def cost(tokens: int, experts: int, k: int, hidden: int, width: int) -> LayerCost:
        distinct = distinct_uniform(experts, k, tokens)
        weights = distinct * 3 * hidden * width * model.storage.expert_bytes
        products = 2 * tokens * k * 3 * hidden * width
        passed = 2.0 * tokens * (2 * hidden + k * width)
        return LayerCost(weights, distinct, passed, products, products / (weights + passed))

    fine = [
        cost(tokens, model.experts, model.top_k, model.hidden, model.expert_width)
        for tokens in LOADS
    ]
    coarse = [cost(tokens, *COARSE) for tokens in LOADS]
    return Analysis(
        label="modelled",
        model=model.name,
        ridge=ridge,
        too_much=(routed + wrong) / (routed + model.expert_width),
        compute_bound_from={
            name: next(
                tokens
                for tokens, cost in zip(LOADS, costs, strict=True)
                if (cost.intensity or 0.0) >= ridge
            )
            for name, costs in (("fine", fine), ("coarse", coarse))
        },
        rows=tuple(
            AnalysedStep(tokens, one, other, LayerCost(one.weight_bytes + shared))
            for tokens, one, other in zip(LOADS, fine, coarse, strict=True)
        ),
    )


def v2_lite(overhead: float) -> V2Lite:
    """DeepSeek-V2-Lite on 2 A800: k = 4 and 2 for 6, and 48, 32 and 16 of its 64 experts.

    Nothing is fitted: H200's constants by the A800's stated rates, and the engine's time in a step
    that DeepSeek-V3's column gave.
    """
    place, loads = Deployment(GPUS["a800"], 2), list(paper.V2_LITE_GAINS)
    service = Service.of(paper.V2_LITE, place, overhead)
    rules = {f"k={k}": Rule(top_k=k) for k in (4, 2)}
    rules |= {f"{n} of 64": Rule(experts=tuple(range(n))) for n in paper.EXPERTS_KEPT[1:]}
    gains, full = service.gains(rules, loads), service.throughputs(None, loads)
    rows = tuple(
        V2LiteRow(
            load,
            full[n],
            {name: column[n] for name, column in gains.items()},
            paper.V2_LITE_GAINS[load],
        )
        for n, load in enumerate(loads)
    )
    return V2Lite("modelled beside cited", str(place), rows, service.step.kernel_origin)


def u_shape(name: str, place: Deployment) -> UShape:
    """What half of k gains over the tokens of a decode step, of the experts and of the step.

    Three regimes: few tokens, where a lower k activates fewer experts; a flat middle, where all are
    active anyway; many tokens, where products decide. Each starts at the first load that is in it.
    """
    service = Service.of(name, place)
    step, top_k = service.step, service.step.model.top_k
    lower = max(1, round(top_k * LOWER))
    full, fewer = service.activation(None), service.activation(Rule(top_k=lower))
    rows = []
    for tokens in LOADS:
        batch = StepBatch(tokens, LENGTHS.mean * 1.5)
        one, other = step.parts(batch, full), step.parts(batch, fewer)
        rows.append(
            CurvePoint(
                tokens=tokens,
                distinct=full.layers(tokens, 0)[0].distinct,
                experts_gain=100 * (one.experts / other.experts - 1),
                step_gain=100 * (one.total / other.total - 1),
                experts_ms=1e3 * one.experts,
                step_ms=1e3 * one.total,
            )
        )
    return UShape(
        label="modelled",
        model=name,
        machine=str(place),
        top_k=top_k,
        lower=lower,
        rows=tuple(rows),
        regimes=regimes(LOADS, [row.experts_gain for row in rows]),
        stands_on=step.experts.origin,
    )


def regimes(tokens: Sequence[int], gains: Sequence[float]) -> Regimes:
    """Where the flat middle starts and ends: below a third of the largest gain before it.

    The peak and the lowest gain are those of the largest fall; `is_u` is whether the gain rises
    above that third again and stays there. Raises nothing: a curve that never falls has no middle,
    and says so.
    """
    pairs = [(peak, low) for low in range(len(gains)) for peak in range(low)]
    peak, lowest = max(pairs, key=lambda pair: gains[pair[0]] - gains[pair[1]])
    inside = [n for n in range(peak, len(gains)) if gains[n] <= gains[peak] * FLAT]
    if not inside:
        return Regimes(False, tokens[peak], tokens[lowest])
    rises = inside[-1] + 1
    is_u = rises < len(gains)
    return Regimes(
        is_u,
        tokens[peak],
        tokens[lowest],
        peak_gain=gains[peak],
        lowest_gain=gains[lowest],
        flat_from=tokens[inside[0]],
        rises_from=tokens[rises] if is_u else None,
    )


def banded(overhead: float) -> Banded:
    """DeepSeek-V3 where the paper's uniform k gives its +10%: a plan with bands beside it.

    The bands follow what the search found on the reference model: experts shared within the step
    where few tokens decode, the model as it was trained where all experts are active anyway, and
    fewer experts for prompt tokens. No quality is claimed for DeepSeek-V3: nobody measured it.
    """
    place, loads = Deployment(GPUS["h200"], 8), tuple(paper.TABLE_9)
    service = Service.of(paper.V3, place, overhead)
    model = service.step.model.fingerprint()
    shared = (Rule(guaranteed=4, renormalise=0.0),) * model.moe_layers
    prompt = (Rule(top_k=6, renormalise=0.0),) * (model.moe_layers - 1) + (Rule(top_k=0),)
    plans = {
        "uniform k = 6 (the paper's)": Plan.uniform(model, Rule(top_k=6)),
        "uniform k = 4 (the paper's)": Plan.uniform(model, Rule(top_k=4)),
        "banded: 4 guaranteed to 96 tokens, prompts k = 6": Plan.banded(
            model, (Band(96, shared),), prompt
        ),
    }
    return Banded("modelled", str(place), loads, service.gains(plans, loads))
