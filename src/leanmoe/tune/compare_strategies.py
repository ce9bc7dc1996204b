"""Every strategy at one load, on the same budget and the same held-out text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cache
from typing import Any

from leanmoe.plan import Plan, Rule
from leanmoe.profile.replay import replay
from leanmoe.profile.saved import Profile
from leanmoe.stats.paired import (
    Losses,
    loss_difference,
    loss_increase,
)
from leanmoe.tune.allocate import (
    Point,
)
from leanmoe.tune.inputs import Inputs
from leanmoe.tune.layer_time import (
    LayerTime,
    perturbation,
)
from leanmoe.tune.sensitivity import (
    Phase,
    Sensitivity,
)
from leanmoe.tune.settings import TuneSettings
from leanmoe.tune.strategies import STRATEGIES, Budget, Kind, Setting, Strategy, strategy
from leanmoe.tune.validate import plan_losses

SLOTS_SHARE = 0.75
"""Of the full model's experts a token, for a request on its own: the paper's k = 6 of 8."""
DISTINCT_SHARE = 0.8
"""Of the full model's distinct experts a step, for requests together."""
CHOOSING = "Strategy leanmoe, choosing on calibration text"
BUDGET_SHARES = (0.95, 0.9, 0.85, 0.8, 0.7, 0.6, 0.5)
"""Of the full model's cost, where one strategy is run by name; safest first."""


def compare_strategies(
    inputs: Inputs,
    profile: Profile,
    sensitivities: Sequence[Sensitivity],
    decode_batch: int,
    settings: TuneSettings,
    store: Callable[[str, Callable[[], Any]], Any],
) -> dict[str, Any]:
    """One table: what each strategy loses, and how it stands against leanmoe's own."""
    setting = _setting(inputs, profile, sensitivities, decode_batch)
    nothing = (Rule(),) * len(profile.layers)
    full = Losses.from_json(store("strategy-full", _losses_of(inputs, nothing, None, "full")))
    found: dict[str, tuple[tuple[Rule, ...], Losses]] = {}
    for name, each in STRATEGIES.items():
        if each.needs_batch and decode_batch < 2:
            continue
        rules = each.rules(setting)
        stored = store(
            f"strategy-{decode_batch}-{name}", _losses_of(inputs, rules, decode_batch, name)
        )
        found[name] = (rules, Losses.from_json(stored))
    own = found["leanmoe"][1]
    rows = []
    for name, (rules, lost) in found.items():
        rows.append(_row(STRATEGIES[name], rules, lost, own, full, profile, decode_batch, settings))
    return {
        "concurrency": decode_batch,
        "budget": {"kind": setting.budget.kind, "value": setting.budget.value},
        "rows": rows,
    }


def strategy_points(
    inputs: Inputs,
    profile: Profile,
    sensitivities: Sequence[Sensitivity],
    decode_batch: int,
    times: Mapping[Phase, LayerTime],
    settings: TuneSettings,
) -> list[Point]:
    """The strategy that `settings` names, at ever smaller budgets: plans to validate in turn."""
    each = strategy(settings.strategy)
    if each.needs_batch and decode_batch < 2:
        return []
    whole = Budget("slots" if decode_batch == 1 else "distinct", float("inf"))
    setting = _setting(inputs, profile, sensitivities, decode_batch, whole)
    nothing = (Rule(),) * len(profile.layers)
    full = setting.mean_cost(nothing)
    points: list[Point] = []
    for share in BUDGET_SHARES:
        rules = each.rules(replace(setting, budget=Budget(whole.kind, share * full)))
        time = _time(profile, rules, decode_batch, times) / _time(
            profile, nothing, decode_batch, times
        )
        point = Point((), rules, 0.0, time, settings.strategy)
        if not points or point.decode != points[-1].decode:
            points.append(point)
    return points


def _time(
    profile: Profile, rules: Sequence[Rule], decode_batch: int, times: Mapping[Phase, LayerTime]
) -> float:
    replays = [replay(profile, layer, rule, decode_batch) for layer, rule in enumerate(rules)]
    return sum(
        times["decode"].seconds(r.slots * decode_batch, r.distinct, not rule.is_empty)
        for r, rule in zip(replays, rules, strict=True)
    )


def _losses_of(
    inputs: Inputs, rules: tuple[Rule, ...], decode_batch: int | None, name: str
) -> Callable[[], Any]:
    def compute() -> Any:
        plan = Plan.per_layer(inputs.shape.fingerprint(), rules)
        what = f"Strategy {name}" + (f", {decode_batch} at once" if decode_batch else "")
        return plan_losses(inputs, inputs.compared, plan, decode_batch, what).to_json()

    return compute


def _setting(
    inputs: Inputs,
    profile: Profile,
    sensitivities: Sequence[Sensitivity],
    decode_batch: int,
    budget: Budget | None = None,
) -> Setting:
    layers = len(profile.layers)

    @cache
    def cost(layer: int, rule: Rule) -> float:
        result = replay(profile, layer, rule, decode_batch)
        return result.slots if decode_batch == 1 else result.distinct

    if budget is None:
        full = sum(cost(layer, Rule()) for layer in range(layers)) / layers
        kind: Kind = "slots" if decode_batch == 1 else "distinct"
        budget = Budget(kind, full * (SLOTS_SHARE if decode_batch == 1 else DISTINCT_SHARE))

    def measure(rules: tuple[Rule, ...]) -> float:
        plan = Plan.per_layer(inputs.shape.fingerprint(), rules)
        return plan_losses(inputs, inputs.searched, plan, decode_batch, CHOOSING).mean

    return Setting(
        inputs.shape.fingerprint(),
        decode_batch,
        budget,
        cost,
        tuple(sensitivities),
        perturbation(inputs.model),
        measure,
    )


def _row(
    each: Strategy,
    rules: tuple[Rule, ...],
    lost: Losses,
    own: Losses,
    full: Losses,
    profile: Profile,
    decode_batch: int,
    settings: TuneSettings,
) -> dict[str, Any]:
    replays = [replay(profile, layer, rule, decode_batch) for layer, rule in enumerate(rules)]
    row: dict[str, Any] = {
        "strategy": each.name,
        "title": each.title,
        "source": each.source,
        "slots": sum(r.slots for r in replays) / len(replays),
        "distinct": sum(r.distinct for r in replays) / len(replays),
        "loss": loss_increase(full, lost, settings.confidence, settings.seed).to_json(),
        "rules": [rule.to_json() for rule in rules],
    }
    if each.name != "leanmoe":
        against = loss_difference(full, lost, own, settings.confidence, settings.seed)
        row["against"] = {
            "difference": against.ratio,
            "low": against.low,
            "high": against.high,
        }
    return row
