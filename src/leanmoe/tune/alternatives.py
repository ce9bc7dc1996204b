"""What the search's plans stand beside: every strategy on one budget, and experts pruned away.

arXiv 2505.03531 finds that fewer experts in total gain little and cost much. Here that is measured
for the model at hand: beside each pruning stands the skipping that is as fast.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial

from leanmoe.core.intervals import LossGap
from leanmoe.models.shape import MoEShape
from leanmoe.plan import Plan, Rule
from leanmoe.prune.criteria import (
    CRITERIA,
    Kept,
    best_experts,
    kept_count,
    rank_experts,
    restricted,
)
from leanmoe.results.tune import (
    PruneOrSkipRow,
    PruneOrSkipVerdict,
    Sensitivity,
    StrategyBudget,
    StrategyRow,
    StrategyTable,
)
from leanmoe.stats.losses import Losses
from leanmoe.stats.paired import Estimate, loss_difference, loss_increase
from leanmoe.tune.allocate import Offer, pareto
from leanmoe.tune.context import EXPERTS_KEPT, STRATEGY, TOTAL_OR_ACTIVATED, TuneContext, digest
from leanmoe.tune.layers import LayerTime, PhaseTimes
from leanmoe.tune.renormalise import chosen
from leanmoe.tune.strategies import (
    STRATEGIES,
    Setting,
    Strategy,
    layer_rules,
    perturbation,
)

SLOTS_SHARE = 0.75
"""Of the full model's experts a token, at concurrency 1: the paper's k = 6 of 8."""
DISTINCT_SHARE = 0.8
"""Of the full model's distinct experts a step, at a higher concurrency."""
CHOOSING = "Strategy leanmoe, choosing on calibration text"
MEMORY_BUDGETS = ("87.5%", "75%", "50%")
"""Shares of the experts that are compared, beside the one asked for."""
PRUNING, SKIPPING, BOTH = "fewer in total", "fewer a token", "both"


def compare_strategies(
    context: TuneContext, sensitivities: Sequence[Sensitivity], decode_batch: int
) -> StrategyTable:
    """One table: what each strategy loses, and how it stands against leanmoe's own."""
    setting = _setting(context, sensitivities, decode_batch)
    full = _strategy_losses(context, context.no_rules, None, "full")
    tried: dict[Strategy, tuple[tuple[Rule, ...], Losses]] = {}
    for each in STRATEGIES.values():
        if not each.needs_batch or decode_batch > 1:
            rules = each.rules(setting)
            tried[each] = (rules, _strategy_losses(context, rules, decode_batch, each.name))
    own = tried[STRATEGIES["leanmoe"]][1]
    sure = (context.settings.confidence, context.settings.seed)
    rows = []
    for each, (rules, lost) in tried.items():
        over = None if lost is own else loss_difference(full, lost, own, *sure)
        activities = context.activities(rules, decode_batch)
        rows.append(
            StrategyRow(
                strategy=each.name,
                title=each.title,
                source=each.source,
                slots=sum(a.slots for a in activities) / len(activities),
                distinct=sum(a.distinct for a in activities) / len(activities),
                loss=loss_increase(full, lost, *sure),
                rules=rules,
                against=None if over is None else LossGap(over.ratio, over.low, over.high),
            )
        )
    return StrategyTable(decode_batch, setting.budget, tuple(rows))


def _setting(
    context: TuneContext, sensitivities: Sequence[Sensitivity], decode_batch: int
) -> Setting:
    def cost(layer: int, rule: Rule) -> float:
        activity = context.activity(layer, rule, decode_batch)
        return activity.slots if decode_batch == 1 else activity.distinct

    def measure(rules: tuple[Rule, ...]) -> float:
        plan = Plan.per_layer(context.fingerprint, rules)
        return context.losses(context.text.searched, plan, decode_batch, CHOOSING).mean

    layers = len(context.no_rules)
    full = sum(cost(layer, Rule()) for layer in range(layers)) / layers
    budget = StrategyBudget("distinct", full * DISTINCT_SHARE)
    if decode_batch == 1:
        budget = StrategyBudget("slots", full * SLOTS_SHARE)
    return Setting(
        context.fingerprint,
        decode_batch,
        budget,
        cost,
        tuple(sensitivities),
        perturbation(context.model),
        measure,
        chosen(context, "decode", decode_batch),
    )


def _strategy_losses(
    context: TuneContext, rules: tuple[Rule, ...], decode_batch: int | None, name: str
) -> Losses:
    plan = Plan.per_layer(context.fingerprint, rules)
    what = f"Strategy {name}" + (f", concurrency {decode_batch}" if decode_batch else "")
    compute = partial(context.losses, context.text.compared, plan, decode_batch, what)
    about = (name,) if decode_batch is None else (decode_batch, name, digest(rules))
    return context.take(STRATEGY, Losses, compute, *about)


def within_memory(
    context: TuneContext, sensitivities: Sequence[Sensitivity], times: Mapping[int, PhaseTimes]
) -> tuple[Kept | None, tuple[PruneOrSkipRow, ...]]:
    """The experts that the memory budget keeps, and pruning beside skipping at several budgets.

    None and no rows where the settings have no memory budget.
    """
    keep = context.settings.keep
    if keep is None:
        return None, ()
    by_budget = keep_by_budget(context, keep)
    return by_budget[keep], total_or_activated(context, sensitivities, times, by_budget)


