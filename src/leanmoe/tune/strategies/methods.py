"""The published methods, each made to spend a given budget.

A method with one number (a threshold, a share) has it tuned by replay until its mean cost is the
budget's. A method with whole numbers only takes the larger one in as many layers as fit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from leanmoe.errors import LeanMoeError
from leanmoe.plan import Rule
from leanmoe.tune.allocate import Option, cheapest

if TYPE_CHECKING:
    from leanmoe.tune.strategies.registry import Setting

BISECTIONS = 18
MIDDLE_SHARE = 0.5


def uniform(setting: Setting) -> tuple[Rule, ...]:
    """The same top-k in every layer; k and k + 1 in turn where the budget lies between."""
    return _whole_numbers(setting, lambda k: Rule(top_k=k), _evenly(setting.model.moe_layers))


def uniform_kept(setting: Setting) -> tuple[Rule, ...]:
    """Uniform top-k whose experts weigh what they weigh beside the whole top-k."""
    return tuple(replace(rule, keep_weights=True) for rule in uniform(setting))


def guaranteed_kept(setting: Setting) -> tuple[Rule, ...]:
    """Guaranteed experts with the weights of the whole top-k."""
    return tuple(replace(rule, keep_weights=True) for rule in guaranteed(setting))


def begin_and_end(setting: Setting) -> tuple[Rule, ...]:
    """More experts in the first and last layers, fewer in the middle.

    The paper's (b,h,e,p) shapes keep full k where the model begins and ends. Here the middle half
    of the layers gives up its experts first, mapped to this model's depth.
    """
    layers = setting.model.moe_layers
    middle = sorted(range(layers), key=lambda n: abs(n - (layers - 1) / 2), reverse=True)
    return _shaped(setting, middle)


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


def _shaped(setting: Setting, outside_first: Sequence[int]) -> tuple[Rule, ...]:
    """Full k from the outside in, as far as the budget goes over the least k inside."""
    model = setting.model
    inside = [
        n for n in outside_first if n in outside_first[int(len(outside_first) * MIDDLE_SHARE) :]
    ]
    for k in range(model.top_k, 0, -1):
        rules = [
            Rule(top_k=k) if n in inside else Rule(top_k=model.top_k)
            for n in range(model.moe_layers)
        ]
        if setting.mean_cost(rules) <= setting.budget.value:
            return tuple(rules)
    for outer in range(model.top_k, 0, -1):
        rules = [
            Rule(top_k=1) if n in inside else Rule(top_k=outer) for n in range(model.moe_layers)
        ]
        if setting.mean_cost(rules) <= setting.budget.value:
            break
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
