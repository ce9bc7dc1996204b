"""From measured losses and times to the plans that are worth a full validation, safest first."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from leanmoe.plan import Rule
from leanmoe.tune.allocate import Option, cheapest
from leanmoe.tune.candidates import Phase
from leanmoe.tune.layer_time import LayerTime
from leanmoe.tune.sensitivity import Sensitivity, loss_rates

SHARES_OF_MARGIN = (0.5, 0.75, 1.0, 1.25, 1.5)
"""Predicted losses to aim at, as shares of the margin. Predictions miss both ways; the first plan
that fails on held-out text ends the sequence."""


@dataclass(frozen=True)
class Workload:
    """What one request costs at a load: its tokens, and the layer times of both kinds of step."""

    together: int
    prompt_tokens: int
    output_tokens: int
    prefill_step: int
    times: Mapping[Phase, LayerTime]

    def seconds(self, phase: Phase, slots: float, distinct: float, has_rule: bool) -> float:
        """Time of one layer for one request's share of the steps it takes part in."""
        if phase == "prompt":
            rows = slots * self.prefill_step
            step = self.times[phase].seconds(rows, distinct, has_rule)
            return step * self.prompt_tokens / self.prefill_step
        step = self.times[phase].seconds(slots * self.together, distinct, has_rule)
        return step * self.output_tokens / self.together


@dataclass(frozen=True)
class Point:
    """A plan for one load before it is validated."""

    prompt: tuple[Rule, ...]
    decode: tuple[Rule, ...]
    predicted_loss: float
    """Sum of single-layer losses, nats per token."""
    modelled_time: float
    """Time of all MoE layers, as a share of the full model's."""
    strategy: str = "leanmoe"

    @property
    def name(self) -> str:
        """What to call it beside others of its front."""
        return f"{100 * self.modelled_time:.0f}% of the time in experts"


@dataclass(frozen=True)
class _Item:
    phase: Phase
    layer: int
    rules: list[Rule]
    options: list[Option]


def front(
    sensitivities: Sequence[Sensitivity],
    full: Mapping[tuple[Phase, int], tuple[float, float]],
    workload: Workload,
    budgets: Sequence[float],
    prompt: tuple[Rule, ...] | None = None,
) -> list[Point]:
    """The fastest plan for each loss budget (nats per token), without repeats, safest first.

    `full` gives the full model's slots and distinct experts by phase and layer. `prompt` fixes
    the prompt rules, and puts the plan with nothing but them first; None lets them be chosen
    together with the rules for decoding.
    """
    items = _items(sensitivities, full, workload, prompt)
    if prompt is not None:
        budgets = [0.0, *budgets]
    everything = sum(item.options[0].time for item in _items((), full, workload, None))
    points: list[Point] = []
    for budget in budgets:
        fixed = sum(min(o.loss for o in i.options) for i in items)
        chosen = cheapest([item.options for item in items], max(budget, fixed))
        point = _point(items, chosen, everything)
        if not points or (point.prompt, point.decode) != (points[-1].prompt, points[-1].decode):
            points.append(point)
    return points


def _items(
    sensitivities: Sequence[Sensitivity],
    full: Mapping[tuple[Phase, int], tuple[float, float]],
    workload: Workload,
    prompt: tuple[Rule, ...] | None,
) -> list[_Item]:
    items = []
    rates = loss_rates(sensitivities)
    for (phase, layer), (slots, distinct) in sorted(full.items()):
        item = _Item(phase, layer, [], [])
        _offer(item, Rule(), 0.0, workload.seconds(phase, slots, distinct, has_rule=False))
        for found in sensitivities:
            tried = found.candidate
            fits = not tried.rule.depends_on_company or tried.together == workload.together
            if (tried.phase, tried.layer) == (phase, layer) and fits:
                seconds = workload.seconds(phase, found.slots, found.distinct, has_rule=True)
                loss = rates[phase, layer] * max(found.divergence, 0.0)
                _offer(item, tried.rule, loss, seconds)
        if phase == "prompt" and prompt is not None:
            item = _only(item, prompt[layer] if prompt else Rule())
        items.append(item)
    return items


def _offer(item: _Item, rule: Rule, loss: float, seconds: float) -> None:
    item.rules.append(rule)
    item.options.append(Option(loss, seconds))


def _only(item: _Item, rule: Rule) -> _Item:
    kept = [n for n, offered in enumerate(item.rules) if offered == rule]
    return _Item(
        item.phase, item.layer, [item.rules[n] for n in kept], [item.options[n] for n in kept]
    )


def _point(items: Sequence[_Item], chosen: Sequence[int], everything: float) -> Point:
    rules: dict[Phase, list[Rule]] = {"prompt": [], "decode": []}
    for item, option in zip(items, chosen, strict=True):
        rules[item.phase].append(item.rules[option])
    taken = [item.options[option] for item, option in zip(items, chosen, strict=True)]
    no_prompt = all(rule.is_empty for rule in rules["prompt"])
    return Point(
        () if no_prompt else tuple(rules["prompt"]),
        tuple(rules["decode"]),
        sum(option.loss for option in taken),
        sum(option.time for option in taken) / everything,
    )
