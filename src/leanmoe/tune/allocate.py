"""Which rule each layer gets: every best trade of loss for time, by dynamic programming.

A multiple-choice knapsack: one option of every item is taken; losses add, times add. Losses of
single layers do not simply add in the real model, so what comes out are candidates to be validated,
not results. "Time" is any cost that adds: seconds, experts a token, distinct experts a step.

Letters: C partial allocations.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from leanmoe.core.errors import LeanMoeError
from leanmoe.plan import Rule
from leanmoe.results.tune import Phase, Sensitivity
from leanmoe.tune.context import TuneContext
from leanmoe.tune.layers import PhaseTimes, loss_rates, prefill_step

POINTS = 4096
"""Partial allocations kept after each item. Below that many the front is exact. Above, the range
of losses is cut into so many equal parts and the fastest of each part is kept: each item's thinning
may cost 1/POINTS of that range in loss, all together items/POINTS; losses and times that are
reported are never rounded."""

ROUNDING = 1e-9
"""Relative: a budget is kept if float sums exceed it by no more."""
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Offer:
    """One way to set an item: what it costs in quality and in time."""

    loss: float
    time: float


@dataclass(frozen=True)
class Allocation:
    """One option for every item; no other allocation is better in both sums."""

    loss: float
    time: float
    chosen: tuple[int, ...]
    """The number of each item's option."""


