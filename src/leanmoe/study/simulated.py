"""The paper's analysis and throughput study, rerun on the cost model: JSON in sections.

Letters: B tokens in a step, k experts a token, D distinct experts, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from leanmoe.models.catalog import published_shape
from leanmoe.models.shape import distinct_uniform
from leanmoe.plan import Band, Plan, Rule
from leanmoe.predict.constants import Constants, shipped
from leanmoe.predict.experts.active_experts import Activation
from leanmoe.predict.experts.assumed import Assumed
from leanmoe.predict.experts.curve_sources import assumed_curves
from leanmoe.predict.hardware.gpus import GPUS
from leanmoe.predict.prediction import default_kernel
from leanmoe.predict.step.deployment import Deployment
from leanmoe.predict.step.step_time import StepBatch, StepTime
from leanmoe.predict.traffic.service_load import read_lengths
from leanmoe.study import paper
from leanmoe.study.table_9 import STUDY_LENGTH, plan_of, throughputs, with_overhead

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


def analysis() -> dict[str, Any]:
    """Intensity and bytes of one MoE layer over load: fine-grained experts and coarse ones.

    DeepSeek-V3's layer beside Mixtral 8x7B's, both with a byte a weight. `as_the_paper` takes the
    dense layers' width for an expert's, as the paper's analysis does: nine times too many bytes and
    products, so that a layer seems to take nine times as long; the intensity stays the same.
    """
    model = published_shape(paper.V3)
    gpu = GPUS["h200"]
    fine = (model.experts, model.top_k, model.hidden, model.expert_width)
    rows = []
    for tokens in LOADS:
        row: dict[str, Any] = {"tokens": tokens}
        for name, (experts, k, hidden, width) in (("fine", fine), ("coarse", COARSE)):
            distinct = distinct_uniform(experts, k, tokens)
            weights = distinct * 3 * hidden * width * model.weight_bytes
            products = 2 * tokens * k * 3 * hidden * width
            passed = 2.0 * tokens * (2 * hidden + k * width)
            row[name] = {
                "distinct": distinct,
                "weight_bytes": weights,
                "activation_bytes": passed,
                "flops": products,
                "intensity": products / (weights + passed),
            }
        wrong = paper.WRONG_WIDTH / paper.RIGHT_WIDTH
        row["as_the_paper"] = {"weight_bytes": row["fine"]["weight_bytes"] * wrong}
        rows.append(row)
    ridge = gpu.flops_fp8 / gpu.bandwidth
    return {
        "label": "modelled",
        "model": model.name,
        "ridge": ridge,
        "too_much": paper.WRONG_WIDTH / paper.RIGHT_WIDTH,
        "compute_bound_from": {
            name: next((r["tokens"] for r in rows if r[name]["intensity"] >= ridge), None)
            for name in ("fine", "coarse")
        },
        "rows": rows,
    }


def v2_lite(overhead: float, constants: Constants | None = None) -> dict[str, Any]:
    """DeepSeek-V2-Lite on 2 A800: k = 4 and 2 for 6, and 48, 32 and 16 of its 64 experts.

    Nothing is fitted: H200's constants by the A800's stated rates, and the engine's time in a step
    that DeepSeek-V3's column gave.
    """
    constants = with_overhead(constants or shipped(), "a800", overhead)
    model = published_shape(paper.V2_LITE)
    place, lengths = Deployment(GPUS["a800"], 2), read_lengths(STUDY_LENGTH, "length")
    curves = assumed_curves(model, Assumed())
    step = StepTime(model, place, constants, default_kernel(model))
    loads = list(paper.V2_LITE_GAINS)
    full = throughputs(step, None, curves, lengths, loads)
    rules = {f"k={k}": Rule(top_k=k) for k in (4, 2)}
    rules |= {f"{n} of 64": Rule(experts=tuple(range(n))) for n in paper.EXPERTS_KEPT[1:]}
    columns = {
        name: throughputs(step, plan_of(model, rule), curves, lengths, loads)
        for name, rule in rules.items()
    }
    rows = [
        {
            "concurrency": load,
            "throughput": full[n],
            "gain": {name: 100 * (column[n] / full[n] - 1) for name, column in columns.items()},
            "paper_gain": paper.V2_LITE_GAINS[load],
        }
        for n, load in enumerate(loads)
    ]
    return {
        "label": "modelled beside cited",
        "machine": str(place),
        "rows": rows,
        "stands_on": step.kernel_origin,
    }


def u_shape(name: str, place: Deployment, constants: Constants | None = None) -> dict[str, Any]:
    """What half of k gains over the tokens of a decode step, of the experts and of the step.

    Three regimes: few tokens, where a lower k activates fewer experts; a flat middle, where all are
    active anyway; many tokens, where products decide. Each starts at the first load that is in it.
    """
    constants = constants or shipped()
    model = published_shape(name)
    step = StepTime(model, place, constants, default_kernel(model))
    curves = assumed_curves(model, Assumed())
    lower = max(1, round(model.top_k * LOWER))
    full = Activation(model, None, curves)
    fewer = Activation(model, plan_of(model, Rule(top_k=lower)), curves)
    context = read_lengths(STUDY_LENGTH, "length").mean * 1.5
    rows = []
    for tokens in LOADS:
        batch = StepBatch(tokens, context)
        one, other = step.parts(batch, full), step.parts(batch, fewer)
        rows.append(
            {
                "tokens": tokens,
                "distinct": full.layers(tokens, 0)[0].distinct,
                "experts_gain": 100 * (one.experts / other.experts - 1),
                "step_gain": 100 * (one.total / other.total - 1),
                "experts_ms": 1e3 * one.experts,
                "step_ms": 1e3 * one.total,
            }
        )
    return {
        "label": "modelled",
        "model": name,
        "machine": str(place),
        "top_k": model.top_k,
        "lower": lower,
        "rows": rows,
        "regimes": regimes([r["tokens"] for r in rows], [r["experts_gain"] for r in rows]),
        "stands_on": step.experts_origin,
    }


def regimes(tokens: Sequence[int], gains: Sequence[float]) -> dict[str, Any]:
    """Where the flat middle starts and ends: below a third of the largest gain before it.

    The peak and the lowest gain are those of the largest fall; `is_u` is whether the gain rises
    above that third again and stays there. Raises nothing: a curve that never falls has no middle,
    and says so.
    """
    pairs = [(peak, low) for low in range(len(gains)) for peak in range(low)]
    peak, lowest = max(pairs, key=lambda pair: gains[pair[0]] - gains[pair[1]])
    limit = gains[peak] * FLAT
    inside = [n for n in range(peak, len(gains)) if gains[n] <= limit]
    if not inside:
        return {"is_u": False, "peak": tokens[peak], "lowest": tokens[lowest]}
    rises = inside[-1] + 1
    is_u = rises < len(gains)
    return {
        "is_u": is_u,
        "peak": tokens[peak],
        "peak_gain": gains[peak],
        "flat_from": tokens[inside[0]],
        "lowest": tokens[lowest],
        "lowest_gain": gains[lowest],
        "rises_from": tokens[rises] if is_u else None,
    }


def u_shapes(constants: Constants | None = None) -> list[dict[str, Any]]:
    """The U shape of every model of the study."""
    return [u_shape(name, place, constants) for name, place in U_SHAPES.items()]


def banded(overhead: float, constants: Constants | None = None) -> dict[str, Any]:
    """DeepSeek-V3 where the paper's uniform k gives its +10%: a plan with bands beside it.

    The bands follow what the search found on the reference model: experts shared within the step
    where few tokens decode, the model as it was trained where all experts are active anyway, and
    fewer experts for prompt tokens. No quality is claimed for DeepSeek-V3: nobody measured it.
    """
    constants = with_overhead(constants or shipped(), "h200", overhead)
    model = published_shape(paper.V3)
    print_ = model.fingerprint()
    layers = len(model.moe_layers)
    place, lengths = Deployment(GPUS["h200"], 8), read_lengths(STUDY_LENGTH, "length")
    curves = assumed_curves(model, Assumed())
    step = StepTime(model, place, constants, default_kernel(model))
    shared = Rule(guaranteed=4, keep_weights=True)
    prompt = (Rule(top_k=6, keep_weights=True),) * (layers - 1) + (Rule(top_k=0),)
    plans = {
        "uniform k = 6 (the paper's)": plan_of(model, Rule(top_k=6)),
        "uniform k = 4 (the paper's)": plan_of(model, Rule(top_k=4)),
        "banded: 4 guaranteed to 96 tokens, prompts k = 6": Plan(
            print_, (Band(96, (shared,) * layers),), prompt
        ),
    }
    loads = list(paper.TABLE_9)
    full = throughputs(step, None, curves, lengths, loads)
    return {
        "label": "modelled",
        "machine": str(place),
        "concurrency": loads,
        "gains": {
            name: [
                100 * (a / b - 1)
                for a, b in zip(throughputs(step, plan, curves, lengths, loads), full, strict=True)
            ]
            for name, plan in plans.items()
        },
    }
