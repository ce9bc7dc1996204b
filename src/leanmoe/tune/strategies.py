"""What a strategy is, and all of them by name: ways to choose one rule per layer within a budget.

A published method with one number (a threshold, a share) has it tuned by replay until its mean cost
is the budget's. A method with whole numbers only takes the larger one in as many layers as fit.
leanmoe's own takes in every layer the rule that loses least for its cost, as measured.

Letters: T tokens, D hidden width, E experts.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from leanmoe.core.errors import LeanMoeError
from leanmoe.core.registry import Registry
from leanmoe.plan import Fingerprint, Rule
from leanmoe.results.tune import Sensitivity, StrategyBudget
from leanmoe.routing import route
from leanmoe.runtime import find_layers, shape_of
from leanmoe.tune.allocate import Offer, cheapest
from leanmoe.tune.layers import loss_rates

Cost = Callable[[int, Rule], float]
"""Mean cost of a rule in a layer, by replay: no pass of the model."""


@dataclass(frozen=True)
class Setting:
    """What a strategy has to work with at one load."""

    model: Fingerprint
    decode_batch: int
    budget: StrategyBudget
    """What all strategies may spend: a mean over layers."""
    cost: Cost
    sensitivities: Sequence[Sensitivity] = ()
    perturbation: Mapping[tuple[int, int], float] | None = None
    """LExI's: how much layer l's output moves on random input with k experts, by (l, k)."""
    measure: Callable[[tuple[Rule, ...]], float] | None = None
    """Next-token loss under one rule per layer, on calibration text."""
    renormalise: float = 0.0
    """What loses least at this load with one rule for all layers."""

    def mean_cost(self, rules: Sequence[Rule]) -> float:
        """Mean cost of one rule per layer."""
        return sum(self.cost(n, rule) for n, rule in enumerate(rules)) / len(rules)


@dataclass(frozen=True)
class Strategy:
    """A way to choose one rule per layer within a budget."""

    name: str
    title: str
    source: str
    rules: Callable[[Setting], tuple[Rule, ...]]
    needs_batch: bool = False


logger = logging.getLogger(__name__)
BISECTIONS = 18
BEST_TUPLE = (6 / 8, 8 / 8, 8 / 8, 61 / 61)
"""arXiv 2505.03531: k in the first layer, at the turn, in the last; the turn's place in depth."""
LOWER_STEP = 0.125
RANDOM_TOKENS = 512
"""Random inputs of each layer for LExI's measure."""


def uniform(setting: Setting) -> tuple[Rule, ...]:
    """The same top-k in every layer; k and k + 1 in turn where the budget lies between."""
    return _whole_numbers(setting, lambda k: Rule(top_k=k), _evenly(setting.model.moe_layers))


def begin_high_end(setting: Setting) -> tuple[Rule, ...]:
    """Experts by depth in two straight lines: the paper's (b, h, e, p), lowered to the budget.

    Read as: b experts in the first layer, h at layer p, e in the last. Its best tuple for the 61
    layers of DeepSeek-V3, (6, 8, 8, 61), is mapped to this depth and this k in proportion.
    """
    begin, high, end, place = BEST_TUPLE
    depth = np.linspace(0.0, 1.0, setting.model.moe_layers)
    share = np.interp(depth, [0.0, place, 1.0 + 1e-9], np.array([begin, high, end]))
    best: tuple[Rule, ...] = (Rule(top_k=1),) * setting.model.moe_layers
    for lowered in np.arange(setting.model.top_k, -LOWER_STEP, -LOWER_STEP):
        counts = np.clip(np.round(share * setting.model.top_k - lowered), 1, setting.model.top_k)
        rules = tuple(Rule(top_k=int(count)) for count in counts)
        if setting.mean_cost(rules) <= setting.budget.value:
            best = rules
    return best


def threshold(setting: Setting) -> tuple[Rule, ...]:
    """One share of the best gate for all layers."""
    return _tuned(setting, lambda share: Rule(threshold=share), rising=False)