def keep_by_budget(context: TuneContext, keep: str) -> Mapping[str, Kept]:
    """The experts that remain at each memory budget, the run's own (`keep`) included."""
    settings, shape = context.settings, context.shape
    counts = {b: kept_count(b, shape) for b in dict.fromkeys([keep, *MEMORY_BUDGETS])}

    def compute() -> dict[str, Kept]:
        criterion, least = CRITERIA[settings.criterion], min(counts.values())
        windows = context.text.profiled
        scores_LE = rank_experts(criterion, shape, settings.seed, context.model, windows, least)
        return {b: best_experts(scores_LE, n, shape) for b, n in counts.items()}

    return context.take(EXPERTS_KEPT, dict[str, Kept], compute)


def total_or_activated(
    context: TuneContext,
    sensitivities: Sequence[Sensitivity],
    times: Mapping[int, PhaseTimes],
    kept: Mapping[str, Kept],
) -> tuple[PruneOrSkipRow, ...]:
    """A row for each concurrency, memory budget and way, with losses on the same held-out text.

    Time is of the experts in decode steps, as a share of the full model's, modelled from layers
    timed on this machine. "both" may take as long as skipping half as deep on top of pruning.
    """
    return tuple(
        row
        for concurrency in context.settings.concurrency
        for budget, experts in kept.items()
        for row in _compared_at(
            context, sensitivities, concurrency, times[concurrency]["decode"], budget, experts
        )
    )


def _compared_at(
    context: TuneContext,
    sensitivities: Sequence[Sensitivity],
    concurrency: int,
    time: LayerTime,
    budget: str,
    experts: Kept,
) -> list[PruneOrSkipRow]:
    """The three ways at one concurrency and memory budget; skipping is held against pruning."""
    everything = _seconds(context, context.no_rules, concurrency, time)
    pruned = tuple(Rule(experts=chosen) for chosen in experts)
    seconds = _seconds(context, pruned, concurrency, time)
    fastest = partial(_fastest_within, context, sensitivities, concurrency, time)
    half = Plan.per_layer(context.fingerprint, fastest((everything + seconds) / 2))
    ways = {
        PRUNING: pruned,
        SKIPPING: fastest(seconds),
        BOTH: restricted(half, experts).bands[0].rules,
    }
    full = _total_losses(context, context.no_rules, None)
    losses = {way: _total_losses(context, rules, concurrency) for way, rules in ways.items()}
    shares = {
        way: _seconds(context, rules, concurrency, time) / everything for way, rules in ways.items()
    }
    sure = (context.settings.confidence, context.settings.seed)
    memory = memory_share(context.shape, len(experts[0]))
    against = loss_difference(full, losses[SKIPPING], losses[PRUNING], *sure)
    is_as_fast = shares[SKIPPING] <= shares[PRUNING]
    compared = PruneOrSkipVerdict(**against.to_json(), verdict=verdict(against, is_as_fast))
    return [
        PruneOrSkipRow(
            concurrency,
            budget,
            way,
            memory=1.0 if way == SKIPPING else memory,
            time=shares[way],
            loss=loss_increase(full, losses[way], *sure),
            against=compared if way == SKIPPING else None,
        )
        for way in ways
    ]


def verdict(against: Estimate, is_as_fast: bool = True) -> str:
    """Which of two as fast ways loses less, if that is sure; none where skipping is slower."""
    if not is_as_fast:
        return "no skipping is as fast"
    if against.high < 0:
        return f"{SKIPPING} loses less"
    return f"{PRUNING} loses less" if against.low > 0 else "undecided"


def memory_share(shape: MoEShape, kept: int) -> float:
    """Bytes of all weights with so many experts a layer, as a share of the model's."""
    gone = (shape.experts - kept) * len(shape.moe_layers) * shape.expert_bytes
    return 1 - gone / shape.total_bytes()


def _total_losses(context: TuneContext, rules: Sequence[Rule], decode_batch: int | None) -> Losses:
    """Held-out losses under the rules; the decode batch counts where a rule is batch-aware."""
    is_batch_aware = any(rule.is_batch_aware for rule in rules)
    plan = Plan.per_layer(context.fingerprint, tuple(rules))
    what = "Total or activated experts"
    compute = partial(context.losses, context.text.compared, plan, decode_batch, what)
    key = digest(rules, decode_batch if is_batch_aware else None)
    return context.take(TOTAL_OR_ACTIVATED, Losses, compute, key)


def _seconds(
    context: TuneContext, rules: Sequence[Rule], decode_batch: int, time: LayerTime
) -> float:
    """The experts' seconds in one decode step, over all layers.

    A rule that prunes alone adds nothing for choosing: a pruned checkpoint routes as the model.
    """
    return sum(
        time.seconds(a.slots * decode_batch, a.distinct, not replace(rule, experts=None).is_empty)
        for a, rule in zip(context.activities(rules, decode_batch), rules, strict=True)
    )


def _fastest_within(
    context: TuneContext,
    sensitivities: Sequence[Sensitivity],
    decode_batch: int,
    time: LayerTime,
    seconds: float,
) -> tuple[Rule, ...]:
    """The rules of least predicted loss that take at most so long; the fastest if none do."""
    options = layer_rules(len(context.no_rules), sensitivities, decode_batch)
    items = []
    for layer, rules in enumerate(options):
        item = []
        for rule, loss in rules:
            activity = context.activity(layer, rule, decode_batch)
            rows = activity.slots * decode_batch
            item.append(Offer(loss, time.seconds(rows, activity.distinct, not rule.is_empty)))
        items.append(item)
    allocations = pareto(items)
    best = next((a for a in allocations if a.time <= seconds), allocations[-1])
    return tuple(options[layer][option][0] for layer, option in enumerate(best.chosen))
