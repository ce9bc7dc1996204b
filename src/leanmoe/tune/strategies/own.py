"""leanmoe's own: in every layer the rule that measured least loss for its cost."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from leanmoe.plan import Rule
from leanmoe.tune.allocate import Option, cheapest
from leanmoe.tune.sensitivity import Sensitivity

if TYPE_CHECKING:
    from leanmoe.tune.strategies.registry import Setting


def leanmoe(setting: Setting) -> tuple[Rule, ...]:
    """A knapsack over layers: measured divergence to lose least, the budget as its limit.

    Rules of every kind compete in every layer: an own top-k here, shared experts there.
    """
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
    """Per layer, every decode rule for this company with its measured divergence; full first."""
    options: list[list[tuple[Rule, float]]] = [[(Rule(), 0.0)] for _ in range(layers)]
    for found in sensitivities:
        tried = found.candidate
        fits = not tried.rule.depends_on_company or tried.together == together
        if tried.phase == "decode" and fits:
            options[tried.layer].append((tried.rule, max(found.divergence, 0.0)))
    return options