def top_p(setting: Setting) -> tuple[Rule, ...]:
    """One share of the gate mass for all layers."""
    return _tuned(setting, lambda share: Rule(top_p=share), rising=True)


def lexi(setting: Setting) -> tuple[Rule, ...]:
    """Top-k per layer where random input says fewer experts move the layer's output least.

    LExI (arXiv 2509.02753): data-free; the allocation that moves the outputs least in total.
    """
    if setting.perturbation is None:
        raise LeanMoeError("strategy lexi needs each layer's response to random input")
    model = setting.model
    counts = range(1, model.top_k + 1)
    items = [
        [Offer(setting.cost(n, Rule(top_k=k)), setting.perturbation[n, k]) for k in counts]
        for n in range(model.moe_layers)
    ]
    chosen = cheapest(items, setting.budget.value * model.moe_layers)
    return tuple(Rule(top_k=counts[option]) for option in chosen)


def guaranteed(setting: Setting) -> tuple[Rule, ...]:
    """The same number of guaranteed experts in every layer, as near the budget as it goes."""
    return _whole_numbers(setting, lambda k: Rule(guaranteed=k), _evenly(setting.model.moe_layers))


def budget(setting: Setting) -> tuple[Rule, ...]:
    """The same distinct experts in every layer."""
    return _whole_numbers(
        setting,
        lambda count: Rule(budget=count),
        _evenly(setting.model.moe_layers),
        most=setting.model.experts,
    )


def leanmoe(setting: Setting) -> tuple[Rule, ...]:
    """A knapsack over layers: measured loss is least, the budget its limit.

    Rules of every kind compete in every layer: an own top-k here, shared experts there. Losses of
    single layers do not simply add, so the knapsack's choice is measured on calibration text
    beside the simple ways with the load's own `renormalise`, and the best of them is taken.
    """
    simple = [uniform]
    if setting.decode_batch > 1:
        simple.append(guaranteed)
    else:
        simple += [threshold, top_p]
    tried = [renormalised(method(setting), setting.renormalise) for method in simple]
    try:
        tried.insert(0, knapsack(setting))
    except LeanMoeError:
        logger.info("no combination of measured rules costs as little as the budget")
    if setting.measure is None:
        return tried[0]
    return min(dict.fromkeys(tried), key=setting.measure)


def renormalised(rules: Sequence[Rule], value: float = 0.0) -> tuple[Rule, ...]:
    """The same rules with another `renormalise`; with 0 the weights of the whole top-k are kept."""
    return tuple(replace(rule, renormalise=value) for rule in rules)


def _whole_numbers(
    setting: Setting,
    rule: Callable[[int], Rule],
    order: Sequence[int],
    most: int | None = None,
) -> tuple[Rule, ...]:
    """The largest number that fits everywhere, and one more in as many layers as still fit."""
    layers = setting.model.moe_layers
    fitting = 1
    for number in range(1, (most or setting.model.top_k) + 1):
        if setting.mean_cost([rule(number)] * layers) > setting.budget.value:
            break
        fitting = number
    rules = [rule(fitting)] * layers
    if fitting < (most or setting.model.top_k):
        for layer in order:
            more = [*rules[:layer], rule(fitting + 1), *rules[layer + 1 :]]
            if setting.mean_cost(more) <= setting.budget.value:
                rules = more
    return tuple(rules)


def _tuned(setting: Setting, rule: Callable[[float], Rule], rising: bool) -> tuple[Rule, ...]:
    """Bisects a share until the mean cost is the budget's (never above it)."""
    layers = setting.model.moe_layers
    low, high = 1e-3, 1.0
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        too_much = setting.mean_cost([rule(middle)] * layers) > setting.budget.value
        if too_much == rising:
            high = middle
        else:
            low = middle
    return (rule(low if rising else high),) * layers


