"""The published methods, each made to spend a given budget.

A method with one number (a threshold, a share) has it tuned by replay until its mean cost is the
budget's. A method with whole numbers only takes the larger one in as many layers as fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from leanmoe.core.errors import LeanMoeError
from leanmoe.plan import Rule
from leanmoe.tune.allocate import Option, cheapest

if TYPE_CHECKING:
    from leanmoe.tune.strategies.registry import Setting

BISECTIONS = 18
BEST_TUPLE = (6 / 8, 8 / 8, 8 / 8, 61 / 61)
"""arXiv 2505.03531: k in the first layer, at the turn, in the last; the turn's place in depth."""
LOWER_STEP = 0.125


def uniform(setting: Setting) -> tuple[Rule, ...]:
    """The same top-k in every layer; k and k + 1 in turn where the budget lies between."""
    return _whole_numbers(setting, lambda k: Rule(top_k=k), _evenly(setting.model.moe_layers))


def uniform_kept(setting: Setting) -> tuple[Rule, ...]:
    """Uniform top-k whose experts weigh what they weigh beside the whole top-k."""
    return kept(uniform(setting))


def guaranteed_kept(setting: Setting) -> tuple[Rule, ...]:
    """Guaranteed experts with the weights of the whole top-k."""
    return kept(guaranteed(setting))


def kept(rules: Sequence[Rule]) -> tuple[Rule, ...]:
    """The same rules with the weights of the whole top-k."""
    return tuple(replace(rule, keep_weights=True) for rule in rules)


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


def lexi(setting: Setting) -> tuple[Rule, ...]:
    """Top-k per layer where random input says fewer experts move the layer's output least.

    LExI (arXiv 2509.02753): data-free; the allocation that moves the outputs least in total.
    """
    if setting.perturbation is None:
        raise LeanMoeError("strategy lexi needs each layer's response to random input")
    model = setting.model
    counts = range(1, model.top_k + 1)
    items = [
        [Option(setting.cost(n, Rule(top_k=k)), setting.perturbation[n, k]) for k in counts]
        for n in range(model.moe_layers)
    ]
    chosen = cheapest(items, setting.budget.value * model.moe_layers)
    return tuple(Rule(top_k=counts[option]) for option in chosen)


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
