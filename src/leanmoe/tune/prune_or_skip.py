"""Fewer experts in total, fewer a token, or both: what each buys at a load and a memory budget.

arXiv 2505.03531 finds that fewer experts in total gain little and cost much. Here that is measured
for the model at hand: beside each pruning stands the skipping that is as fast.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from leanmoe.models.shape import MoEShape
from leanmoe.plan import Plan, Rule
from leanmoe.profile.replay import replay
from leanmoe.profile.saved import Profile
from leanmoe.prune.criteria import CRITERIA, rank_experts
from leanmoe.prune.kept_experts import Kept, best_experts, kept_count, restricted
from leanmoe.stats.paired import (
    Estimate,
    Losses,
    loss_difference,
    loss_increase,
)
from leanmoe.tune.allocate import Option, pareto
from leanmoe.tune.inputs import Inputs
from leanmoe.tune.layer_time import LayerTime
from leanmoe.tune.sensitivity import (
    Phase,
    Sensitivity,
)
from leanmoe.tune.settings import TuneSettings
from leanmoe.tune.strategies import (
    layer_rules,
)
from leanmoe.tune.validate import plan_losses

BUDGETS = ("87.5%", "75%", "50%")
"""Shares of the experts that are compared, beside the one asked for."""
PRUNING, SKIPPING, BOTH = "fewer in total", "fewer a token", "both"
Store = Callable[[str, Callable[[], Any]], Any]


def kept_by_budget(inputs: Inputs, settings: TuneSettings, store: Store) -> dict[str, Kept]:
    """The experts that remain at each memory budget, the run's own included."""
    shape = inputs.shape
    budgets = list(dict.fromkeys([str(settings.keep), *BUDGETS]))
    counts = {budget: kept_count(budget, shape) for budget in budgets}

    def compute() -> Any:
        criterion, least = CRITERIA.get(settings.criterion), min(counts.values())
        seed, windows = settings.seed, inputs.profiled
        scores_LE = rank_experts(criterion, shape, seed, inputs.model, windows, least)
        return {budget: best_experts(scores_LE, count, shape) for budget, count in counts.items()}

    stored = store("experts-kept", compute)
    return {
        budget: tuple(tuple(int(expert) for expert in layer) for layer in layers)
        for budget, layers in stored.items()
    }


def total_or_activated(
    inputs: Inputs,
    profile: Profile,
    sensitivities: Sequence[Sensitivity],
    times: Mapping[int, Mapping[Phase, LayerTime]],
    kept: Mapping[str, Kept],
    settings: TuneSettings,
    store: Store,
) -> list[dict[str, Any]]:
    """A row for each load, memory budget and way, with losses on the same held-out text.

    Time is of the experts in decode steps, as a share of the full model's, modelled from layers
    timed on this machine. "both" may take as long as skipping half as deep on top of pruning.
    """
    measured = _Measured(inputs, settings, store)
    nothing = (Rule(),) * len(profile.layers)
    full = measured.losses(nothing, None)
    rows: list[dict[str, Any]] = []
    for load in settings.concurrency:
        decode = times[load]["decode"]
        everything = _seconds(profile, nothing, load, decode)
        for budget, experts in kept.items():
            pruned = tuple(Rule(experts=chosen) for chosen in experts)
            seconds = _seconds(profile, pruned, load, decode)
            skipped = _fastest_within(profile, sensitivities, load, decode, seconds)
            half = _fastest_within(profile, sensitivities, load, decode, (everything + seconds) / 2)
            both = restricted(Plan.per_layer(inputs.shape.fingerprint(), half), experts)
            found = {}
            for way, rules in (
                (PRUNING, pruned),
                (SKIPPING, skipped),
                (BOTH, both.bands[0].rules),
            ):
                found[way] = measured.losses(rules, load)
                rows.append(
                    {
                        "concurrency": load,
                        "budget": budget,
                        "way": way,
                        "memory": 1.0
                        if way == SKIPPING
                        else memory_share(inputs.shape, len(experts[0])),
                        "time": _seconds(profile, rules, load, decode) / everything,
                        "loss": loss_increase(
                            full, found[way], settings.confidence, settings.seed
                        ).to_json(),
                    }
                )
            against = loss_difference(
                full, found[SKIPPING], found[PRUNING], settings.confidence, settings.seed
            )
            is_as_fast = rows[-2]["time"] <= rows[-3]["time"]
            rows[-2]["against"] = {**against.to_json(), "verdict": verdict(against, is_as_fast)}
    return rows


def verdict(found: Estimate, is_as_fast: bool = True) -> str:
    """Which of two as fast ways loses less, if that is sure; none where skipping is slower."""
    if not is_as_fast:
        return "no skipping is as fast"
    if found.high < 0:
        return f"{SKIPPING} loses less"
    return f"{PRUNING} loses less" if found.low > 0 else "undecided"


def memory_share(shape: MoEShape, kept: int) -> float:
    """Bytes of all weights with so many experts a layer, as a share of the model's."""
    everything = shape.total_parameters() * shape.weight_bytes
    gone = (shape.experts - kept) * len(shape.moe_layers) * shape.expert_bytes
    return float(1 - gone / everything)


class _Measured:
    """Held-out losses, each set of rules measured once."""

    def __init__(self, inputs: Inputs, settings: TuneSettings, store: Store) -> None:
        self._inputs, self._settings, self._store = inputs, settings, store

    def losses(self, rules: Sequence[Rule], decode_batch: int | None) -> Losses:
        scope = any(rule.is_batch_aware for rule in rules)
        text = json.dumps([[rule.to_json() for rule in rules], decode_batch if scope else None])
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        plan = Plan.per_layer(self._inputs.shape.fingerprint(), tuple(rules))

        def compute() -> Any:
            where = self._inputs.compared
            what = "Total or activated experts"
            return plan_losses(self._inputs, where, plan, decode_batch, what).to_json()

        return Losses.from_json(self._store(f"total-{digest}", compute))


def _seconds(profile: Profile, rules: Sequence[Rule], load: int, time: LayerTime) -> float:
    replays = [replay(profile, layer, rule, load) for layer, rule in enumerate(rules)]
    return sum(
        time.seconds(r.slots * load, r.distinct, not _is_pruned_only(rule))
        for r, rule in zip(replays, rules, strict=True)
    )


def _is_pruned_only(rule: Rule) -> bool:
    """A pruned checkpoint routes as the model itself: nothing is added to its time."""
    return replace(rule, experts=None).is_empty


def _fastest_within(
    profile: Profile,
    sensitivities: Sequence[Sensitivity],
    load: int,
    time: LayerTime,
    seconds: float,
) -> tuple[Rule, ...]:
    """The rules of least predicted loss that take at most so long; the fastest if none do."""
    options = layer_rules(len(profile.layers), sensitivities, load)
    items = []
    for layer, rules in enumerate(options):
        item = []
        for rule, loss in rules:
            found = replay(profile, layer, rule, load)
            took = time.seconds(found.slots * load, found.distinct, not rule.is_empty)
            item.append(Option(loss, took))
        items.append(item)
    allocations = pareto(items)
    best = next((a for a in allocations if a.time <= seconds), allocations[-1])
    return tuple(options[layer][option][0] for layer, option in enumerate(best.chosen))