def _evenly(layers: int) -> list[int]:
    """Every other layer first, so that a larger number is spread over the depth."""
    return [*range(0, layers, 2), *range(1, layers, 2)]


def knapsack(setting: Setting) -> tuple[Rule, ...]:
    """The rule of each layer for the least sum of single-layer losses within the budget."""
    options = layer_rules(setting.model.moe_layers, setting.sensitivities, setting.decode_batch)
    items = [
        [Offer(setting.cost(n, rule), loss) for rule, loss in rules]
        for n, rules in enumerate(options)
    ]
    chosen = cheapest(items, setting.budget.value * setting.model.moe_layers)
    return tuple(options[n][option][0] for n, option in enumerate(chosen))


def layer_rules(
    layers: int, sensitivities: Sequence[Sensitivity], decode_batch: int
) -> list[list[tuple[Rule, float]]]:
    """Per layer, every decode rule for this decode batch with its loss; full first."""
    rates = loss_rates(sensitivities)
    options: list[list[tuple[Rule, float]]] = [[(Rule(), 0.0)] for _ in range(layers)]
    for measured in sensitivities:
        if measured.phase == "decode" and measured.serves(decode_batch):
            loss = rates["decode", measured.layer] * max(measured.divergence, 0.0)
            options[measured.layer].append((measured.rule, loss))
    return options


@torch.inference_mode()
def perturbation(
    model: Any, tokens: int = RANDOM_TOKENS, seed: int = 0
) -> dict[tuple[int, int], float]:
    """Mean Frobenius distance between a layer's output at k and at full k, by (layer, k).

    Inputs are standard normal, as layer inputs are normalised (LExI, arXiv 2509.02753, stage 1).
    """
    shape = shape_of(model)
    moved: dict[tuple[int, int], float] = {}
    draw = torch.Generator().manual_seed(seed)
    for layer in find_layers(model):
        hidden_TD = layer.random_input(tokens, draw)
        bias_E = layer.ranking_bias(shape.router)
        logits_TE = layer.logits(hidden_TD, shape.router)
        outputs = []
        for k in range(1, shape.top_k + 1):
            routing = route(logits_TE, shape.router, shape.top_k, Rule(top_k=k), bias_E)
            outputs.append(layer.run_experts(hidden_TD, routing.ids_BTK, routing.weights_BTK))
        for k, output in enumerate(outputs, start=1):
            moved[layer.number, k] = float((output - outputs[-1]).norm() / tokens**0.5)
    return moved


STRATEGIES = Registry(
    "strategy",
    (
        Strategy("uniform", "the same top-k everywhere", "arXiv 2505.03531", uniform),
        Strategy(
            "bhep",
            "(b, h, e, p): experts in two straight lines over depth",
            "arXiv 2505.03531",
            begin_high_end,
        ),
        Strategy("threshold", "gates below a share of the best", "arXiv 2402.14800", threshold),
        Strategy("top_p", "the smallest set with a share of the mass", "arXiv 2403.07652", top_p),
        Strategy("lexi", "top-k per layer from random input", "arXiv 2509.02753", lexi),
        Strategy(
            "guaranteed",
            "own best, the rest from the active",
            "arXiv 2511.02237",
            guaranteed,
            needs_batch=True,
        ),
        Strategy(
            "budget",
            "at most so many distinct experts",
            "arXiv 2602.07265",
            budget,
            needs_batch=True,
        ),
        Strategy(
            "uniform_kept",
            "the same top-k, weights of the whole top-k kept",
            "leanmoe",
            lambda setting: renormalised(uniform(setting)),
        ),
        Strategy(
            "guaranteed_kept",
            "guaranteed, weights of the whole top-k kept",
            "leanmoe",
            lambda setting: renormalised(guaranteed(setting)),
            needs_batch=True,
        ),
        Strategy("leanmoe", "rules per layer by measured loss", "leanmoe", leanmoe),
    ),
)
