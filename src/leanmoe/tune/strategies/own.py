"""leanmoe's own: in every layer the rule that loses least for its cost, as measured."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING

from leanmoe.core.errors import LeanMoeError
from leanmoe.plan import Rule
from leanmoe.tune.allocate import Option, cheapest
from leanmoe.tune.sensitivity import Sensitivity, loss_rates
from leanmoe.tune.strategies import methods

if TYPE_CHECKING:
    from leanmoe.tune.strategies.registry import Setting

logger = logging.getLogger(__name__)


def leanmoe(setting: Setting) -> tuple[Rule, ...]:
    """A knapsack over layers: measured loss is least, the budget its limit.

    Rules of every kind compete in every layer: an own top-k here, shared experts there. Losses of
    single layers do not simply add, so the knapsack's choice is measured on calibration text
    beside the simple ways to keep the weights of the whole top-k, and the best of them is taken.
    """
    simple = [methods.uniform]
    if setting.together > 1:
        simple.append(methods.guaranteed)
    else:
        simple += [methods.threshold, methods.top_p]
    tried = [methods.kept(method(setting)) for method in simple]
    try:
        tried.insert(0, knapsack(setting))
    except LeanMoeError:
        logger.info("no combination of measured rules costs as little as the budget")
    if setting.measure is None:
        return tried[0]
    return min(dict.fromkeys(tried), key=setting.measure)


def knapsack(setting: Setting) -> tuple[Rule, ...]:
    """The rule of each layer for the least sum of single-layer losses within the budget."""
    options = layer_rules(setting.model.moe_layers, setting.sensitivities, setting.together)
    items = [
        [Option(setting.cost(n, rule), loss) for rule, loss in rules]
        for n, rules in enumerate(options)
    ]
    chosen = cheapest(items, setting.budget.value * setting.model.moe_layers)
    return tuple(options[n][option][0] for n, option in enumerate(chosen))


def layer_rules(
    layers: int, sensitivities: Sequence[Sensitivity], together: int
) -> list[list[tuple[Rule, float]]]:
    """Per layer, every decode rule for this company with its loss; full first."""
    rates = loss_rates(sensitivities)
    options: list[list[tuple[Rule, float]]] = [[(Rule(), 0.0)] for _ in range(layers)]
    for found in sensitivities:
        tried = found.candidate
        fits = not tried.rule.depends_on_company or tried.together == together
        if tried.phase == "decode" and fits:
            loss = rates["decode", tried.layer] * max(found.divergence, 0.0)
            options[tried.layer].append((tried.rule, loss))
    return options
