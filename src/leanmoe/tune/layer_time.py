"""How long a MoE layer's experts take on this machine, for a step with given routing.

Real routing (a profile's trace) goes through each rule and the experts function that serving will
use; what is timed includes the rule's own routing. A line through those times, in rows and
distinct experts, smooths the noise.

How far fewer experts move a layer's output on random input: LExI's measure, no data needed.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from leanmoe.kernels.dispatch import fast_route
from leanmoe.plan import Rule
from leanmoe.profile.replay import draw_steps
from leanmoe.profile.saved import Profile
from leanmoe.routing import count_distinct, count_slots, route
from leanmoe.runtime import find_layers, shape_of
from leanmoe.runtime.experts import experts_forward

REPEATS = 12
STEPS = 4


@dataclass(frozen=True)
class LayerTime:
    """t = base + a x distinct experts + b x rows, in seconds for one layer in one step."""

    base: float
    per_distinct: float
    per_row: float
    routing: float
    """What choosing by a rule adds, for layers that have one."""
    error: float
    """Mean relative error of the line on the steps it was fitted to."""

    def seconds(self, rows: float, distinct: float, has_rule: bool) -> float:
        """Time of one layer in one step."""
        return (
            self.base
            + self.per_distinct * distinct
            + self.per_row * rows
            + (self.routing if has_rule else 0.0)
        )


@torch.inference_mode()
def fit(
    model: Any, profile: Profile, tokens: int, rules: Sequence[Rule], seed: int = 0
) -> LayerTime:
    """Times steps of `tokens` tokens under `rules` in interleaved order and fits the line."""
    layer = find_layers(model)[len(profile.layers) // 2]
    number = layer.number
    logits_TE = torch.from_numpy(profile.trace.logits_LTE[number])
    bias_E = None if profile.bias_LE is None else torch.from_numpy(profile.bias_LE[number])
    weight = layer.experts.down_proj
    hidden_TD = torch.randn(
        tokens, profile_hidden(layer), generator=torch.Generator().manual_seed(seed)
    ).to(weight)
    steps = draw_steps(profile.trace, tokens, STEPS, seed)
    times: dict[tuple[int, int], list[float]] = {}
    routing_times: dict[tuple[int, int], list[float]] = {}
    work: dict[tuple[int, int], tuple[float, float]] = {}
    cases = [(r, s) for r in range(len(rules)) for s in range(STEPS)]
    order = random.Random(seed)
    for _ in range(REPEATS):
        order.shuffle(cases)
        for case in cases:
            rule, step = rules[case[0]], steps[case[1]]
            logits = logits_TE[step].float().to(weight.device)
            started = time.perf_counter()
            routing = fast_route(logits, profile.router, profile.model.top_k, rule, bias_E)
            routed = time.perf_counter()
            experts_forward(
                layer.experts, hidden_TD, routing.ids_BTK, routing.weights_BTK.to(weight)
            )
            ended = time.perf_counter()
            times.setdefault(case, []).append(ended - routed)
            routing_times.setdefault(case, []).append(routed - started)
            work[case] = (
                float(count_slots(routing.ids_BTK, profile.model.experts)),
                float(count_distinct(routing.ids_BTK, profile.model.experts)),
            )
    return _line(times, routing_times, work, rules)


def profile_hidden(layer: Any) -> int:
    """Hidden width of the layer's experts."""
    experts = layer.experts
    up = experts.gate_up_proj if experts.has_gate else experts.up_proj
    return int(up.shape[1] if experts.is_transposed else up.shape[2])


def _line(
    times: dict[tuple[int, int], list[float]],
    routing_times: dict[tuple[int, int], list[float]],
    work: dict[tuple[int, int], tuple[float, float]],
    rules: Sequence[Rule],
) -> LayerTime:
    cases = list(times)
    seen = np.array([statistics.median(times[case]) for case in cases])
    columns = np.array([[1.0, work[case][1], work[case][0]] for case in cases])
    coefficients = _not_negative(columns, seen)
    fitted = columns @ coefficients
    plain = [t for case in cases if rules[case[0]].is_empty for t in routing_times[case]]
    ruled = [t for case in cases if not rules[case[0]].is_empty for t in routing_times[case]]
    routing = statistics.median(ruled) - statistics.median(plain) if ruled and plain else 0.0
    return LayerTime(
        float(coefficients[0]),
        float(coefficients[1]),
        float(coefficients[2]),
        float(max(routing, 0.0)),
        float(np.mean(np.abs(fitted - seen) / seen)),
    )


def _not_negative(columns: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Least squares of relative errors, with no coefficient below zero."""
    from scipy.optimize import nnls

    weighted = columns / seen[:, None]
    scale = weighted.max(axis=0)
    solution, _ = nnls(weighted / scale, np.ones(len(seen)))
    return np.asarray(solution / scale)


TOKENS = 512


@torch.inference_mode()
def perturbation(model: Any, tokens: int = TOKENS, seed: int = 0) -> dict[tuple[int, int], float]:
    """Mean Frobenius distance between a layer's output at k and at full k, by (layer, k).

    Inputs are standard normal, as layer inputs are normalised (LExI, arXiv 2509.02753, stage 1).
    """
    shape = shape_of(model)
    moved: dict[tuple[int, int], float] = {}
    draw = torch.Generator().manual_seed(seed)
    for layer in find_layers(model):
        weight = layer.experts.down_proj
        hidden_TD = torch.randn(tokens, profile_hidden(layer), generator=draw).to(weight)
        bias_E = layer.ranking_bias(shape.router)
        logits_TE = hidden_TD.float() @ layer.router.weight.float().T
        outputs = []
        for k in range(1, shape.top_k + 1):
            routing = route(logits_TE, shape.router, shape.top_k, Rule(top_k=k), bias_E)
            outputs.append(
                experts_forward(
                    layer.experts, hidden_TD, routing.ids_BTK, routing.weights_BTK.to(weight)
                )
            )
        for k, output in enumerate(outputs, start=1):
            moved[layer.number, k] = float((output - outputs[-1]).norm() / tokens**0.5)
    return moved