def pareto(
    items: Sequence[Sequence[Offer]], most_loss: float = float("inf"), points: int = POINTS
) -> tuple[Allocation, ...]:
    """All best allocations whose loss is at most `most_loss`, by rising loss and falling time.

    Losses below zero count as zero: what one layer seems to win is noise, and must not pay for
    what another one loses. Raises LeanMoeError when an option is not a number, or when even the
    smallest losses together are above `most_loss`.
    """
    allowed = most_loss * (1 + ROUNDING)
    loss_C, time_C = np.zeros(1), np.zeros(1)
    taken: list[tuple[NDArray[np.int64], NDArray[np.int64]]] = []
    for item in items:
        option_loss, option_time = _arrays(item)
        all_loss = (loss_C[:, None] + option_loss[None, :]).ravel()
        all_time = (time_C[:, None] + option_time[None, :]).ravel()
        kept = _best(all_loss, all_time, allowed, points)
        if not len(kept):
            raise LeanMoeError(
                f"no plan loses at most {most_loss:.4g}: every option of a layer loses more"
            )
        loss_C, time_C = all_loss[kept], all_time[kept]
        taken.append((kept // len(item), kept % len(item)))
    return tuple(
        Allocation(float(loss_C[n]), float(time_C[n]), _chosen(taken, n))
        for n in range(len(loss_C))
    )


def cheapest(items: Sequence[Sequence[Offer]], budget: float) -> tuple[int, ...]:
    """The option of each item with the least total time whose losses add to at most `budget`.

    Raises LeanMoeError when even the smallest losses are above the budget.
    """
    if budget < 0:
        raise LeanMoeError(f"loss budget is {budget}: it must not be negative")
    return pareto(items, budget)[-1].chosen


def _arrays(item: Sequence[Offer]) -> tuple[Floats, Floats]:
    if not item:
        raise LeanMoeError("an item to allocate has no option")
    loss = np.array([option.loss for option in item], dtype=np.float64)
    time = np.array([option.time for option in item], dtype=np.float64)
    if not (np.isfinite(loss).all() and np.isfinite(time).all()):
        raise LeanMoeError("an option to allocate has a loss or a time that is not a finite number")
    return np.maximum(loss, 0.0), time


def _best(loss: Floats, time: Floats, allowed: float, points: int) -> NDArray[np.int64]:
    """Numbers of the allocations that none is better than, by rising loss, at most `points`."""
    order = np.lexsort((time, loss))
    order = order[loss[order] <= allowed]
    ordered = time[order]
    before = np.concatenate(([np.inf], np.minimum.accumulate(ordered)[:-1]))
    kept = order[ordered < before]
    if len(kept) <= points:
        return kept
    start, end = loss[kept[0]], loss[kept[-1]]
    part = np.floor((loss[kept] - start) / (end - start) * (points - 1))
    fastest_of_part = np.append(part[1:] != part[:-1], True)
    fastest_of_part[0] = True
    thinned: NDArray[np.int64] = kept[fastest_of_part]
    return thinned


def _chosen(
    taken: Sequence[tuple[NDArray[np.int64], NDArray[np.int64]]], place: int
) -> tuple[int, ...]:
    chosen = []
    for before, option in reversed(taken):
        chosen.append(int(option[place]))
        place = int(before[place])
    return tuple(reversed(chosen))


SHARES_OF_MARGIN = (0.15, 0.3, 0.5, 0.75, 1.0, 1.5)
"""Predicted losses to aim at, as shares of the margin. Predictions miss both ways; the first plan
that fails on held-out text ends the sequence."""


PREFILL_STEPS = 8
"""Large steps that are replayed: they hardly differ."""


@dataclass(frozen=True)
class Workload:
    """One request at a concurrency: its tokens, and the layer times of both kinds of step."""

    decode_batch: int
    prompt_tokens: int
    output_tokens: int
    prefill_step: int
    times: PhaseTimes

    def seconds(self, phase: Phase, slots: float, distinct: float, has_rule: bool) -> float:
        """Time of one layer for one request's share of the steps it takes part in."""
        if phase == "prompt":
            rows = slots * self.prefill_step
            step = self.times[phase].seconds(rows, distinct, has_rule)
            return step * self.prompt_tokens / self.prefill_step
        step = self.times[phase].seconds(slots * self.decode_batch, distinct, has_rule)
        return step * self.output_tokens / self.decode_batch


@dataclass(frozen=True)
class FrontPoint:
    """A plan for one concurrency before it is validated."""

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
    options: list[Offer]


def points_for(
    context: TuneContext,
    sensitivities: Sequence[Sensitivity],
    decode_batch: int,
    times: PhaseTimes,
    budgets: Sequence[float],
    prompt: tuple[Rule, ...] | None,
) -> list[FrontPoint]:
    """The plans to validate at one concurrency, safest first; for the others see `front`."""
    settings, prefill = context.settings, prefill_step(context.profile)
    workload = Workload(decode_batch, settings.input_len, settings.output_len, prefill, times)
    full = _full_activity(context, decode_batch, prefill)
    return front(sensitivities, full, workload, budgets, prompt)


def _full_activity(
    context: TuneContext, decode_batch: int, prefill: int
) -> dict[tuple[Phase, int], tuple[float, float]]:
    """Slots a token and distinct experts a step of the full model, by phase and layer."""
    activity: dict[tuple[Phase, int], tuple[float, float]] = {}
    for layer in range(context.profile.model.moe_layers):
        decode = context.activity(layer, Rule(), decode_batch)
        prompt = context.activity(layer, Rule(), prefill, PREFILL_STEPS)
        activity["decode", layer] = (decode.slots, decode.distinct)
        activity["prompt", layer] = (prompt.slots, prompt.distinct)
    return activity


def front(
    sensitivities: Sequence[Sensitivity],
    full: Mapping[tuple[Phase, int], tuple[float, float]],
    workload: Workload,
    budgets: Sequence[float],
    prompt: tuple[Rule, ...] | None = None,
) -> list[FrontPoint]:
    """The fastest plan for each loss budget (nats per token), without repeats, safest first.

    `full` gives the full model's slots and distinct experts by phase and layer. `prompt` fixes
    the prompt rules, and puts the plan with nothing but them first; None lets them be chosen
    together with the rules for decoding.
    """
    items = _items(sensitivities, full, workload, prompt)
    if prompt is not None:
        budgets = [0.0, *budgets]
    everything = sum(item.options[0].time for item in _items((), full, workload, None))
    points: list[FrontPoint] = []
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
        for measured in sensitivities:
            is_here = (measured.phase, measured.layer) == (phase, layer)
            if is_here and measured.serves(workload.decode_batch):
                seconds = workload.seconds(phase, measured.slots, measured.distinct, has_rule=True)
                loss = rates[phase, layer] * max(measured.divergence, 0.0)
                _offer(item, measured.rule, loss, seconds)
        if phase == "prompt" and prompt is not None:
            item = _only(item, prompt[layer] if prompt else Rule())
        items.append(item)
    return items


def _offer(item: _Item, rule: Rule, loss: float, seconds: float) -> None:
    item.rules.append(rule)
    item.options.append(Offer(loss, seconds))


def _only(item: _Item, rule: Rule) -> _Item:
    kept = [n for n, offered in enumerate(item.rules) if offered == rule]
    return _Item(
        item.phase, item.layer, [item.rules[n] for n in kept], [item.options[n] for n in kept]
    )


def _point(items: Sequence[_Item], chosen: Sequence[int], everything: float) -> FrontPoint:
    rules: dict[Phase, list[Rule]] = {"prompt": [], "decode": []}
    for item, option in zip(items, chosen, strict=True):
        rules[item.phase].append(item.rules[option])
    taken = [item.options[option] for item, option in zip(items, chosen, strict=True)]
    no_prompt = all(rule.is_empty for rule in rules["prompt"])
    return FrontPoint(
        () if no_prompt else tuple(rules["prompt"]),
        tuple(rules["decode"]),
        sum(option.loss for option in taken),
        sum(option.time for option in taken) / everything,
    )
